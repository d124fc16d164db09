"""Task vectors, each made sparse in a method's own way, and how they become one: a sum, or a vote on signs.

    tᵢ = wᵢ cᵢ thin(Wᵢ - W₀)
    election "none":   d = Σᵢ tᵢ,                                           with normalize divided by Σᵢ wᵢ
    election else:     s = sign(Σᵢ tᵢ),   Aᵢ = [sign(tᵢ) = s],   d = Σᵢ Aᵢ tᵢ,   with normalize by Σᵢ Aᵢ |wᵢ|
    W = W₀ + λ d

The vote is that of TIES-Merging (Yadav et al., arXiv 2306.01708, section 4, "elect" and "disjoint merge"), where all
wᵢ = 1, so that with normalize d is the mean of the values with the elected sign. The weights in it are mergekit's.
Two of mergekit's choices are not the default, since both favour a sign: a sum of 0 counts as positive there, and in
the divisor a negative weight keeps its sign, so that a task vector to be taken away is added if it stands alone.
`election="mergekit"` has both. With "symmetric" an element on whose sign nobody wins is the base's. (The authors'
code gives it the sign that has the majority in the whole model.)

cᵢ makes up for what was dropped: "inverse" divides by the share that was kept, "norm" is mergekit's ratio of the L1
norms before and after, for each tensor.
"""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hf_modular.merging._method import MergeMethod, Stack, Stacks, total_weight

Election = Literal["none", "symmetric", "mergekit"]
Rescale = Literal["none", "inverse", "norm"]

NORMALIZE_HELP = "Divide by the sum of the weights: those of the models that agree, if there is an election."
RESCALE_HELP = "What the kept part is multiplied by: nothing, 1/density, or the ratio of the L1 norms."
ELECTION_HELP = (
    "How the sign of an element is elected: not at all, by the sum over the models, or as mergekit does it."
)


class Survey(NamedTuple):
    """What is known of a tensor before it is merged."""

    plan: Any  # what the method wants to know
    ratios: list[float] | None  # of the norms, if they are wanted


@dataclass(frozen=True)
class SparseTaskVectors(MergeMethod):
    """A method that makes task vectors sparse and combines them; how they are made sparse, it has to add."""

    scale: float = field(default=1.0, metadata={"help": "λ, applied to the combined task vector."})
    normalize: bool = field(default=False, metadata={"help": NORMALIZE_HELP})
    rescale: Rescale = field(default="none", metadata={"help": RESCALE_HELP})
    election: Election = field(default="none", metadata={"help": ELECTION_HELP})

    @property
    def elementwise(self) -> bool:
        return True

    @property
    def survey_scope(self) -> Literal["model", "tensor"]:
        return "tensor"

    @abstractmethod
    def densities(self, stack: Stack) -> Sequence[float]:
        """The share of each task vector that is kept."""

    def plan(self, stacks: Stacks) -> Any:
        """What `thin` has to know of the tensor, if anything."""
        return None

    @abstractmethod
    def thin(self, stack: Stack, model: int, density: float, plan: Any) -> Tensor:  # (*shape)
        """A model's task vector with 0 in place of what is dropped, as a new tensor."""

    def inverse(self, density: float) -> float:
        """cᵢ with "inverse", in so far as `thin` has not seen to it."""
        return 1 / density if density > 0 else 1.0

    def survey(self, stacks: Stacks) -> Survey:
        plan = self.plan(stacks)
        return Survey(plan, self._ratios(stacks, plan) if self.rescale == "norm" and self.elementwise else None)

    def merge(self, stack: Stack, survey: Survey) -> Tensor:
        kept = [*self._thinned(stack, survey.plan)]
        factors = self._factors(stack, kept) if survey.ratios is None else survey.ratios
        scales = zip(kept, stack.weights.tolist(), factors, strict=True)
        terms = [term.mul_(weight * factor) for term, weight, factor in scales]
        return self._combined(terms, stack.weights).mul_(self.scale).add_(stack.base)

    def _thinned(self, stack: Stack, plan: Any) -> Iterator[Tensor]:  # n times (*shape)
        return (self.thin(stack, i, density, plan) for i, density in enumerate(self.densities(stack)))

    def _factors(self, stack: Stack, kept: Sequence[Tensor]) -> list[float]:
        """cᵢ; with "norm" those of a whole tensor."""
        if self.rescale == "norm":
            return [_ratio(_l1_norm(w - stack.base), _l1_norm(k)) for w, k in zip(stack.models, kept, strict=True)]
        return [self.inverse(d) if self.rescale == "inverse" else 1.0 for d in self.densities(stack)]

    def _ratios(self, stacks: Stacks, plan: Any) -> list[float]:
        """cᵢ with "norm", of a tensor in chunks."""
        norms = stacks.map(lambda stack: [*map(_l1_norm, (*stack.deltas, *self._thinned(stack, plan)))])
        totals = [math.fsum(parts) for parts in zip(*norms, strict=True)]
        n = len(totals) // 2
        return [_ratio(*pair) for pair in zip(totals[:n], totals[n:], strict=True)]

    def _combined(self, terms: Sequence[Tensor], weights: Tensor) -> Tensor:  # (*shape)
        total = summed(terms)
        if self.election == "none":
            return total.div_(total_weight(weights)) if self.normalize else total
        shares = (weights if self.election == "mergekit" else weights.abs()).tolist()
        return agreeing(terms, elected(total, self.election), shares if self.normalize else None)


def rescale_word(value: bool | str) -> Any:
    """mergekit's True and False in our words."""
    return ("norm" if value else "none") if isinstance(value, bool) else value


def summed(terms: Sequence[Tensor]) -> Tensor:  # (*shape)
    """Σᵢ tᵢ"""
    total = terms[0].clone()
    for term in terms[1:]:
        total.add_(term)
    return total


def elected(total: Tensor, election: Election) -> Tensor:  # (*shape)
    """The signs of a sum, in its place."""
    total.sign_()
    return total.add_(0.5).sign_() if election == "mergekit" else total


def agreeing(terms: Iterable[Tensor], signs: Tensor, shares: Sequence[float] | None) -> Tensor:  # (*shape)
    """Σᵢ Aᵢ tᵢ, with shares divided by Σᵢ Aᵢ shareᵢ; 0 where nobody agrees.

    Masks of floating-point numbers, all products with which are exact, are several times faster than boolean ones.
    """
    total, divisor = torch.zeros_like(signs), torch.zeros_like(signs)
    for i, term in enumerate(terms):
        agrees = (term * signs).clamp_(min=0)
        total.add_(agrees)
        if shares is not None:
            divisor.add_(agrees.sign_(), alpha=shares[i])
    total.mul_(signs)
    return total if shares is None else total.div_(_nonzero(divisor))


def _nonzero(divisor: Tensor) -> Tensor:
    """1 in place of 0."""
    return divisor.add_(divisor.sign().abs_().neg_().add_(1))


def _l1_norm(x: Tensor) -> float:
    return float(x.abs().sum(dtype=torch.float64))


def _ratio(before: float, after: float) -> float:
    return before / after if after > 0 else 1.0
