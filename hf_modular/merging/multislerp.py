"""Multi-SLERP, interpolation of any number of models on a sphere (mergekit; goddard.blog; no paper).

    with dᵢ = Wᵢ - W₀, or Wᵢ without a base, each tensor as one vector, and uᵢ = dᵢ / ‖dᵢ‖:
    m = Σᵢ wᵢ uᵢ,   d = (Σᵢ wᵢ ‖dᵢ‖) m / ‖m‖,   W = W₀ + d

mergekit's algorithm projects the uᵢ on the tangent space at m / ‖m‖, averages them there and returns to the sphere. At
that point the average is Σᵢ wᵢ uᵢ less its part along m, which is 0 but for rounding errors: the formula above is what
is left. Where directions cancel out, ‖m‖ = 0, W = W₀ + Σᵢ wᵢ dᵢ, as in mergekit with two models; with more it fails.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hf_modular.merging._gram import GeometricMethod, lengths
from hf_modular.merging._method import total_weight


@dataclass(frozen=True)
class MultiSLERPConfig(GeometricMethod):
    """The mean direction of the models or task vectors, in their mean length."""

    name: ClassVar[str] = "multislerp"
    base_model: ClassVar[Literal["required", "optional", "unused"]] = "optional"

    normalize_weights: bool = field(default=True, metadata={"help": "Divide the weights by their sum."})
    eps: float = field(
        default=1e-8,
        metadata={"help": "The length of their mean below which directions cancel out.", "law": "[0, inf)"},
    )

    def coefficients(self, inner: Tensor, weights: Tensor) -> Tensor:  # (n, n) -> (n,)
        if self.normalize_weights:
            weights = weights / total_weight(weights)
        length = lengths(inner)
        mean = torch.where(length > 0, weights / length, 0)
        norm = (mean @ inner @ mean).clamp(min=0).sqrt()
        return mean * (weights @ length) / norm if norm > 0 and norm >= self.eps else weights
