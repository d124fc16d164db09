"""How each kind of layer stores its weight, and the way to (out, in, *kernel) and back.

An offset covers norms that multiply by `1 + weight` (Gemma's): their canonical weight is what they multiply by.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from transformers.pytorch_utils import Conv1D


def _same(weight: Tensor) -> Tensor:
    return weight


def _transposed(weight: Tensor) -> Tensor:
    return weight.transpose(0, 1)


def _deconv_canonical(groups: int, weight: Tensor) -> Tensor:  # (in, out / groups, *k) -> (out, in / groups, *k)
    split = weight.unflatten(0, (groups, -1))
    return split.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class Layout:
    """The way between a layer's own weight and the canonical one."""

    kind: str  # "Linear", "Conv", "Embedding" or "Norm"
    channel: int  # the axis of the output that holds the channels
    to_canonical: Callable[[Tensor], Tensor] = _same
    to_stored: Callable[[Tensor], Tensor] = _same
    offset: float = 0.0

    def canonical(self, weight: Tensor) -> Tensor:
        weight = self.to_canonical(weight)
        return weight + self.offset if self.offset else weight

    def stored(self, weight: Tensor) -> Tensor:
        weight = weight - self.offset if self.offset else weight
        return self.to_stored(weight)


LINEAR = Layout("Linear", -1)


def layout_of(layer: Any, name: str) -> Layout:
    """The layout of `layer`.

    Raises:
        TypeError: If the layer is of a kind that cannot be adapted; the message names it.
    """
    if layer._parameters.get("weight") is None:
        raise TypeError(
            f"Layer '{name}' ({type(layer).__name__}) has no weight of its own, or computes it (as a parametrised "
            "layer does): it cannot be adapted."
        )
    for kinds, make in _KINDS:
        if isinstance(layer, kinds):
            return make(layer, name)
    if layer.weight.ndim == 1 and "norm" in type(layer).__name__.lower():
        return Layout("Norm", -1, offset=_norm_offset(layer, name))
    raise TypeError(
        f"Layer '{name}' is a {type(layer).__name__}, which cannot be adapted. Supported are Linear, Conv1D (GPT-2), "
        "Conv1d/2d/3d and their transposes, Embedding, and norms with a weight. Leave it out of `target_modules`, "
        "or name it in `exclude_modules`."
    )


def is_supported(layer: nn.Module) -> bool:
    """Whether the layer is of a kind that is known by its class."""
    return any(isinstance(layer, kinds) for kinds, _ in _KINDS)


def is_plain(layer: nn.Module) -> bool:
    """Whether the layer does what its kind says and no more: no forward of its own, no deconvolution."""
    return type(layer).forward in _PLAIN


def _conv(layer: Any, name: str) -> Layout:
    return Layout("Conv", -1 - (layer.weight.ndim - 2))


def _deconv(layer: Any, name: str) -> Layout:
    there = partial(_deconv_canonical, layer.groups)  # it is its own inverse, the sides being swapped
    return Layout("Conv", -1 - (layer.weight.ndim - 2), there, there)


def _embedding(layer: Any, name: str) -> Layout:
    if layer.max_norm is not None:
        raise TypeError(f"Embedding '{name}' has max_norm={layer.max_norm}, which rewrites its weight in forward.")
    return Layout("Embedding", -1, _transposed, _transposed)


def _layer_norm(layer: Any, name: str) -> Layout:
    if layer.weight.ndim != 1:
        raise TypeError(f"Norm '{name}' normalises over {layer.weight.ndim} axes; only one is supported.")
    return Layout("Norm", -1)


def _channel_norm(layer: Any, name: str) -> Layout:
    return Layout("Norm", 1)


_KINDS: list[tuple[tuple[type[nn.Module], ...], Callable[[nn.Module, str], Layout]]] = [
    ((Conv1D,), lambda layer, name: Layout("Linear", -1, _transposed, _transposed)),
    ((nn.Linear,), lambda layer, name: LINEAR),
    ((nn.Embedding,), _embedding),
    ((_ConvTransposeNd,), _deconv),
    ((_ConvNd,), _conv),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    ((_BatchNorm, _InstanceNorm, nn.GroupNorm), _channel_norm),
]


_PLAIN = {kind.forward for kind in (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)}


@torch.no_grad()
def _norm_offset(layer: Any, name: str) -> float:
    """0 if a norm of unknown class multiplies by its weight, 1 if by 1 + weight; found by running it."""
    x = torch.linspace(-1.0, 2.0, layer.weight.numel()).unsqueeze(0)
    bias = {} if getattr(layer, "bias", None) is None else {"bias": torch.zeros_like(layer.bias, device="cpu").float()}

    def run(value: float) -> Tensor:
        tensors = {"weight": torch.full_like(x[0], value), **bias}
        y = torch.func.functional_call(layer, tensors, (x,))
        if not isinstance(y, Tensor) or y.shape != x.shape:
            raise TypeError(f"Norm '{name}' ({type(layer).__name__}) does not map a tensor to one of its shape.")
        return y

    zero, one, two = run(0.0), run(1.0), run(2.0)
    for offset, unit in ((0.0, one), (1.0, zero)):
        if torch.allclose(zero, offset * unit) and torch.allclose(two, (2.0 + offset) * unit, rtol=1e-3):
            return offset
    raise TypeError(
        f"Norm '{name}' ({type(layer).__name__}) multiplies neither by its weight nor by 1 + weight; "
        "it cannot be adapted."
    )
