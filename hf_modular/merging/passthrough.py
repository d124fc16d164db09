"""One model as it is, or scaled: W = scale · W₁. In mergekit it serves to stack layers of several models."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from hf_modular.merging._method import MergeMethod, Stack


@dataclass(frozen=True)
class PassthroughConfig(MergeMethod):
    """One model, unchanged or scaled."""

    name: ClassVar[str] = "passthrough"
    base_model: ClassVar[Literal["required", "optional", "unused"]] = "unused"
    model_counts: ClassVar[tuple[int, float]] = (1, 1)
    takes_weights: ClassVar[bool] = False

    scale: float = field(default=1.0, metadata={"help": "What every element is multiplied by.", "per_model": True})

    @property
    def elementwise(self) -> bool:
        return True

    def merge(self, stack: Stack, survey: Any) -> Tensor:
        return stack.models[0] * stack.each("scale", self.scale)[0]
