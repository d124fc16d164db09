"""DARE, drop and rescale (Yu et al., arXiv 2311.03099), followed by task arithmetic.

    dᵢ = Wᵢ - W₀,   mᵢ ~ Bernoulli(1 - p) for each element,   d̂ᵢ = c mᵢ ⊙ dᵢ,   W = W₀ + λ Σᵢ wᵢ d̂ᵢ

`rescale="inverse"` is the paper's c = 1/(1 - p) (equation 2), which keeps the expectation; "norm" is
mergekit's c = ‖dᵢ‖₁ / ‖mᵢ ⊙ dᵢ‖₁ for each tensor, which keeps the norm of what was drawn; "none" is c = 1.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hf_modular.merging._method import Alias, MergeMethod, Stack, total_weight, weighted_sum


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
        metadata={
            "help": "What the kept part is multiplied by: 1/(1 - p), the ratio of the L1 norms, or nothing."
        },
    )
    normalize: bool = field(default=False, metadata={"help": "Divide the sum by the sum of the weights."})

    @property
    def elementwise(self) -> bool:
        return self.rescale != "norm"

    def merge(self, stack: Stack, survey: Any) -> Tensor:
        drops = stack.each("drop", self.drop)
        thinned = (self._thin(stack, i, drop) for i, drop in enumerate(drops))
        mixed = weighted_sum(stack.weights, thinned)
        scale = self.scale / total_weight(stack.weights) if self.normalize else self.scale
        return mixed.mul_(scale).add_(stack.base)

    def _thin(self, stack: Stack, model: int, drop: float) -> Tensor:  # (*shape)
        delta = stack.models[model] - stack.base
        kept = delta * stack.bernoulli(model, 1 - drop)
        if self.rescale == "inverse":
            return kept.div_(1 - drop)
        if self.rescale == "norm" and (norm := _l1_norm(kept)) > 0:
            return kept.mul_(_l1_norm(delta) / norm)
        return kept


def _l1_norm(x: Tensor) -> float:
    return float(x.abs().sum(dtype=torch.float64))
