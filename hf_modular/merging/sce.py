"""SCE: select, calculate, erase (Wan et al., FuseChat, arXiv 2408.07990).

    dᵢ = Wᵢ - W₀
    select      keep the elements whose variance over the models is among the largest select_topk of those not 0
    calculate   ηᵢ = the mean square of dᵢ, divided by the sum of these over the models, for each tensor
    erase       s = sign(Σᵢ dᵢ),   Aᵢ = [sign(dᵢ) = s],   W = W₀ + Σᵢ Aᵢ ηᵢ dᵢ / Σᵢ Aᵢ ηᵢ

Of equal variances the first in the tensor are kept. mergekit differs in two points, and with it the name "sce" in a
recipe: where the mean squares sum to less than 1e-6, as in fine-tunes that move a weight by a few 10⁻⁴, it takes all
ηᵢ for equal (`energy_floor`); and where Σᵢ dᵢ = 0 it keeps the positive values, not the base's (`election`).
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from hf_modular.merging._consensus import ELECTION_HELP, agreeing, elected, summed
from hf_modular.merging._method import Alias, MergeMethod, Stack, Stacks
from hf_modular.merging._sparsify import ALL, Cut, Target, cuts, large


class Survey(NamedTuple):
    """What is known of a tensor before it is merged."""

    cut: Cut  # of the variances
    shares: list[float]  # ηᵢ


@dataclass(frozen=True)
class SCEConfig(MergeMethod):
    """The task vectors where they differ most, weighted by their energy, without what a minority wants."""

    name: ClassVar[str] = "sce"
    model_counts: ClassVar[tuple[int, float]] = (1, math.inf)
    takes_weights: ClassVar[bool] = False
    aliases: ClassVar[dict[str, Alias]] = {"sce": Alias({"energy_floor": 1e-6, "election": "mergekit"})}

    select_topk: float = field(
        default=1.0, metadata={"help": "The share of the elements that vary which is kept.", "law": "[0, 1]"}
    )
    energy_floor: float = field(
        default=0.0,
        metadata={"help": "The sum of mean squares below which all models count alike.", "law": "[0, inf)"},
    )
    election: Literal["symmetric", "mergekit"] = field(default="symmetric", metadata={"help": ELECTION_HELP})

    @property
    def elementwise(self) -> bool:
        return True

    @property
    def survey_scope(self) -> Literal["model", "tensor"]:
        return "tensor"

    def survey(self, stacks: Stacks) -> Survey:
        cut = ALL
        if self.select_topk < 1:
            [[cut]] = cuts(stacks, lambda stack: [_variance(stack.models)], [[Target(self._erased)]])
        chunks = stacks.map(lambda stack: (stack.base.numel(), *map(_energy, self._selected(stack, cut))))
        size, *energies = (math.fsum(parts) for parts in zip(*chunks, strict=True))
        total = math.fsum(energies)
        alike = total <= self.energy_floor * size
        return Survey(cut, [1 / len(energies) if alike else energy / total for energy in energies])

    def merge(self, stack: Stack, survey: Survey) -> Tensor:
        kept = self._selected(stack, survey.cut)
        signs = elected(summed(kept), self.election)
        terms = [delta.mul_(share) for delta, share in zip(kept, survey.shares, strict=True)]
        return agreeing(terms, signs, survey.shares).add_(stack.base)

    def _selected(self, stack: Stack, cut: Cut) -> list[Tensor]:  # n times (*shape)
        if cut == ALL:
            return [*stack.deltas]
        kept = large(_variance(stack.models), cut, stack.offset).sign_()
        return [*stack.deltas.mul_(kept)]

    def _erased(self, size: int, nonzero: int) -> int:
        return size - int(nonzero * self.select_topk)


def _variance(models: Tensor) -> Tensor:  # (n, *shape) -> (*shape)
    """Over the models; that of equal ones is 0, without a rounding error."""
    apart = models - models[0]
    apart -= summed([*apart]).div_(len(models))
    return summed([*apart.square_()]).div_(len(models))


def _energy(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))
