"""Model Stock: from the base towards the mean of the models, as far as they agree (Jang et al., arXiv 2403.19522).

    dᵢ = Wᵢ - W₀,   c = the mean cosine between two of the dᵢ,   t = n c / (1 + (n - 1) c),   W = W₀ + t/n Σᵢ dᵢ

As in the paper there is a c for each layer, here for each tensor; `filter_wise` has one for each index of a tensor's
first axis, where mergekit's has one for each run along the last, which is the same for matrices. The derivation is for
c ≥ 0: where the models disagree, W is the base's, unless `extrapolate`, as mergekit does, moves away from their mean.
mergekit also takes products of two lengths for 1e-6 at least, so that c is too small where the models have hardly
moved: `length_floor`. "model_stock" in a recipe has both.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hf_modular.merging._gram import GeometricMethod, cosines
from hf_modular.merging._method import Alias


@dataclass(frozen=True)
class ModelStockConfig(GeometricMethod):
    """The base, moved towards the mean of the models as far as their angles allow."""

    name: ClassVar[str] = "model_stock"
    model_counts: ClassVar[tuple[int, float]] = (2, math.inf)
    takes_weights: ClassVar[bool] = False
    aliases: ClassVar[dict[str, Alias]] = {"model_stock": Alias({"extrapolate": True, "length_floor": 1e-6})}

    filter_wise: bool = field(default=False, metadata={"help": "Take each index of the first axis for itself."})
    extrapolate: bool = field(default=False, metadata={"help": "Move away from the mean of models that disagree."})
    length_floor: float = field(
        default=0.0, metadata={"help": "The smallest product of two lengths to divide by.", "law": "[0, inf)"}
    )

    @property
    def takes_apart(self) -> bool:
        return self.filter_wise

    def axes(self, dim: int) -> tuple[int, ...]:
        return tuple(range(1, dim)) if dim > 1 else tuple(range(dim))

    def coefficients(self, inner: Tensor, weights: Tensor) -> Tensor:  # (*parts, n, n) -> (*parts, n)
        n = len(weights)
        i, j = torch.triu_indices(n, n, offset=1)
        cosine = cosines(inner, self.length_floor)[..., i, j].mean(dim=-1, keepdim=True)
        divisor = 1 + (n - 1) * cosine
        t = torch.where(divisor.abs() < 1e-6, 0, n * cosine / divisor)
        return (t if self.extrapolate else t.where(cosine > 0, 0)).expand(inner.shape[:-1]) / n
