"""Grafting: only the elements that fine-tuning has moved most (Panigrahi et al., arXiv 2302.06600, ICML 2023).

    dᵢ = Wᵢ - W₀,   gᵢ = [|dᵢ| is among the density · D largest of D],   W = W₀ + Σᵢ wᵢ gᵢ ⊙ dᵢ

The paper's skills lie in few elements of a fine-tuned model. Its mask is learned, starting from the largest ones; this
is that start, which needs no data. (The authors keep 10⁻⁷ of the elements before they learn the mask and about 10⁻⁴
after; without learning it takes more.) The paper has one model; that several are grafted onto one base is ours, and
so is `scope="tensor"`. Elements as large as the last one that is kept are kept as well, all of them.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hf_modular.merging._method import MergeMethod, Stack, Stacks, weighted_sum
from hf_modular.merging._select import order_statistics


@dataclass(frozen=True)
class GraftConfig(MergeMethod):
    """The base with the elements that fine-tuning has moved most."""

    name: ClassVar[str] = "graft"

    density: float = field(
        default=0.01, metadata={"help": "The share of each task vector that is grafted.", "law": "(0, 1]"}
    )
    scope: Literal["global", "tensor"] = field(
        default="global", metadata={"help": "Whether the largest elements are those of the model or of each tensor."}
    )

    @property
    def elementwise(self) -> bool:
        return True

    @property
    def survey_scope(self) -> Literal["model", "tensor"]:
        return "model" if self.scope == "global" else "tensor"

    def survey(self, stacks: Stacks) -> list[float]:
        """The least |dᵢ| of each model that is kept."""
        return [least for (least,) in order_statistics(stacks, _sizes, self._rank)]

    def merge(self, stack: Stack, survey: list[float]) -> Tensor:
        grafts = (
            delta.mul_(torch.ge(delta.abs(), least)) for delta, least in zip(stack.task_vectors(), survey, strict=True)
        )
        return weighted_sum(stack.weights, grafts).add_(stack.base)

    def facts(self, survey: list[float]) -> dict[str, Any]:
        return {"least": survey}

    def _rank(self, count: int) -> tuple[int]:
        kept = max(math.ceil(count * self.density), 1)
        return (max(count - kept, 0),)


def _sizes(stack: Stack) -> Iterable[Tensor]:
    return map(Tensor.abs_, stack.task_vectors())
