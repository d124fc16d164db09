"""What a merge method is: a frozen dataclass of settings with the mathematics of one stack of tensors.

A method's file holds one subclass of `MergeMethod`. It knows nothing of files, dtypes, chunks, threads or
recipes: the engine hands it one `Stack` after another, in fp32, and rounds what comes back once.
"""

import json
import math
import sys
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor

from hf_modular.merging import _random

CONFIG_NAME = "merge_config.json"

RUN = 1 << 17  # elements of a run, which a long computation takes at a time, so that they stay near a core's cache
BLOCK = 1 << 17  # elements of a block, which a survey sees at a time

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Stack:
    """One tensor, or a run of its elements, of the base and of all n models, in fp32 (fp64 where an input is, or the
    method wants it).

    A method changes nothing that it is given. `shape` is the tensor's own for most methods; for an elementwise
    one it may be that of a flat chunk of any length.
    """

    name: str
    base: Tensor  # (*shape); the first model where there is no base
    models: Tensor  # (n, *shape)
    weights: Tensor  # (n,), each model's `weight` in the recipe, 1 if it has none
    has_base: bool = True  # for methods to which a base is optional
    offset: int = 0  # flat index of the first element within its tensor
    seed: int = 0  # the run's
    settings: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # those that differ between models
    companions: Mapping[str, Tensor] = field(default_factory=dict)  # what `needs` names, (n, *shape) each

    @property
    def deltas(self) -> Tensor:  # (n, *shape)
        """The task vectors, models - base."""
        return self.models - self.base

    def task_vectors(self) -> Iterator[Tensor]:  # n times (*shape)
        """models - base, one after the other in the same memory, for what needs only one at a time."""
        delta = torch.empty_like(self.base)
        return (torch.sub(model, self.base, out=delta) for model in self.models.unbind())

    def each(self, setting: str, default: T) -> tuple[T, ...]:
        """A per-model setting, one value for each model."""
        return self.settings.get(setting, (default,) * len(self.models))

    def runs(self, size: int = RUN) -> "Iterator[Stack]":
        """The elements a few at a time, flat, so what a long computation makes of them stays in a core's cache."""
        base, models = self.base.reshape(-1), self.models.reshape(len(self.models), -1)
        companions = {name: tensor.reshape(len(tensor), -1) for name, tensor in self.companions.items()}
        for start in range(0, max(len(base), 1), size):
            part = slice(start, start + size)
            yield replace(
                self,
                base=base[part],
                models=models[:, part],
                companions={name: tensor[:, part] for name, tensor in companions.items()},
                offset=self.offset + start,
            )

    def bernoulli(self, model: int, p: float) -> Tensor:  # (*shape)
        """1 with probability p, else 0: a function of seed, tensor name, model and element.

        Numbers, because to multiply by booleans takes torch three times as long.
        """
        mask = _random.bernoulli(self._key(model), self.offset, self.base.numel(), p)
        return mask.view(torch.uint8).to(self.base).view(self.base.shape)

    def uniform(self, model: int) -> Tensor:  # (*shape)
        """Numbers in [0, 1), independent of `bernoulli`'s; they depend on the same things."""
        numbers = _random.uniform(self._key(model), self.offset, self.base.numel())
        return numbers.to(self.base).view(self.base.shape)

    def _key(self, model: int) -> str:
        return f"{self.seed}\0{self.name}\0{model}"


class Stacks(Protocol):
    """The stacks that `survey` sees; each iteration and each `map` is one pass over them.

    An elementwise method gets chunks of BLOCK elements, whoever runs it: what is summed over them in order
    cannot depend on the number of workers. What `map` returns must not share memory with the stacks, which
    are used again.
    """

    def __iter__(self) -> Iterator[Stack]: ...

    def map(self, function: Callable[[Stack], T]) -> Iterable[T]:
        """function(stack) for each stack, computed by the engine's workers, in the order of the stacks."""
        ...

    def sample(self, of_each: int = 2048) -> Iterable[Stack]:
        """Few of the stacks, from all tensors, and some elements of each: for first guesses, never for results."""
        ...


@dataclass(frozen=True)
class Alias:
    """Another program's name for a method: what it sets differently, and its words for our settings."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, tuple[str, Callable[[Any], Any]]] = field(default_factory=dict)  # theirs -> (ours, of value)


@dataclass(frozen=True)
class MergeSettings:
    """The settings of a way to merge, as dataclass fields.

    The metadata of a field are its `help`, for a number its `law` (an interval such as "[0, 1)"), and
    `per_model=True` where a recipe may give each model its own value (read it by `stack.each`). A `Literal`
    allows its values only.
    """

    name: ClassVar[str]  # in recipes and on the command line
    base_model: ClassVar[Literal["required", "optional", "unused"]] = "required"
    model_counts: ClassVar[tuple[int, float]] = (1, math.inf)  # how many models, beside the base, it merges
    aliases: ClassVar[Mapping[str, Alias]] = {}  # mergekit's names for this method

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in fields(self):
            check_setting(f.name, getattr(self, f.name), hints[f.name], f.metadata.get("law", "(-inf, inf)"))

    def to_dict(self) -> dict[str, Any]:
        return {"merge_method": self.name, **asdict(self)}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        settings = dict(settings)
        if (method := settings.pop("merge_method", cls.name)) != cls.name:
            raise ValueError(f"{cls.__name__} holds the settings of {cls.name!r}, but got those of {method!r}")
        known = [f.name for f in fields(cls)]
        if unknown := [key for key in settings if key not in known]:
            raise ValueError(f"{cls.name!r} has the settings {known}, but got {unknown}")
        return cls(**settings)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the settings to `merge_config.json` in a folder."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", "utf-8")

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **download: Any) -> Self:
        """Read the settings from a folder or a Hub repository (`revision`, `token`, ... as in
        `hf_hub_download`).
        """
        return cls.from_dict(read_config(name_or_path, **download))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Upload `merge_config.json` to a Hub repository, made if it is not there; returns the commit's
        address.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        content = json.dumps(self.to_dict(), indent=2, sort_keys=True).encode() + b"\n"
        commit = api.upload_file(
            path_or_fileobj=content,
            path_in_repo=CONFIG_NAME,
            repo_id=repo,
            revision=revision,
            commit_message=f"Merge settings: {self.name}",
        )
        return str(commit.commit_url)


@dataclass(frozen=True)
class MergeMethod(MergeSettings, ABC):
    """Settings as dataclass fields, `merge` as the mathematics of one stack of tensors."""

    takes_weights: ClassVar[bool] = True  # else the models must not have any
    in_fp64: ClassVar[bool] = False  # for a formula so short that the arithmetic costs less than to read and write

    @property
    def needs(self) -> frozenset[str]:
        """What is to be read beside the weights of each model."""
        return frozenset()

    @property
    def one_by_one(self) -> "Parts | None":
        """For a method that takes one model after the other: its parts, each a method of its own."""
        return None

    @property
    def elementwise(self) -> bool:
        """Whether an output element depends on the same element of the inputs (and the survey) alone."""
        return False

    @property
    def survey_scope(self) -> Literal["model", "tensor"]:
        """What one `survey` is about."""
        return "model"

    @property
    def surveys(self) -> Literal["model", "tensor"] | None:
        """The scope of its survey, if it makes any."""
        return None if type(self).survey is MergeMethod.survey else self.survey_scope

    def survey(self, stacks: Stacks) -> Any:
        """What `merge` must know beforehand, by as many passes over the stacks as it takes. Most need
        nothing.

        With `survey_scope = "model"` it is called once with all stacks, with "tensor" once for each tensor with that
        tensor's stacks. So a method that needs a tensor's norm or threshold stays elementwise, and no tensor
        is ever held whole.
        """
        return None

    @abstractmethod
    def merge(self, stack: Stack, survey: Any) -> Tensor:  # (*shape)
        """The merged tensor."""

    def facts(self, survey: Any) -> dict[str, Any]:
        """What of the survey of a whole model is worth a place in the report, as JSON has it."""
        return {}


class Parts(NamedTuple):
    """A method that takes one model after the other, in parts: a state, of the base's names and shapes, is all that
    goes from one to the next, and the facts of their surveys.
    """

    first: MergeMethod  # of the base and a model makes the state
    add: MergeMethod  # of the base, a model and, as its companion "state", the state before
    result: Callable[[list[dict[str, Any]]], MergeMethod]  # the facts so far -> of the base and the state, as a model


def read_config(name_or_path: str | Path, **download: Any) -> dict[str, Any]:
    """What is in a folder's or repository's `merge_config.json`."""
    path = Path(name_or_path) / CONFIG_NAME
    if not path.is_file():
        if Path(name_or_path).is_dir():
            raise FileNotFoundError(f"no {CONFIG_NAME} in {name_or_path}")
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(str(name_or_path), CONFIG_NAME, **download))
    settings = json.loads(path.read_text("utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a JSON object, but got {type(settings).__name__}")
    return settings


def weighted_sum(weights: Tensor | Iterable[float], terms: Iterable[Tensor]) -> Tensor:  # (*shape)
    """Σ wᵢ tᵢ in the order given, each product and each sum rounded on its own.

    A matrix product or a fused multiply-add may round differently at the edge of a vector register or a
    block, and the result would depend on where a tensor is cut into chunks.
    """
    total = product = None
    factors = weights.tolist() if isinstance(weights, Tensor) else weights
    terms = terms.unbind() if isinstance(terms, Tensor) else terms  # to iterate over a tensor takes longer
    for weight, term in zip(factors, terms, strict=True):
        if total is None:
            total = term * weight
        else:
            if weight != 1:
                term = product = torch.mul(term, weight, out=product)
            total.add_(term)
    if total is None:
        raise ValueError("a weighted sum needs at least one term")
    return total


def total_weight(weights: Tensor) -> float:
    """Σ wᵢ, for methods that divide by it."""
    total = math.fsum(weights.tolist())
    if abs(total) < 1e-8:
        raise ValueError(
            f"the weights of the models must not sum to 0 with normalize=True, but got {weights.tolist()}: "
            "set normalize=False or change a weight"
        )
    return total


def check_setting(name: str, value: Any, kind: Any, law: str = "(-inf, inf)") -> None:
    """One setting against its type and its law."""
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise ValueError(f"`{name}` must be one of {list(typing.get_args(kind))}, but got {name}={value!r}")
    elif not _is_a(value, kind):
        raise TypeError(f"`{name}` must be of type {getattr(kind, '__name__', kind)}, but got {name}={value!r}")
    elif isinstance(value, (int, float)) and not _within(value, law):
        raise ValueError(f"`{name}` must be in {law}, but got {name}={value!r}")


def _is_a(value: Any, kind: Any) -> bool:
    """isinstance, where an int is a float too and a bool is no number."""
    if isinstance(kind, UnionType):
        return any(_is_a(value, member) for member in typing.get_args(kind))
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else typing.get_origin(kind) or kind)


def _within(value: float, law: str) -> bool:
    """Whether a finite number lies in an interval such as "[0, 1)"."""
    low, high = (float(end) for end in law[1:-1].split(","))
    above = value >= low if law[0] == "[" else value > low
    below = value <= high if law[-1] == "]" else value < high
    return abs(value) <= sys.float_info.max and above and below  # a whole number may be too large for isfinite
