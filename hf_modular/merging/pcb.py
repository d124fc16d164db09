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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softshrink

from hf_modular.merging._consensus import summed
from hf_modular.merging._method import MergeMethod, Stack, Stacks, weighted_sum
from hf_modular.merging._select import order_statistics


class Range(NamedTuple):
    """To what a model's numbers are clipped."""

    low: float
    high: float

    def clip(self, x: Tensor) -> Tensor:  # (size,)
        """sign(x) clip |x|"""
        return x.abs().clamp_(*self).mul_(x.sign())

    def balance(self, x: Tensor) -> Tensor:  # (size,)
        """sign(x) mm(clip |x|)"""
        return softshrink(x, self.low).mul_(self.factor).clamp_(-1, 1)

    def normalize_(self, x: Tensor) -> Tensor:  # (size,)
        """mm(clip x), in the memory of x."""
        return x.sub_(self.low).mul_(self.factor).clamp_(0, 1)

    @property
    def factor(self) -> float:
        return min(1 / (self.high - self.low), 1e38) if self.high > self.low else 0.0


class Survey(NamedTuple):
    """The ranges of |dᵢ| and of Iᵢ Xᵢ, those of each model."""

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
        ends = order_statistics(stacks, lambda stack: map(Tensor.abs_, self._deltas(stack)), self._clipped_ranks)
        sizes = [Range(*pair) for pair in ends]
        ends = order_statistics(stacks, lambda stack: self._scores([*self._deltas(stack)], sizes), self._kept_ranks)
        return Survey(sizes, [Range(*pair) for pair in ends])

    def merge(self, stack: Stack, survey: Survey) -> Tensor:
        deltas = [*self._deltas(stack)]
        scores = self._scores(deltas, survey.sizes)
        shares = [ends.normalize_(score) for ends, score in zip(survey.scores, scores, strict=True)]
        total = summed(shares).clamp_(min=1e-12)
        kept = zip(survey.sizes, deltas, shares, strict=True)
        terms = (ends.clip(delta).mul_(share) for ends, delta, share in kept)
        return weighted_sum(stack.weights, terms).div_(total).mul_(self.scale).add_(stack.base)

    def facts(self, survey: Survey) -> dict[str, Any]:
        return {name: [[*ends] for ends in of] for name, of in survey._asdict().items()}

    def _deltas(self, stack: Stack) -> Iterator[Tensor]:  # n times (size,)
        for i, delta in enumerate(stack.deltas.unbind()):
            if self.drop:
                delta.mul_(stack.bernoulli(i, 1 - self.drop)).mul_(1 / (1 - self.drop))
            yield delta

    def _scores(self, deltas: Sequence[Tensor], sizes: Sequence[Range]) -> list[Tensor]:  # n times (size,)
        """Iᵢ Xᵢ / exp(n)"""
        balanced = [ends.balance(delta) for ends, delta in zip(sizes, deltas, strict=True)]
        scores = _agreement(balanced) if self.variant == "scale_invariant" else _raw_agreement(deltas)
        for u, score in zip(balanced, scores, strict=True):
            score.mul_(_exp_(u.square_().sub_(1).mul_(len(deltas))))
        return scores

    def _clipped_ranks(self, count: int) -> tuple[int, int]:
        first = int(count * self.winsor)
        return first, max(int(count * (1 - self.winsor)) - 1, first)

    def _kept_ranks(self, count: int) -> tuple[int, int]:
        last = max(count - 1, 0)
        return min(int(count * (1 - self.density)), last), last


def _agreement(balanced: Sequence[Tensor]) -> list[Tensor]:  # n times (size,)
    """Σⱼ tanh(uᵢ uⱼ)"""
    sums: list[Tensor] = []
    term = torch.empty_like(balanced[0])
    for u in balanced:
        own = _tanh_(u * u)
        for other, its_sum in zip(balanced, sums, strict=False):  # each term is of two sums
            _tanh_(torch.mul(u, other, out=term))
            own.add_(term)
            its_sum.add_(term)
        sums.append(own)
    return sums


def _raw_agreement(deltas: Sequence[Tensor]) -> list[Tensor]:  # n times (size,)
    """tanh(dᵢ Σⱼ dⱼ)"""
    total = summed(deltas)
    return [_tanh_(delta * total) for delta in deltas]


def _tanh_(x: Tensor) -> Tensor:
    return _numpys(np.tanh, x) if x.device.type == "cpu" else x.tanh_()


def _exp_(x: Tensor) -> Tensor:
    return _numpys(np.exp, x) if x.device.type == "cpu" else x.exp_()


def _numpys(function: np.ufunc, x: Tensor) -> Tensor:
    """numpy's function in the place of x: its tanh takes a tenth of the time of torch's, its exp half."""
    function(x.numpy(), out=x.numpy())
    return x
