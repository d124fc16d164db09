"""NuSLERP, spherical interpolation of two models or of their task vectors (mergekit; no paper).

    t = w₂ / (w₁ + w₂),   θ = the angle between a and b,   (sin((1 - t) θ) a + sin(t θ) b) / sin θ

With a base, a and b are the task vectors Wᵢ - W₀, and W₀ is added; else they are the weights. With `flatten` a tensor
is one vector; else it has one along its last axis for each index of the others, or along its first with `row_wise`.
All as in mergekit, but for weights whose sum is 0: they are refused, not taken as equal.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from hf_modular.merging._gram import GeometricMethod, arc
from hf_modular.merging._method import Alias, total_weight


def _same(value: object) -> object:
    return value


@dataclass(frozen=True)
class NuSLERPConfig(GeometricMethod):
    """A point on the arc between two models, or between their task vectors."""

    name: ClassVar[str] = "nuslerp"
    base_model: ClassVar[Literal["required", "optional", "unused"]] = "optional"
    model_counts: ClassVar[tuple[int, float]] = (2, 2)
    aliases: ClassVar[dict[str, Alias]] = {
        "nuslerp": Alias(
            keys={
                "flatten": ("flatten", _same),
                "nuslerp_flatten": ("flatten", _same),
                "row_wise": ("row_wise", _same),
                "nuslerp_row_wise": ("row_wise", _same),
            }
        )
    }

    flatten: bool = field(default=True, metadata={"help": "Whether each tensor is one vector."})
    row_wise: bool = field(
        default=False, metadata={"help": "If it is not: whether vectors run along the first axis, not along the last."}
    )

    @property
    def takes_apart(self) -> bool:
        return not self.flatten

    def axes(self, dim: int) -> tuple[int, ...]:
        return ((0 if self.row_wise else dim - 1),) if dim else ()

    def coefficients(self, inner: Tensor, weights: Tensor) -> Tensor:  # (*parts, 2, 2) -> (*parts, 2)
        return arc(float(weights[1]) / total_weight(weights), inner)
