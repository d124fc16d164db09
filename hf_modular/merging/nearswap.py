"""NearSwap (alchemonaut, in the merge QuartetAnemoi-70B; no paper): the base moves towards a model, by t at most.

    W = W₀ + min(1, t / |W₁ - W₀|) (W₁ - W₀) = W₀ + clip(W₁ - W₀, -t, t)

Where the two are near each other the model's value takes the base's place.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from hf_modular.merging._method import MergeMethod, Stack


@dataclass(frozen=True)
class NearSwapConfig(MergeMethod):
    """The base, and another model where it is near."""

    name: ClassVar[str] = "nearswap"
    model_counts: ClassVar[tuple[int, float]] = (1, 1)
    takes_weights: ClassVar[bool] = False

    t: float = field(default=1e-4, metadata={"help": "How far an element may move.", "law": "[0, inf)"})

    @property
    def elementwise(self) -> bool:
        return True

    def merge(self, stack: Stack, survey: Any) -> Tensor:
        delta = stack.models[0] - stack.base
        step = delta.clamp(-self.t, self.t)
        return step.add_(delta.sub_(delta)).add_(stack.base)  # what is added is 0, or NaN that infinity would hide
