"""What a method needs of each model beside its weights, such as Fisher information: read along with them.

A companion holds a tensor for each of the model's, of the same shape or of one that broadcasts to it. A file such as
`fisher_config.json` beside it may say that the square roots are stored (`"root": true`), which need fewer digits.
Names that a companion has and the model has not are passed over: tied weights may be stored under both names.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from hf_modular.merging._method import MergeMethod
from hf_modular.merging.engine._engine import Inputs
from hf_modular.merging.engine._preflight import MERGEABLE, TensorLike, listed
from hf_modular.merging.sources._sources import read_object

Companions = Mapping[str, Sequence[Inputs]]  # what it is -> one for each model


@dataclass(frozen=True, eq=False)
class Companion:
    """A companion of one model, in the shapes of the model's tensors."""

    origin: Inputs
    shapes: Mapping[str, TensorLike]  # of the model
    root: bool = False  # whether the square roots are stored

    @property
    def reference(self) -> str:
        return self.origin.reference

    @cached_property
    def tensors(self) -> Mapping[str, TensorLike]:
        return {name: tensor for name, tensor in self.origin.tensors.items() if name in self.shapes}

    def fill(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out`, flat, with elements from flat index `start` on."""
        shape, stored = tuple(self.shapes[name].shape), tuple(self.tensors[name].shape)
        if shape == stored:
            self.origin.fill(name, start, out)
        else:
            whole = out.new_empty(math.prod(stored))
            self.origin.fill(name, 0, whole)
            out.copy_(whole[_places(shape, stored, start, out.numel()).to(out.device)])
        if self.root:
            out.square_()


def config_name(kind: str) -> str:
    return f"{'fisher' if kind == 'forget' else kind}_config.json"  # "forget" is Fisher information of other data


def is_root(kind: str, folder: Path) -> bool:
    """Whether the companion in a folder holds square roots."""
    config = folder / config_name(kind)
    return config.is_file() and read_object(config).get("root") is True


def companion_problems(
    method: MergeMethod, plan: Mapping[str, TensorLike], models: int, companions: Companions
) -> Iterator[str]:
    """Companions that are missing, of no use, or do not fit the model."""
    for kind in sorted(method.needs | companions.keys()):
        those = companions.get(kind, ())
        if kind not in method.needs:
            yield f"{method.name!r} has no use for {kind!r} of the models"
        elif len(those) != models:
            yield f"{method.name!r} needs {kind!r} of each of the {models} models, but got {len(those)}"
        else:
            yield from _misfits(kind, plan, those)


def without(plan: Mapping[str, TensorLike], companions: Companions) -> Iterator[str]:
    """What to say of tensors for which there are no companions."""
    for kind, those in companions.items():
        if missing := [name for name in _merged(plan) if name not in those[0].tensors]:
            yield f"there is no {kind!r} for {listed(missing)}, which counts for all models alike"


def _misfits(kind: str, plan: Mapping[str, TensorLike], companions: Sequence[Inputs]) -> Iterator[str]:
    names = _merged(plan)
    held = dict.fromkeys(name for companion in companions for name in companion.tensors if name in names)
    if not held:
        yield f"{kind!r} must have names of the model's tensors, such as {listed(names)}, but has none"
    for companion in companions:
        if missing := [name for name in held if name not in companion.tensors]:
            yield f"{companion.reference} has no {kind!r} for {listed(missing)}, but others have"
        for name, tensor in companion.tensors.items():
            shape, whole = tuple(tensor.shape), tuple(plan[name].shape)
            if len(shape) != len(whole) or any(part not in (1, full) for part, full in zip(shape, whole, strict=True)):
                yield f"{name} must fit the model's shape {whole}, but has {shape} in {companion.reference}"
            if tensor.dtype not in MERGEABLE:
                yield f"{name} must hold floating-point numbers, but has {tensor.dtype} in {companion.reference}"


def _merged(plan: Mapping[str, TensorLike]) -> list[str]:
    return [name for name, like in plan.items() if like.dtype.is_floating_point]


def _places(shape: Sequence[int], stored: Sequence[int], start: int, size: int) -> Tensor:  # (size,)
    """Where elements of a tensor lie, flat, in what broadcasts to it."""
    rest = torch.arange(start, start + size)
    places, stride = torch.zeros_like(rest), 1
    for full, part in zip(reversed(shape), reversed(stored), strict=True):
        if part > 1:
            places += rest % full * stride
        rest //= full
        stride *= part
    return places
