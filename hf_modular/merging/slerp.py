"""Spherical linear interpolation between two models (Shoemake, SIGGRAPH 1985), each tensor as one vector.

    θ = the angle between a and b,   W = (sin((1 - t) θ) a + sin(t θ) b) / sin θ

a is the base, if there is one, else the first model, and b the other. Where |cos θ| > threshold, W = (1 - t) a + t b:
mergekit's choice, as is its threshold of 0.9995, which fine-tunes of one base mostly exceed; with 1 only parallel
tensors are interpolated on a line. A tensor of zeros is at a right angle to all others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from hf_modular.merging._gram import PARALLEL, GeometricMethod, arc
from hf_modular.merging._method import Stack


@dataclass(frozen=True)
class SLERPConfig(GeometricMethod):
    """A point on the arc from the base, or the first model, to the other model."""

    name: ClassVar[str] = "slerp"
    base_model: ClassVar[Literal["required", "optional", "unused"]] = "optional"
    model_counts: ClassVar[tuple[int, float]] = (1, 2)
    takes_weights: ClassVar[bool] = False
    around_base: ClassVar[bool] = False

    t: float = field(default=0.5, metadata={"help": "How far to go: 0 is the first model.", "law": "[0, 1]"})
    threshold: float = field(
        default=0.9995, metadata={"help": "The |cos θ| beyond which the way is straight.", "law": "[0, 1]"}
    )

    def vectors(self, stack: Stack) -> Sequence[Tensor]:  # twice (*shape)
        ends = [stack.base, *stack.models] if stack.has_base else [*stack.models]
        if len(ends) != 2:
            raise ValueError(f"slerp goes from one model to another, the base being one, but got {len(ends)}")
        return ends

    def coefficients(self, inner: Tensor, weights: Tensor) -> Tensor:  # (2, 2) -> (2,)
        return arc(self.t, inner, min(self.threshold, PARALLEL))
