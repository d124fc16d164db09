"""OPCM, continual merging by orthogonal projection (Tang et al., arXiv 2501.09522, NeurIPS 2025).

Models come one after the other; of those before, only T, the sum of what was kept of their task vectors, is known:

    T₁ = d₁,   Tₜ = Tₜ₋₁ + clean(dₜ),   dₜ = Wₜ - W₀
    clean(d): of T = U S Vᵀ take P = Uᵀ d V, set the diagonal and P[:k, :k] to 0, and go back: U P Vᵀ
              where k is the number of leading singular values whose sum is at most alpha of the sum of all
    W = W₀ + T / λ,   λ = ‖T‖ / mean ‖dᵢ‖          (Frobenius norms over the whole model)

so that W is as far from the base as a single model on average. Since clean does not depend on the scale of T, this is
the paper's recursion for T/λ (its equations 6 to 8) without scaling back and forth.

As in the authors' code, clean is for the weights of linear layers; embeddings, convolutions, biases and norms are
added up. Here a linear layer is a matrix whose name `skip` does not find. Ours: the reduced decomposition, of which
nothing is lost, as d - U (what is set to 0) Vᵀ; singular values that are 0 but for rounding have no direction and take
no part; alpha = 1 takes all of them (the code takes none).
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from hf_modular.merging._method import BLOCK, MergeMethod, Parts, Stack, Stacks

_SKIP = r"embed|wte|wpe|shared\.weight"
_ALPHA = {"help": "The share of the singular values' sum in whose space new models change nothing.", "law": "[0, 1]"}
_SKIP_HELP = {"help": "A regular expression: matrices that are no linear layers."}


class Survey(NamedTuple):
    """The Frobenius norms over the whole model."""

    models: list[float]  # of the task vectors
    total: float  # of T

    @property
    def scale(self) -> float:
        """1/λ"""
        return math.fsum(self.models) / len(self.models) / self.total if self.total else 0.0


@dataclass(frozen=True)
class OPCMConfig(MergeMethod):
    """Merge models one after the other, each without disturbing what those before have learnt."""

    name: ClassVar[str] = "opcm"
    takes_weights: ClassVar[bool] = False

    alpha: float = field(default=0.5, metadata=_ALPHA)
    skip: str = field(default=_SKIP, metadata=_SKIP_HELP)

    @property
    def one_by_one(self) -> Parts:
        add = OPCMAddConfig(self.alpha, self.skip)
        first = OPCMAddConfig(self.alpha, self.skip, first=True)
        return Parts(first, add, lambda facts: OPCMResultConfig(_mean([fact["norm"] for fact in facts])))

    def survey(self, stacks: Stacks) -> Survey:
        squares = zip(*stacks.map(self._squares), strict=True)
        *models, total = (_root(parts) for parts in squares)
        return Survey(models, total)

    def merge(self, stack: Stack, survey: Survey) -> Tensor:
        return self._total(stack).mul_(survey.scale).add_(stack.base)

    def facts(self, survey: Survey) -> dict[str, Any]:
        return {"norms": survey.models, "scale": survey.scale}

    def _squares(self, stack: Stack) -> list[list[float]]:
        models = [_squares(stack.name, delta) for delta in stack.task_vectors()]
        return [*models, _squares(stack.name, self._total(stack))]

    def _total(self, stack: Stack) -> Tensor:  # (*shape)
        total = torch.zeros_like(stack.base)
        for delta in stack.task_vectors():
            total += clean(delta, total, self.alpha) if is_linear(stack, self.skip) else delta
        return total


@dataclass(frozen=True)
class OPCMAddConfig(MergeMethod):
    """One step of opcm: Tₜ of Tₜ₋₁, the "state", and one model."""

    name: ClassVar[str] = "opcm_add"
    takes_weights: ClassVar[bool] = False
    model_counts: ClassVar[tuple[int, float]] = (1, 1)

    alpha: float = field(default=0.5, metadata=_ALPHA)
    skip: str = field(default=_SKIP, metadata=_SKIP_HELP)
    first: bool = field(default=False, metadata={"help": "Whether there is no state before."})

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.first else frozenset({"state"})

    def survey(self, stacks: Stacks) -> float:
        """‖dₜ‖"""
        return _root(stacks.map(lambda stack: _squares(stack.name, stack.deltas)))

    def merge(self, stack: Stack, survey: float) -> Tensor:
        (delta,) = stack.deltas
        if "state" not in stack.companions:
            return delta
        (total,) = stack.companions["state"]
        return total + (clean(delta, total, self.alpha) if is_linear(stack, self.skip) else delta)

    def facts(self, survey: float) -> dict[str, Any]:
        return {"norm": survey}


@dataclass(frozen=True)
class OPCMResultConfig(MergeMethod):
    """The last step of opcm: W of the base and T, which takes the place of a model."""

    name: ClassVar[str] = "opcm_result"
    takes_weights: ClassVar[bool] = False
    model_counts: ClassVar[tuple[int, float]] = (1, 1)

    norm: float = field(default=1.0, metadata={"help": "The mean norm of the task vectors.", "law": "[0, inf)"})

    @property
    def elementwise(self) -> bool:
        return True

    def survey(self, stacks: Stacks) -> float:
        """1/λ"""
        total = _root(stacks.map(lambda stack: _squares(stack.name, stack.models)))
        return self.norm / total if total else 0.0

    def merge(self, stack: Stack, survey: float) -> Tensor:
        return (stack.models[0] * survey).add_(stack.base)

    def facts(self, survey: float) -> dict[str, Any]:
        return {"scale": survey}


def is_linear(stack: Stack, skip: str) -> bool:
    """Whether a tensor is the weight of a linear layer."""
    return stack.base.ndim == 2 and min(stack.base.shape) > 1 and not re.search(skip, stack.name)


def clean(delta: Tensor, total: Tensor, alpha: float) -> Tensor:  # (rows, columns)
    """What of a task vector does not disturb the sum of those before."""
    if not bool(total.any()):
        return delta
    U, S, Vh = torch.linalg.svd(total, full_matrices=False)
    negligible = S[0] * max(total.shape) * torch.finfo(S.dtype).eps
    rank = int((negligible < S).sum())
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    sums = S.cumsum(0)
    k = int((sums <= alpha * sums[-1]).sum())
    core = U.T @ delta @ Vh.T  # (rank, rank)
    removed = torch.diag(core.diagonal())
    removed[:k, :k] = core[:k, :k]
    return delta - U @ removed @ Vh


def _squares(name: str, x: Tensor) -> list[float]:
    """Of each block of elements the sum of squares: the same blocks, whether a tensor comes whole or not."""
    sums = [float(block.double().square().sum()) for block in x.reshape(-1).split(BLOCK)]
    if not all(map(math.isfinite, sums)):
        raise ValueError(f"{name} must be finite in the base and in all models, but has NaN or infinite values")
    return sums


def _root(squares: Iterable[list[float]]) -> float:
    return math.sqrt(math.fsum(chain.from_iterable(squares)))


def _mean(numbers: list[float]) -> float:
    return math.fsum(numbers) / len(numbers)
