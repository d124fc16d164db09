"""What can be wrong before a weight is read, and with a merged tensor: found, collected and named."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from hf_modular.merging._method import Stack
from hf_modular.merging.engine._pieces import Piece, PieceStacks
from hf_modular.merging.recipes._settings import Resolved

MERGEABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SHOWN = 20
_BITS = {  # the integers of the same size, and the bits of infinity: all larger ones, but for the sign, are NaN
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000),
    torch.float32: (torch.int32, 0x7F80_0000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float8_e5m2: (torch.int8, 0x7C),
    torch.float8_e4m3fn: (torch.int8, 0x7F),  # has NaN but no infinity
}


class TensorLike(Protocol):
    """A tensor, or what a file's header says of one."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> Sequence[int]: ...


def refuse(problems: Iterable[str]) -> None:
    """All problems in one error."""
    found = list(problems)
    if not found:
        return
    shown = found[:_SHOWN] + ([f"... and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else [])
    raise ValueError("the merge cannot begin:\n" + "\n".join(f"  - {problem}" for problem in shown))


def disagreements(
    reference: Mapping[str, TensorLike], models: Mapping[str, Mapping[str, TensorLike]]
) -> Iterator[str]:
    """How the models' tensors differ in name, shape or kind from the reference's."""
    for label, model in models.items():
        if missing := [name for name in reference if name not in model]:
            yield f"{label} has no tensor {listed(missing)}"
        if extra := [name for name in model if name not in reference]:
            yield f"{label} has the tensor {listed(extra)}, which the base has not"
        for name in reference.keys() & model.keys():
            yield from _mismatch(name, reference[name], label, model[name])


def unmergeable(tensors: Mapping[str, TensorLike], label: str) -> Iterator[str]:
    """Tensors of a dtype that holds no plain numbers: packed, quantised or complex weights."""
    for name, tensor in tensors.items():
        if (tensor.dtype.is_floating_point or tensor.dtype.is_complex) and tensor.dtype not in MERGEABLE:
            yield (
                f"{name} of {label} is {spelled(tensor.dtype)}, which cannot be merged: "
                "dequantise the model to float32, bfloat16 or float16 first"
            )


def setting_problems(settings: Mapping[str, Resolved], models: int, has_base: bool) -> Iterator[str]:
    """What the method has against its settings or weights, by a trial on a single zero for each that occurs."""
    different = {repr(resolved): (name, resolved) for name, resolved in reversed([*settings.items()])}
    for name, resolved in different.values():
        zeros = torch.zeros(models, 1)
        stack = Stack(name, zeros[0], zeros, torch.tensor(resolved.weights), has_base, settings=resolved.each)
        stacks = PieceStacks([Piece(name, 0, 1)], lambda piece, stack=stack: stack)  # type: ignore[misc]
        if not resolved.method.takes_weights and any(weight != 1 for weight in resolved.weights):
            yield f"{name}: {resolved.method.name!r} takes no weights, but got {list(resolved.weights)}"
        try:
            resolved.method.merge(stack, resolved.method.survey(stacks))
        except ValueError as error:
            yield f"{name}: {error}"


def check_finite(name: str, merged: Tensor, models: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse NaN and infinities, and say which model brought them."""
    if is_finite(merged):
        return
    culprit = next((label for label, tensor in models if not is_finite(tensor)), None)
    cause = f"{culprit} has them already" if culprit else "no model has them: the settings make the values overflow"
    raise ValueError(f"the merged tensor {name} must be finite, but has NaN or infinite values ({cause})")


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite, by the largest bits with either sign: a sixth of the time of isfinite."""
    if not tensor.numel() or not tensor.dtype.is_floating_point:
        return True
    kind, infinity = _BITS[tensor.dtype]
    bits = tensor.detach().view(kind).numpy(force=True)
    negative = 1 << 8 * bits.itemsize - 1
    return int(bits.max()) < infinity and int(bits.view(f"u{bits.itemsize}").max()) < negative | infinity


def spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _mismatch(name: str, reference: TensorLike, label: str, tensor: TensorLike) -> Iterator[str]:
    expected, shape = tuple(reference.shape), tuple(tensor.shape)
    if shape != expected:
        yield f"{name} must have the base's shape {expected}, but has {shape} in {label}"
    if reference.dtype.is_floating_point != tensor.dtype.is_floating_point:
        yield f"{name} is {spelled(reference.dtype)} in the base, but {spelled(tensor.dtype)} in {label}"


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
