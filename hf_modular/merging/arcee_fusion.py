"""Arcee Fusion: the base with the changes of one model that matter most (Arcee AI, in mergekit; no paper).

    q, p = softmax of a row of W₀, of W₁;   KL = Σ (p + ε) log((p + ε) / (q + ε)),   ε = 1e-8
    importance = |W₁ - W₀| KL of its row,   W = W₁ where it is at least median + 1.5 (Q₃ - Q₁), else W₀

Rows run along the last axis. The quartiles are elements: numbers ⌊q (D - 1)⌋ of the D of a tensor in order. mergekit
takes them from a million elements drawn at random if there are more; they are those of all here. The divergence of
rows as near to each other as in a fine-tune is below the rounding errors of fp32, in which mergekit computes it: fp64
here.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_modular.merging._method import BLOCK, MergeMethod, Stack

_EPSILON = 1e-8


@dataclass(frozen=True)
class ArceeFusionConfig(MergeMethod):
    """The base, and the most important changes of another model."""

    name: ClassVar[str] = "arcee_fusion"
    model_counts: ClassVar[tuple[int, float]] = (1, 1)
    takes_weights: ClassVar[bool] = False

    def merge(self, stack: Stack, survey: Any) -> Tensor:
        delta = stack.models[0] - stack.base
        if not delta.numel():
            return delta
        importance = delta.abs().mul_(_divergence(stack.models[0], stack.base))
        return delta.masked_fill_(importance < _threshold(importance), 0).add_(stack.base)


def _divergence(model: Tensor, base: Tensor) -> Tensor:  # (*rows, d) -> (*rows, 1)
    """The KL divergence of each row."""
    rows = model.reshape(-1, model.shape[-1] if model.dim() else 1)
    at_once = max(BLOCK // rows.shape[1], 1)
    parts = zip(rows.split(at_once), base.reshape(rows.shape).split(at_once), strict=True)
    found = [_kl(*(part.double().softmax(dim=-1).add_(_EPSILON) for part in pair)) for pair in parts]
    return torch.cat(found).to(model).view((*model.shape[:-1], *[1] * (model.dim() > 0)))


def _kl(p: Tensor, q: Tensor) -> Tensor:  # (rows, d) -> (rows, 1)
    return (p / q).log_().mul_(p).sum(dim=-1, keepdim=True)


def _threshold(importance: Tensor) -> float:
    """By selection, which needs no order of the rest."""
    numbers = importance.flatten().numpy(force=True).copy()
    places = [int(quarter * (numbers.size - 1) / 4) for quarter in (1, 2, 3)]
    numbers.partition(places)
    first, median, third = numbers[places]
    return float(median + 1.5 * (third - first))
