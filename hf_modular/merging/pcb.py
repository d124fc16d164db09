"""PCB-Merging, parameter competition balancing (Du et al., arXiv 2410.02396, NeurIPS 2024).

For n models and dᵢ = Wᵢ - W₀, where clip is to the quantiles winsor and 1 - winsor and mm(x) = (x - min)/(max - min):

    tᵢ = sign(dᵢ) clip |dᵢ|,   uᵢ = sign(dᵢ) mm(clip |dᵢ|)
    intra-balancing   Iᵢ = exp(n uᵢ²)                                    (equation 1)
    inter-balancing   Xᵢ = Σⱼ tanh(uᵢ uⱼ), or with "raw" tanh(dᵢ Σⱼ dⱼ)   (equation 2)
    drop and rescale  sᵢ = mm(max(Iᵢ Xᵢ, its quantile 1 - density))      (equations 3, 4)
    W = W₀ + λ Σᵢ wᵢ sᵢ tᵢ / Σᵢ sᵢ                                       (equation 5)

With `drop` dᵢ is thinned by DARE first: mᵢ ⊙ (Wᵢ - W₀)/(1 - drop), mᵢ ~ Bernoulli(1 - drop) for each element.

An element that no model keeps is the base's. There is no vote on signs: where models disagree, products are negative
and fall below the quantile. The paper writes softmax, which underflows over a whole model; its code has exp and tanh
as above. "scale_invariant" is that of its evolutionary variant and closest to the paper, "raw" (with winsor=1e-4 or
0.01) that of its other scripts. Quantiles are elements: numbers ⌊D winsor⌋, ⌊D (1 - winsor)⌋ - 1 and
⌊D (1 - density)⌋ of D, from 0 and by size, of the whole model, or of each tensor with scope="tensor".

Ours: mm of what does not vary is 0, not 0/0; exp(n (uᵢ² - 1)) takes the place of exp(n uᵢ²), which overflows for many
models (sᵢ is the same); `scope`; quantiles that are exact for models larger than memory.
"""

import functools
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from hf_modular.merging._method import MergeMethod, Stack, Stacks, weighted_sum
from hf_modular.merging._select import order_statistics


class Range(NamedTuple):
    """What is clipped and normalised, the ends of each model."""

    low: Tensor  # (n, 1)
    high: Tensor  # (n, 1)

    @classmethod
    def of(cls, ends: list[list[float]]) -> Self:
        return cls(*torch.tensor(ends, dtype=torch.float64).T[:, :, None])

    def clip(self, x: Tensor) -> Tensor:  # (n, size)
        return x.maximum(self.low.to(x)).minimum(self.high.to(x))

    def normalize_(self, x: Tensor) -> Tensor:  # (n, size)
        """mm(clip x), in the memory of x."""
        return x.sub_(self.low.to(x)).mul_(self.factor.to(x)).clamp_(0, 1)

    @property
    def factor(self) -> Tensor:  # (n, 1)
        width = self.high - self.low
        return torch.where(width > 0, width.reciprocal().clamp_(max=1e38), 0)


class Survey(NamedTuple):
    """The ranges of |dᵢ| and of Iᵢ Xᵢ."""

    sizes: Range
    scores: Range


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
    drop: float = field(
        default=0.0, metadata={"help": "The share of each task vector that DARE drops first.", "law": "[0, 1)"}
    )

    @property
    def elementwise(self) -> bool:
        return True

    @property
    def survey_scope(self) -> Literal["model", "tensor"]:
        return "model" if self.scope == "global" else "tensor"

    def survey(self, stacks: Stacks) -> Survey:
        sizes = Range.of(order_statistics(stacks, lambda stack: self._deltas(stack).abs_(), self._clipped_ranks))
        scores = order_statistics(stacks, lambda stack: self._scores(self._deltas(stack), sizes), self._kept_ranks)
        return Survey(sizes, Range.of(scores))

    def merge(self, stack: Stack, survey: Survey) -> Tensor:
        return torch.cat([self._merged(run, survey) for run in stack.runs()]).view_as(stack.base)

    def facts(self, survey: Survey) -> dict[str, Any]:
        return {
            name: [[float(end) for end in ends] for ends in zip(of.low, of.high, strict=True)]
            for name, of in survey._asdict().items()
        }

    def _merged(self, stack: Stack, survey: Survey) -> Tensor:  # (size,)
        deltas = self._deltas(stack)
        shares = survey.scores.normalize_(self._scores(deltas, survey.sizes))
        clipped = survey.sizes.clip(deltas.abs()).mul_(deltas.sign_())
        mixed = weighted_sum(stack.weights, clipped.mul_(shares))
        return mixed.div_(_sum(shares).clamp_(min=1e-12)).mul_(self.scale).add_(stack.base)

    def _deltas(self, stack: Stack) -> Tensor:  # (n, size)
        deltas = stack.deltas
        if self.drop:
            for i, delta in enumerate(deltas):
                delta.mul_(stack.bernoulli(i, 1 - self.drop)).mul_(1 / (1 - self.drop))
        return deltas

    def _scores(self, deltas: Tensor, sizes: Range) -> Tensor:  # (n, size)
        """Iᵢ Xᵢ / exp(n)"""
        u = sizes.normalize_(deltas.abs()).copysign_(deltas)
        agreement = _agreement(u) if self.variant == "scale_invariant" else (deltas * _sum(deltas)).tanh_()
        return agreement.mul_(u.square_().sub_(1).mul_(len(u)).exp_())

    def _clipped_ranks(self, count: int) -> tuple[int, int]:
        first = int(count * self.winsor)
        return first, max(int(count * (1 - self.winsor)) - 1, first)

    def _kept_ranks(self, count: int) -> tuple[int, int]:
        last = max(count - 1, 0)
        return min(int(count * (1 - self.density)), last), last


def _agreement(u: Tensor) -> Tensor:  # (n, size)
    """Σⱼ tanh(uᵢ uⱼ)"""
    sums = torch.empty_like(u)
    for i in range(len(u)):
        terms = (u[: i + 1] * u[i]).tanh_()  # of j ≤ i, each of them for i and for j
        sums[i] = _sum(terms)
        sums[:i] += terms[:i]
    return sums


def _sum(rows: Tensor) -> Tensor:  # (size,)
    """Row by row, so that it does not depend on the size how it is rounded."""
    return functools.reduce(torch.add, rows[1:], rows[0].clone())
