"""PCB-Merging, parameter competition balancing (Du et al., arXiv 2410.02396, NeurIPS 2024).

For n models and dᵢ = Wᵢ - W₀, where clip is to the quantiles winsor and 1 - winsor and mm(x) = (x - min)/(max - min):

    tᵢ = sign(dᵢ) clip |dᵢ|,   uᵢ = sign(dᵢ) mm(clip |dᵢ|)
    intra-balancing   Iᵢ = exp(n uᵢ²)                                    (equation 1)
    inter-balancing   Xᵢ = Σⱼ tanh(uᵢ uⱼ), or with "raw" tanh(dᵢ Σⱼ dⱼ)   (equation 2)
    drop and rescale  sᵢ = mm(max(Iᵢ Xᵢ, its quantile 1 - density))      (equations 3, 4)
    W = W₀ + λ Σᵢ wᵢ sᵢ tᵢ / Σᵢ sᵢ                                       (equation 5)

An element that no model keeps is the base's. There is no vote on signs: where models disagree, products are negative
and fall below the quantile. The paper writes softmax, which underflows over a whole model; its code has exp and tanh
as above. "scale_invariant" is that of its evolutionary variant and closest to the paper, "raw" (with winsor=1e-4 or
0.01) that of its other scripts. Quantiles are elements: numbers ⌊D winsor⌋, ⌊D (1 - winsor)⌋ - 1 and
⌊D (1 - density)⌋ of D, from 0 and by size, of the whole model, or of each tensor with scope="tensor".

Ours: mm of what does not vary is 0, not 0/0; exp(n (uᵢ² - 1)) takes the place of exp(n uᵢ²), which overflows for many
models (sᵢ is the same); `scope`; quantiles that are exact for models larger than memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from hf_modular.merging._method import MergeMethod, Stack, Stacks, weighted_sum
from hf_modular.merging._select import order_statistics


class Range(NamedTuple):
    """What is clipped and normalised, of one model."""

    low: float
    high: float

    def clip(self, x: Tensor) -> Tensor:  # (*shape)
        return x.clamp(self.low, self.high)

    def normalize(self, x: Tensor) -> Tensor:  # (*shape)
        """mm(clip x)"""
        if self.high <= self.low:
            return torch.zeros_like(x)
        return self.clip(x).sub_(self.low).div_(self.high - self.low)


class Survey(NamedTuple):
    """The ranges of |dᵢ| and of Iᵢ Xᵢ for each model."""

    sizes: list[Range]
    scores: list[Range]


@dataclass(frozen=True)
class PCBConfig(MergeMethod):
    """Task arithmetic in which the models compete for each element."""

    name: ClassVar[str] = "pcb"

    density: float = field(
        default=0.1, metadata={"help": "The share of each task vector that survives.", "law": "(0, 1]"}
    )
    scale: float = field(default=1.0, metadata={"help": "λ, applied to the balanced mean of the task vectors."})
    variant: Literal["scale_invariant", "raw"] = field(
        default="scale_invariant",
        metadata={"help": "Whether models are compared by their normalised or by their raw task vectors."},
    )
    winsor: float = field(
        default=0.01,
        metadata={"help": "The share of each task vector that is clipped at either end.", "law": "[0, 0.5)"},
    )
    scope: Literal["global", "tensor"] = field(
        default="global", metadata={"help": "Whether quantiles are those of the whole model or of each tensor."}
    )

    @property
    def elementwise(self) -> bool:
        return True

    @property
    def survey_scope(self) -> Literal["model", "tensor"]:
        return "model" if self.scope == "global" else "tensor"

    def survey(self, stacks: Stacks) -> Survey:
        sizes = _ranges(order_statistics(stacks, lambda stack: stack.deltas.abs_(), self._clipped_ranks))
        scores = order_statistics(stacks, lambda stack: self._scores(stack.deltas, sizes), self._kept_ranks)
        return Survey(sizes, _ranges(scores))

    def merge(self, stack: Stack, survey: Survey) -> Tensor:
        deltas = stack.deltas
        scores = zip(survey.scores, self._scores(deltas, survey.sizes), strict=True)
        shares = [kept.normalize(score) for kept, score in scores]
        clipped = (size.clip(d.abs()).mul_(d.sign()) for size, d in zip(survey.sizes, deltas, strict=True))
        mixed = weighted_sum(stack.weights, (t.mul_(s) for t, s in zip(clipped, shares, strict=True)))
        total = weighted_sum([1.0] * len(shares), shares).clamp_(min=1e-12)
        return mixed.div_(total).mul_(self.scale).add_(stack.base)

    def _scores(self, deltas: Tensor, sizes: list[Range]) -> Iterator[Tensor]:  # n times (*shape)
        """Iᵢ Xᵢ / exp(n)"""
        n = len(deltas)
        signed = [size.normalize(d.abs()).mul_(d.sign()) for size, d in zip(sizes, deltas, strict=True)]
        inter = _agreement(signed) if self.variant == "scale_invariant" else _raw_agreement(deltas)
        for u, x in zip(signed, inter, strict=True):
            yield x.mul_(u.square().sub_(1).mul_(n).exp_())

    def _clipped_ranks(self, count: int) -> tuple[int, int]:
        first = int(count * self.winsor)
        return first, max(int(count * (1 - self.winsor)) - 1, first)

    def _kept_ranks(self, count: int) -> tuple[int, int]:
        last = max(count - 1, 0)
        return min(int(count * (1 - self.density)), last), last


def _agreement(signed: list[Tensor]) -> list[Tensor]:  # n times (*shape)
    """Σⱼ tanh(uᵢ uⱼ)"""
    sums = [torch.zeros_like(u) for u in signed]
    for i, u in enumerate(signed):
        for j, v in enumerate(signed[: i + 1]):
            term = torch.tanh(u * v)
            sums[i] += term
            if j < i:
                sums[j] += term
    return sums


def _raw_agreement(deltas: Tensor) -> Iterator[Tensor]:  # n times (*shape)
    """tanh(dᵢ Σⱼ dⱼ)"""
    total = weighted_sum([1.0] * len(deltas), deltas)
    return ((d * total).tanh_() for d in deltas)


def _ranges(ends: list[list[float]]) -> list[Range]:
    return [Range(low, high) for low, high in ends]
