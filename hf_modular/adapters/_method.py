"""What an adapter method is: a config, and the mathematics of one adapter on one layer.

A method sees a layer only through its `Site`: weights come as (out, in, *kernel) whatever way the layer stores
them, so one formula serves Linear, GPT-2's Conv1D, convolutions, embeddings, norms and quantised layers alike.
Everything else (several adapters, mixed batches, merging, dtypes, saving) is done by `_layer.py` and `_peft.py`.
"""

import copy
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeVar, cast, get_origin

import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftType
from torch import Tensor, nn

from hf_modular.adapters._readme import add_loading_note

FORMAT_VERSION = 1

Value = TypeVar("Value")
Convolve = Callable[[Tensor, Tensor], Tensor]  # (x, weight) -> y


@dataclass(frozen=True)
class Site:
    """The layer, as far as a method may know it."""

    name: str  # its path in the model
    weight_shape: tuple[int, ...]  # (out, in / groups, *kernel); (features,) for a norm
    has_bias: bool
    kind: str = "Linear"  # or "Conv", "Embedding", "Norm"
    plain: bool = True  # does no more than its kind says: it has no forward of its own, and is no deconvolution
    groups: int = 1

    @property
    def is_norm(self) -> bool:
        return len(self.weight_shape) == 1


@dataclass
class AdapterConfig(PeftConfig):
    """The settings that every adapter method of this package shares.

    Args:
        target_modules (`list[str] | str`, *optional*):
            The modules to adapt: names or suffixes of names, one regular expression, or `"all-linear"`. If not
            given, the modules that are usual for the architecture.
        target_parameters (`list[str]`, *optional*):
            Parameters to adapt that are no layer's weight, by name or suffix: `["gate_up_proj", "down_proj"]` for the
            experts of a mixture, each of which gets an adapter of its own.
        exclude_modules (`list[str] | str`, *optional*):
            Modules not to adapt, though `target_modules` matches them.
        modules_to_save (`list[str]`, *optional*):
            Modules that are trained and saved whole beside the adapter, for example a new classifier.
        layers_to_transform (`list[int] | int`, *optional*):
            Only these layer indices are adapted. Needs `target_modules` to be a list.
        layers_pattern (`list[str] | str`, *optional*):
            The name of the module list that `layers_to_transform` counts in, if it is not a common one.
        trainable_token_indices (`list[int] | dict[str, list[int]]`, *optional*):
            Tokens whose embeddings are trained beside the adapter.
        bias (`str`, defaults to `"none"`):
            Which of the model's own biases are trained and saved beside the adapter: `"none"`, `"all"`, or those of
            the adapted layers with `"<type>_only"`, for example `"hfm_hut_only"`. They stay as trained when the
            adapter is disabled, so only one adapter of a model may have them.
        format_version (`int`, defaults to 1):
            The version of the saved format. A newer one than this package knows is refused.

    Raises:
        ValueError: If a setting is out of its range, or the adapter was saved by a newer version of this package.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Modules to adapt: names, one regular expression, or 'all-linear'."},
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters to adapt that are no layer's weight: the experts of a mixture."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules not to adapt, though target_modules matches them."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved whole beside the adapter."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Only these layer indices are adapted."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "The name of the module list that layers_to_transform counts in."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings are trained beside the adapter."}
    )
    bias: str = field(
        default="none", metadata={"help": "Biases of the model trained beside the adapter: none, all or <type>_only."}
    )
    format_version: int = field(
        default=FORMAT_VERSION, metadata={"help": "The version of the saved format; set by the package."}
    )

    # `HFM_` keeps the type apart from a method of the same name that PEFT may adopt later in a format of its own.
    type_name: ClassVar[str]
    # model type -> modules to adapt by default; None: those that are usual for LoRA
    default_targets: ClassVar[dict[str, list[str] | str] | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(self.type_name)
        for setting in fields(self):
            require_type(setting.name, getattr(self, setting.name), setting.type)
        require_rank("format_version", self.format_version)
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"This adapter was saved in format_version={self.format_version}, and the installed hf_modular reads "
                f"up to {FORMAT_VERSION}. Upgrade hf_modular to load it."
            )
        self.target_modules = _selection("target_modules", self.target_modules)
        self.exclude_modules = _selection("exclude_modules", self.exclude_modules)
        for name in ("modules_to_save", "target_parameters"):
            if isinstance(getattr(self, name), str):  # PEFT would take it for a list of its letters
                raise TypeError(f"`{name}` must be a list of names, but got {name}={getattr(self, name)!r}.")
        require_choice("bias", self.bias, ["none", "all", f"{self.type_name.lower()}_only"])
        self._check_layer_selection()

    def _check_layer_selection(self) -> None:
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` needs `target_modules` to be a list, but got {self.target_modules=} as a regular "
                        "expression. Select the layers in the expression instead."
                    )
        chosen = self.layers_to_transform
        if any(type(i) is not int or i < 0 for i in (chosen if isinstance(chosen, list) else [chosen or 0])):
            raise ValueError(f"`layers_to_transform` must be numbers from 0 on, but got layers_to_transform={chosen}.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` needs `layers_to_transform` to be given, but it is None.")

    def targets_for(self, model_type: str | None) -> list[str] | str | None:
        """What to adapt in a model of this type if `target_modules` is not given; None for what is usual for LoRA."""
        return (self.default_targets or {}).get(str(model_type))

    def modules_to_train(self, model: nn.Module) -> list[str]:
        """What these settings put into `modules_to_save` beside what the user has put there."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON has them, in an order that is always the same."""
        return {name: sorted(v) if isinstance(v, set) else v for name, v in super().to_dict().items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as PEFT does, and say in the folder's README what to import before loading."""
        super().save_pretrained(save_directory, **kwargs)
        add_loading_note(Path(save_directory), str(self.type_name), self.base_model_name_or_path)


def pattern_value(patterns: Mapping[str, Value], name: str, default: Value) -> Value:
    """The value that `rank_pattern` gives to the layer `name`; the keys are names or regular expressions."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def norm_names(model: nn.Module) -> list[str]:
    """The norms of a model, as `modules_to_save` names them: the last parts of their names if those say enough."""
    norms = {_original(name) for name, module in model.named_modules() if _is_norm(module)}
    ends = {name.rpartition(".")[2] for name in norms}
    named = {_original(name) for name, _ in model.named_modules() if name.endswith(tuple(ends))}
    return sorted(ends if named == norms else norms)


def _original(name: str) -> str:
    """The module's name in the model as it was before another adapter made a copy of it to train."""
    return re.sub(r"\.(original_module|modules_to_save\..*)$", "", name)


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.ndim == 1


def _selection(name: str, value: Any) -> Any:
    """What selects modules, as PEFT matches it: a set of names, or a regular expression."""
    if isinstance(value, str):
        _require_pattern(name, value)
        return value
    if value is None or (isinstance(value, Collection) and all(isinstance(part, str) for part in value)):
        return None if value is None else set(value)
    raise TypeError(f"`{name}` must be a list of names or a regular expression, but got {name}={value!r}.")


def _require_pattern(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"`{name}` must be a regular expression, but got {name}={pattern!r}: {error}.") from error


def require_type(name: str, value: object, kind: object) -> None:
    """Refuse a setting that is not of its field's type, for the types that can be told."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is bool and not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, but got {name}={value!r}.")
    if kind is float and not (number and math.isfinite(value)):  # type: ignore[arg-type]
        raise TypeError(f"`{name}` must be a finite number, but got {name}={value!r}.")
    if get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise TypeError(f"`{name}` must be a dict of patterns and values, but got {name}={value!r}.")
        for pattern in value:
            _require_pattern(name, pattern)


def require_between(name: str, value: float, low: float, high: float, *, open_high: bool = False) -> None:
    """Refuse a setting outside [low, high], or [low, high) with `open_high`."""
    if not low <= value <= high or (open_high and value == high):
        raise ValueError(f"`{name}` must be in [{low}, {high}{')' if open_high else ']'}, but got {name}={value}.")


def require_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Refuse a setting that is not one of `choices`."""
    if not any(value is c or (value == c and type(value) is type(c)) for c in choices):
        raise ValueError(f"`{name}` must be one of {list(choices)}, but got {name}={value!r}.")


def require_rank(name: str, value: object) -> None:
    """Refuse a rank or a size that is not a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, but got {name}={value!r}.")


def require_matrix(method: str, site: Site) -> None:
    """Refuse a norm where a method needs a weight with two sides."""
    if site.is_norm:
        raise TypeError(f"{method} needs a weight with two sides, but layer '{site.name}' is a norm.")


class Adapter(nn.Module):
    """One adapter on one layer. Its parameters are plain attributes.

    A subclass is final and defines exactly one of

    - `delta()`, additive: `W' = W + delta()`;
    - `transform(weight, bias)`, rewriting: `W', b' = transform(W, b)`;
    - `forward(x, y)` alone, which acts on the output only and cannot be merged.

    Beside the first two there may be a cheaper equal of the rewritten layer: `forward(x, y)`, which is used where
    `direct` is set, or `linear(x, weight, bias)`, which is used on plain linear layers where `on_linear` is set.
    Weights are given in fp32 or better, but to `linear` as they are. A method changes nothing that it is given.
    """

    direct: bool = False
    on_linear: bool = False
    tasks: tuple[str, ...] = ()  # for an adapter that holds several, of which `task` is in use
    task: int = 0
    mixes: bool = False  # whether each sample of a batch can be at a task of its own, one of `sample_tasks`
    sample_tasks: list[int] | None = None

    def __init__(self, config: Any, site: Site, shared: Any = None) -> None:
        super().__init__()

    @classmethod
    def made(cls, config: Any, site: Site, *shared: Any) -> "Adapter":
        """The adapter of one layer, for a method that needs another one on some."""
        return cls(config, site, *shared)

    def at_task(self, task: str) -> Self:
        """This adapter, with its very parameters, at another of its tasks."""
        view = copy.copy(self)
        view.task = self.tasks.index(task)
        return view

    def at_tasks(self, tasks: Sequence[str]) -> Self:
        """The same at a task for each sample of a batch."""
        view = copy.copy(self)
        view.sample_tasks = [self.tasks.index(task) for task in tasks]
        return view

    @staticmethod
    def share(config: Any, sites: list[Site]) -> Any:
        """What all adapters of one name share, made once for them and given to each; None if there is nothing.

        An adapter registers the module that it needs of it as `self.shared`, and gets at its tensors by calling it,
        as sharded training needs. Whole modules are shared, for bare parameters come apart when they are cast,
        copied or loaded.
        """
        return None

    def delta(self) -> Tensor:  # (out, in, *kernel)
        """What is added to the weight."""
        raise NotImplementedError

    def transform(
        self,
        weight: Tensor,  # (out, in, *kernel)
        bias: Tensor | None,  # (out,)
    ) -> tuple[Tensor, Tensor | None]:
        """The weight and bias of the adapted layer."""
        return weight + self.delta().to(weight.device), bias

    def forward(
        self,
        x: Tensor,  # the layer's input
        y: Tensor,  # (*, out): its output, the channels last
        convolve: Convolve | None = None,  # for a plain convolution: its operation with another weight, without bias
    ) -> Tensor:  # (*, out)
        """The output of the adapted layer."""
        raise NotImplementedError

    def linear(
        self,
        x: Tensor,  # (*, in)
        weight: Tensor,  # (out, in)
        bias: Tensor | None,  # (out,)
    ) -> Tensor:  # (*, out)
        """The output of the adapted linear layer."""
        raise NotImplementedError

    def lora(self) -> tuple[Tensor, Tensor, float] | None:
        """A (r, in, *kernel), B (out, r) and a scaling, so that `delta()` is scaling · B A; None if there are none."""
        return None

    def replacement(self) -> tuple[Tensor, Tensor | None] | None:
        """The weight (out, in, *kernel) and bias that it puts in the place of the layer's, if that is what it does."""
        return None

    def unmergeable(self) -> str | None:
        """Why this adapter cannot be merged into its layer; None if it can."""
        cls = type(self)
        rewrites = cls.delta is not Adapter.delta or cls.transform is not Adapter.transform
        return None if rewrites else f"{cls.__name__} acts on the layer's output and has no weight to merge"


def plus(new: Tensor, y: Tensor) -> Tensor:
    """new + y, written over `new` where that loses nothing: a large tensor more is slow to get."""
    return new.add_(y) if torch.promote_types(new.dtype, y.dtype) == new.dtype else new + y


class Factors(NamedTuple):
    """What a weight of low rank is the product of: up · core · down. One of core and down may be missing."""

    up: Tensor  # (out, q)
    core: Tensor | None  # (q, p, *kernel)
    down: Tensor | None  # (p, in)

    def inner(self) -> Tensor:  # (q, in, *kernel)
        """core · down."""
        if self.core is None or self.down is None:
            return self.down if self.core is None else self.core  # type: ignore[return-value]
        return torch.tensordot(self.core, self.down, ([1], [0])).movedim(-1, 1)

    def product(self) -> Tensor:  # (out, in, *kernel)
        """up · core · down."""
        return torch.tensordot(self.up, self.inner(), 1)


class LowRank(Adapter):
    """An additive adapter made of factors: W' = W + scaling · up · core · down.

    A subclass is final and defines `factors`. On plain layers the factors act on the input one after the other,
    which is cheap and lets dropout act on the input; elsewhere the weight is rewritten.
    """

    def __init__(self, config: Any, site: Site, scaling: float) -> None:
        super().__init__(config, site)
        require_matrix(type(self).__name__, site)
        if config.dropout and not site.plain:
            raise ValueError(
                f"`dropout` acts on the input of a layer that only applies its weight, and layer '{site.name}' does "
                f"more or is a deconvolution: set {config.dropout=} to 0, or name the layer in `exclude_modules`."
            )
        self.scaling, self.dropout = scaling, config.dropout
        self.kernel_axes, self.groups = len(site.weight_shape) - 2, site.groups
        # the factors of a grouped convolution mix what its groups keep apart
        self.direct = site.plain and (site.groups == 1 or bool(config.dropout))

    def factors(self) -> Factors:
        """The factors of the change, in the layer's (out, in / groups, *kernel)."""
        raise NotImplementedError

    def scaled(self) -> Factors:
        """The factors with the scaling in one of the small matrices, and not in the large output."""
        up, core, down = self.factors()
        return Factors(self.scaling * up, core, down)

    def delta(self) -> Tensor:
        return self.scaled().product()

    def forward(self, x: Tensor, y: Tensor, convolve: Convolve | None = None) -> Tensor:
        return y + self._convolved(x, convolve) if convolve is not None else plus(self._looked_up(x), y)

    def _looked_up(self, x: Tensor) -> Tensor:  # (*, in), or the indices (*) of an embedding
        up, core, down = self.scaled()
        down = cast(Tensor, down)  # only a convolution goes without
        # rows of many entries: with rows of a few, products and their gradients take several times as long
        if x.is_floating_point():
            low = F.linear(self._drop(x), down.contiguous())
        else:
            low = self._drop(F.embedding(x, down.t()))
        return (low if core is None else F.linear(low, core)) @ up.t().contiguous()

    def _convolved(self, x: Tensor, convolve: Convolve) -> Tensor:  # (*, in, *size)
        factors, x = self.scaled(), self._drop(x)
        if self.groups > 1:
            return convolve(x, factors.product()).movedim(-1 - self.kernel_axes, -1)
        if factors.down is not None:
            x = self._over_channels(factors.down, x)
        x = self._over_channels(factors.up, convolve(x, factors.core))  # type: ignore[arg-type]
        return x.movedim(-1 - self.kernel_axes, -1)

    def _over_channels(self, matrix: Tensor, x: Tensor) -> Tensor:
        flat = F.conv1d(x.flatten(-self.kernel_axes), matrix.unsqueeze(-1))
        return flat.unflatten(-1, x.shape[-self.kernel_axes :])

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def lora(self) -> tuple[Tensor, Tensor, float]:
        up, core, down = factors = self.factors()
        if core is None or down is None or core.ndim > 2 or len(core) <= len(down):
            return factors.inner(), up, self.scaling
        return down, up @ core, self.scaling
