"""Fisher-weighted averaging (Matena and Raffel, arXiv 2111.09832, NeurIPS 2022).

    W = Σᵢ λᵢ Fᵢ ⊙ Wᵢ / Σᵢ λᵢ Fᵢ                         (equation 4; Fᵢ the diagonal of the Fisher information)

with λᵢ the weights of the models. From the paper's code are three settings: `normalize` divides λᵢ by ‖Fᵢ‖₂ over the
whole model, since a model that is surer of itself would outvote the others; `floor` is the least value of Fᵢ, before
that division; with `favor_first` only that of the first model is raised to it, so that the first model's value stays
where no model cares.

Ours: the sum is taken of the differences from the first model, so that what all models share stays as it is to the
last bit; tensors without Fisher information, such as running statistics, are averaged by λᵢ alone, and so are elements
where every λᵢ Fᵢ is 0, which takes floor=0.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hf_modular.merging._method import MergeMethod, Stack, Stacks, total_weight, weighted_sum


@dataclass(frozen=True)
class FisherConfig(MergeMethod):
    """Average in which each model counts for as much as its output depends on the parameter."""

    name: ClassVar[str] = "fisher"
    base_model: ClassVar[Literal["required", "optional", "unused"]] = "unused"

    normalize: bool = field(
        default=True, metadata={"help": "Divide each model's weight by the L2 norm of its Fisher information."}
    )
    floor: float = field(
        default=1e-6, metadata={"help": "The least Fisher information that counts.", "law": "[0, inf)"}
    )
    favor_first: bool = field(default=True, metadata={"help": "Apply the floor to the first model only."})

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"fisher"})

    @property
    def elementwise(self) -> bool:
        return True

    def survey(self, stacks: Stacks) -> list[float]:
        """‖Fᵢ‖₂ of each model."""
        squares = [sums for sums in stacks.map(_sums_of_squares) if sums]
        norms = [math.sqrt(math.fsum(parts)) for parts in zip(*squares, strict=True)]
        if self.normalize and not all(norms):
            raise ValueError(
                f"the Fisher information of a model must not be 0 everywhere with normalize=True, but that of model "
                f"{norms.index(0)} is"
            )
        return norms

    def merge(self, stack: Stack, survey: list[float]) -> Tensor:
        shares = self._shares(stack, survey)
        first = stack.models[0]
        changes = ((model - first).mul_(share) for model, share in zip(stack.models, shares, strict=True))
        return weighted_sum([1.0] * len(shares), changes).div_(_sum(shares)).add_(first)

    def facts(self, survey: list[float]) -> dict[str, Any]:
        return {"norms": survey}

    def _shares(self, stack: Stack, norms: list[float]) -> Tensor:  # (n, *shape)
        """λᵢ Fᵢ"""
        weights = _column(_checked(stack.weights), stack.models)
        if "fisher" not in stack.companions:
            return weights.expand_as(stack.models)
        shares = stack.companions["fisher"].clone()
        floored = shares[:1] if self.favor_first else shares
        floored.clamp_(min=self.floor)
        shares *= weights / _column(torch.tensor(norms), stack.models) if self.normalize else weights
        return torch.where(_sum(shares) > 0, shares, weights)


def _sums_of_squares(stack: Stack) -> list[float]:
    """Of each model, if there is Fisher information for the tensor."""
    fisher = stack.companions.get("fisher")
    if fisher is None:
        return []
    if not bool((fisher >= 0).all()) or not bool(fisher.isfinite().all()):
        raise ValueError(f"the Fisher information for {stack.name} must be finite and not below 0, but is not")
    return [float(row.double().square_().sum()) for row in fisher]


def _checked(weights: Tensor) -> Tensor:  # (n,)
    if bool((weights < 0).any()):
        raise ValueError(f"with Fisher information weights must not be negative, but got {weights.tolist()}")
    total_weight(weights)
    return weights


def _column(numbers: Tensor, like: Tensor) -> Tensor:  # (n, 1, ..., 1)
    return numbers.to(like).view(-1, *[1] * (like.ndim - 1))


def _sum(rows: Tensor) -> Tensor:  # (*shape)
    return weighted_sum([1.0] * len(rows), rows)
