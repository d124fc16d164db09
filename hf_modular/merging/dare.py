"""DARE, drop and rescale (Yu et al., arXiv 2311.03099), followed by task arithmetic.

    dᵢ = Wᵢ - W₀,   mᵢ ~ Bernoulli(1 - p) for each element,   d̂ᵢ = c mᵢ ⊙ dᵢ,   W = W₀ + λ Σᵢ wᵢ d̂ᵢ

`rescale="inverse"` is the paper's c = 1/(1 - p) (equation 2), which keeps the expectation; "norm" is
mergekit's c = ‖dᵢ‖₁ / ‖mᵢ ⊙ dᵢ‖₁ for each tensor, which keeps the norm of what was drawn; "none" is c = 1.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hf_modular.merging._method import Alias, MergeMethod, Stack, Stacks, total_weight, weighted_sum


@dataclass(frozen=True)
class DAREConfig(MergeMethod):
    """Task arithmetic with randomly thinned task vectors."""

    name: ClassVar[str] = "dare"
    aliases: ClassVar[dict[str, Alias]] = {
        "dare_linear": Alias(
            defaults={"drop": 0.0, "rescale": "norm"},
            keys={
                "density": ("drop", lambda density: 1 - density),
                "rescale": ("rescale", {True: "norm", False: "none"}.__getitem__),
            },
        )
    }

    drop: float = field(
        default=0.9,
        metadata={
            "help": "p, the share of each task vector that is dropped.",
            "law": "[0, 1)",
            "per_model": True,
        },
    )
    scale: float = field(default=1.0, metadata={"help": "λ, applied to the sum of the task vectors."})
    rescale: Literal["inverse", "norm", "none"] = field(
        default="inverse",
        metadata={"help": "What the kept part is multiplied by: 1/(1 - p), the ratio of the L1 norms, or nothing."},
    )
    normalize: bool = field(default=False, metadata={"help": "Divide the sum by the sum of the weights."})

    @property
    def elementwise(self) -> bool:
        return True

    @property
    def survey_scope(self) -> Literal["model", "tensor"]:
        return "tensor"

    def survey(self, stacks: Stacks) -> list[float] | None:
        """c for each model, where it is the ratio of the norms before and after."""
        if self.rescale != "norm":
            return None
        before, after = zip(*stacks.map(self._norms), strict=True)
        return [_ratio(*norms) for norms in zip(_totals(before), _totals(after), strict=True)]

    def merge(self, stack: Stack, survey: list[float] | None) -> Tensor:
        drops = stack.each("drop", self.drop)
        factors = [self._factor(drop) for drop in drops] if survey is None else survey
        weights = (float(weight) * factor for weight, factor in zip(stack.weights, factors, strict=True))
        mixed = weighted_sum(weights, self._thinned(stack))
        scale = self.scale / total_weight(stack.weights) if self.normalize else self.scale
        return mixed.mul_(scale).add_(stack.base)

    def _thinned(self, stack: Stack) -> Iterator[Tensor]:  # n times (*shape)
        """mᵢ ⊙ dᵢ"""
        for i, drop in enumerate(stack.each("drop", self.drop)):
            yield (stack.models[i] - stack.base).mul_(stack.bernoulli(i, 1 - drop))

    def _factor(self, drop: float) -> float:
        return 1 / (1 - drop) if self.rescale == "inverse" else 1.0

    def _norms(self, stack: Stack) -> tuple[list[float], list[float]]:
        """‖dᵢ‖₁ and ‖mᵢ ⊙ dᵢ‖₁ of each model."""
        return [_l1(delta) for delta in stack.deltas], [_l1(delta) for delta in self._thinned(stack)]


def _l1(x: Tensor) -> float:
    return float(x.abs().sum(dtype=torch.float64))


def _totals(norms: Iterable[list[float]]) -> list[float]:
    """The norms of a tensor's parts, summed for each model without rounding."""
    return [math.fsum(parts) for parts in zip(*norms, strict=True)]


def _ratio(before: float, after: float) -> float:
    return before / after if after > 0 else 1.0
