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
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hf_modular.merging._method import MergeMethod, Stack, Stacks, total_weight, weighted_sum

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
        if self.rescale != "norm" or not self.elementwise:
            return Survey(plan, None)
        return Survey(plan, norm_ratios(stacks.map(lambda stack: self.norms(stack, plan))))

    def merge(self, stack: Stack, survey: Survey) -> Tensor:
        return self.fused(stack, self.thinned(stack, survey.plan), survey.ratios)

    def norms(self, stack: Stack, plan: Any) -> list[float]:
        """The L1 norms of the task vectors, and of what is kept of them."""
        return norms(stack, self.thinned(stack, plan))

    def thinned(self, stack: Stack, plan: Any = None) -> Iterator[Tensor]:  # n times (*shape)
        return (self.thin(stack, i, density, plan) for i, density in enumerate(self.densities(stack)))

    def fused(self, stack: Stack, kept: Iterable[Tensor], ratios: Sequence[float] | None) -> Tensor:  # (*shape)
        """Thin task vectors, which it uses up, as one merged model."""
        weights = stack.weights.tolist()
        scales = [weight * factor for weight, factor in zip(weights, ratios or self._factors(stack), strict=True)]
        if self.election == "none":
            combined = weighted_sum(scales, kept)
            if self.normalize:
                combined.div_(total_weight(stack.weights))
        else:
            terms = [_scaled(term, scale) for term, scale in zip(kept, scales, strict=True)]
            combined = self._voted(terms, weights)
        return _scaled(combined, self.scale).add_(stack.base)

    def _factors(self, stack: Stack) -> list[float]:
        """cᵢ without "norm"."""
        return [self.inverse(density) if self.rescale == "inverse" else 1.0 for density in self.densities(stack)]

    def _voted(self, terms: Sequence[Tensor], weights: Sequence[float]) -> Tensor:  # (*shape)
        """Σᵢ Aᵢ tᵢ, with normalize divided by Σᵢ Aᵢ |wᵢ|"""
        shares = weights if self.election == "mergekit" else [abs(weight) for weight in weights]
        return agreeing(terms, elected(summed(terms), self.election), shares if self.normalize else None)


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

    The masks are floating-point numbers, whose products are exact, and which are several times faster than booleans.
    """
    total, divisor, scratch = torch.zeros_like(signs), torch.zeros_like(signs), torch.empty_like(signs)
    for i, term in enumerate(terms):
        agrees = torch.mul(term, signs, out=scratch).relu_()
        total.add_(agrees)
        if shares is not None:
            divisor.add_(agrees.sign_(), alpha=shares[i])
    total.mul_(signs)
    if shares is None:
        return total
    if min(shares) > 0:
        return total.div_(divisor.clamp_(min=min(shares)))  # where nobody agrees, 0 is divided by anything
    return total.div_(divisor.add_(torch.eq(divisor, 0, out=scratch)))


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x.mul_(scale)


def norms(stack: Stack, kept: Iterable[Tensor]) -> list[float]:
    """The L1 norms of the task vectors, and of what is kept of them."""
    size = torch.empty_like(stack.base)
    vectors = chain(stack.task_vectors(), kept)
    return [float(torch.abs(x, out=size).sum()) for x in vectors]  # pairwise: as good as rounded once


def norm_ratios(parts: Iterable[list[float]]) -> list[float]:
    """The `norms` of a tensor's parts as one factor for each model; they are summed without rounding."""
    totals = [math.fsum(column) for column in zip(*parts, strict=True)]
    halves = totals[: len(totals) // 2], totals[len(totals) // 2 :]
    return [before / after if after > 0 else 1.0 for before, after in zip(*halves, strict=True)]
