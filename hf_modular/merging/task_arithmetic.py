"""Task arithmetic (Ilharco et al., arXiv 2212.04089).

    W = W₀ + λ Σᵢ wᵢ (Wᵢ - W₀)

A negative weight takes a task away. `normalize` divides the sum by Σᵢ wᵢ, as mergekit's option does.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from hf_modular.merging._method import MergeMethod, Stack, total_weight, weighted_sum


@dataclass(frozen=True)
class TaskArithmeticConfig(MergeMethod):
    """The base plus the scaled sum of the task vectors."""

    name: ClassVar[str] = "task_arithmetic"
    in_fp64: ClassVar[bool] = True

    scale: float = field(default=1.0, metadata={"help": "λ, applied to the sum of the task vectors."})
    normalize: bool = field(default=False, metadata={"help": "Divide the sum by the sum of the weights."})

    @property
    def elementwise(self) -> bool:
        return True

    def merge(self, stack: Stack, survey: Any) -> Tensor:
        mixed = weighted_sum(stack.weights, stack.task_vectors())
        scale = self.scale / total_weight(stack.weights) if self.normalize else self.scale
        return (mixed if scale == 1 else mixed.mul_(scale)).add_(stack.base)
