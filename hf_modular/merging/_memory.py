"""Merging state dicts that are in memory."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_modular.merging._method import MergeMethod, Stack
from hf_modular.merging._pieces import Piece, PieceStacks, cut
from hf_modular.merging._preflight import check_finite, disagreements, refuse, unmergeable

StateDict = Mapping[str, Tensor]


def merge_state_dicts(
    base: StateDict | None,
    models: Sequence[StateDict],
    config: MergeMethod,
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Merge state dicts in memory.

    Args:
        base: What the models were fine-tuned from. None for a method that needs no base, such as
        `LinearConfig`. models: The state dicts to merge, with the same names and shapes. config: The method
        and its settings. weights: The weight of each model; 1 each by default. seed: For methods that draw
        random numbers. The same seed gives the same bits.

    Returns:
        A new state dict in the dtypes of the base (of the first model if there is none). Arithmetic is in
        fp32 (fp64 where an input is), rounded once. Tensors that hold no floating-point numbers are the
        base's.
    """
    source = _InMemory(config, base, list(models), _checked_weights(weights, len(models)), seed)
    refuse(source.problems())
    with one_thread(), torch.no_grad():
        survey = source.survey(source.names) if config.survey_scope == "model" else None
        merged = {name: source.merged(name, survey) for name in source.names}
    return {name: merged[source.tied.get(name, name)] for name in source.reference}


@dataclass(frozen=True, eq=False)
class _InMemory:
    """The stacks of state dicts in memory."""

    config: MergeMethod
    base: StateDict | None
    models: list[StateDict]
    weights: tuple[float, ...]
    seed: int

    @property
    def reference(self) -> StateDict:
        return self.models[0] if self.base is None else self.base

    @property
    def tied(self) -> dict[str, str]:
        """Names that share their memory with an earlier name, in every state dict; merged once, as they were."""
        first = [_first_names(model) for model in (self.reference, *self.models)]
        return {name: other for name, other in first[0].items() if all(f.get(name) == other for f in first)}

    @property
    def names(self) -> list[str]:
        tied = self.tied
        return [name for name in self.reference if name not in tied]

    def problems(self) -> Iterator[str]:
        if self.config.base_model == "required" and self.base is None:
            yield f"{self.config.name} needs a base, but got base=None"
        labelled = {f"model {i}": model for i, model in enumerate(self.models)}
        yield from disagreements(self.reference, labelled)
        for label, tensors in {"the base": self.reference, **labelled}.items():
            yield from unmergeable(tensors, label)

    def survey(self, names: Sequence[str]) -> Any:
        sizes = {name: self.reference[name].numel() for name in names if self.reference[name].is_floating_point()}
        return self.config.survey(PieceStacks(cut(sizes, elementwise=self.config.elementwise), self.stack))

    def stack(self, piece: Piece) -> Stack:
        own = self.reference[piece.name]
        tensors = [_part(model[piece.name].to(own.device), piece) for model in self.models]
        dtype = arithmetic_dtype([own.dtype, *(tensor.dtype for tensor in tensors)])
        models = torch.stack([tensor.to(dtype) for tensor in tensors])
        return Stack(
            name=piece.name,
            base=models[0] if self.base is None else _part(own, piece).to(dtype),
            models=models,
            weights=torch.tensor(self.weights, dtype=dtype),
            has_base=self.base is not None,
            offset=piece.start,
            seed=self.seed,
        )

    def merged(self, name: str, survey: Any) -> Tensor:
        own = self.reference[name]
        if not own.is_floating_point():
            return _carried_over(name, own, [model[name] for model in self.models])
        if self.config.survey_scope == "tensor":
            survey = self.survey([name])
        stack = self.stack(Piece(name, 0, own.numel(), whole=True))
        merged = self.config.merge(stack, survey).to(own.dtype)
        check_finite(name, merged, ((f"model {i}", model[name]) for i, model in enumerate(self.models)))
        return merged


def _part(tensor: Tensor, piece: Piece) -> Tensor:
    return tensor if piece.whole else tensor.reshape(-1)[piece.start : piece.start + piece.size]


def arithmetic_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """fp32, or fp64 where an input is fp64."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums that torch splits over threads depend on their number; a merge must not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _carried_over(name: str, own: Tensor, others: Sequence[Tensor]) -> Tensor:
    if not all(torch.equal(own, other.to(own.device)) for other in others):
        warnings.warn(
            f"{name} ({own.dtype}) differs between the models and cannot be merged: the base's is kept",
            stacklevel=2,
        )
    return own.clone()


def _first_names(model: StateDict) -> dict[str, str]:
    """For each name that shares memory and shape with an earlier one: that one."""
    first: dict[tuple[object, ...], str] = {}
    found = {}
    for name, tensor in model.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        if (earlier := first.setdefault(place, name)) != name and tensor.numel():
            found[name] = earlier
    return found


def _checked_weights(weights: Sequence[float] | None, n: int) -> tuple[float, ...]:
    if n < 1:
        raise ValueError(f"a merge needs at least one model, but got {n}")
    if weights is None:
        return (1.0,) * n
    if len(weights) != n:
        raise ValueError(f"each of the {n} models needs one weight, but got weights={list(weights)}")
    return tuple(float(weight) for weight in weights)
