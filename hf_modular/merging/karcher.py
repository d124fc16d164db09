"""Karcher mean of the models on a sphere, each tensor as one vector (Wang et al., arXiv 2603.04972).

    uᵢ = Wᵢ / ‖Wᵢ‖,   m ← exp_m(Σᵢ αᵢ log_m(uᵢ)) until it moves less than tol,   W = (Σᵢ αᵢ ‖Wᵢ‖) m,   αᵢ = wᵢ / Σⱼ wⱼ

m begins in the direction of Σᵢ αᵢ uᵢ. It is a combination of the uᵢ, and the iteration one on n coefficients, which
costs nothing: it goes on until it has converged, where mergekit's, also that of "karcher" in a recipe, ends after 10
steps or at 1e-5. mergekit has no weights here, αᵢ = 1/n. Tensors of zeros have no direction and count in the length
only. Where directions cancel out there is no mean and W = Σᵢ αᵢ Wᵢ; mergekit begins with the first of them.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hf_modular.merging._gram import GeometricMethod, cosines, lengths
from hf_modular.merging._method import Alias, total_weight


@dataclass(frozen=True)
class KarcherConfig(GeometricMethod):
    """The mean of the models on a sphere, in their mean length."""

    name: ClassVar[str] = "karcher"
    base_model: ClassVar[Literal["required", "optional", "unused"]] = "unused"
    around_base: ClassVar[bool] = False
    aliases: ClassVar[dict[str, Alias]] = {"karcher": Alias({"max_iter": 10, "tol": 1e-5})}

    max_iter: int = field(default=1000, metadata={"help": "The largest number of steps.", "law": "[0, inf)"})
    tol: float = field(
        default=1e-7, metadata={"help": "The angle, in radians, at which the mean has converged.", "law": "(0, inf)"}
    )

    def coefficients(self, inner: Tensor, weights: Tensor) -> Tensor:  # (n, n) -> (n,)
        weights = weights / total_weight(weights)
        length, cosine = lengths(inner), cosines(inner)
        directed = torch.where(length > 0, weights, 0)
        directed = directed / (float(directed.sum()) or 1.0)
        if _norm(directed, cosine) < self.tol:
            return weights
        mean = self._mean(cosine, directed)
        return torch.where(length > 0, (weights @ length) * mean / length, 0)

    def _mean(self, cosine: Tensor, weights: Tensor) -> Tensor:  # (n, n), (n,) -> (n,)
        """The coefficients of the uᵢ in m."""
        mean = weights / _norm(weights, cosine)
        for _ in range(self.max_iter):
            along = (cosine @ mean).clamp(-1, 1)
            angle = along.acos()
            pull = torch.where(angle.sin() > self.tol, weights * angle / angle.sin(), 0)
            tangent = pull - (pull @ along) * mean
            step = _norm(tangent, cosine)
            if step < self.tol:
                break
            mean = step.cos() * mean + step.sin() / step * tangent
            mean = mean / _norm(mean, cosine)
        return mean


def _norm(x: Tensor, cosine: Tensor) -> Tensor:  # (n,), (n, n) -> ()
    """‖Σᵢ xᵢ uᵢ‖"""
    return (x @ cosine @ x).clamp(min=0).sqrt()
