"""Weighted averaging, "model soups" (Wortsman et al., arXiv 2203.05482).

    W = Σᵢ wᵢ Wᵢ / Σᵢ wᵢ

Without `normalize` the sum is not divided. No base takes part, unless it is listed among the models.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from hf_modular.merging._method import MergeMethod, Stack, total_weight, weighted_sum


@dataclass(frozen=True)
class LinearConfig(MergeMethod):
    """Weighted average of the models."""

    name: ClassVar[str] = "linear"
    base_model: ClassVar[Literal["required", "optional", "unused"]] = "unused"
    in_fp64: ClassVar[bool] = True

    normalize: bool = field(default=True, metadata={"help": "Divide by the sum of the weights."})

    @property
    def elementwise(self) -> bool:
        return True

    def merge(self, stack: Stack, survey: Any) -> Tensor:
        mixed = weighted_sum(stack.weights, stack.models)
        return mixed.div_(total_weight(stack.weights)) if self.normalize else mixed
