"""DARE, drop and rescale (Yu et al., arXiv 2311.03099), and DAREx (Deng et al., arXiv 2410.09344, ICLR 2025).

    dᵢ = Wᵢ - W₀,   mᵢ ~ Bernoulli(1 - p) for each element,   d̂ᵢ = cᵢ mᵢ ⊙ dᵢ,   W = W₀ + λ Σᵢ wᵢ d̂ᵢ

`rescale="inverse"` is the paper's cᵢ = 1/(1 - p) (equation 2), which keeps the expectation; "norm" is mergekit's
cᵢ = ‖dᵢ‖₁ / ‖mᵢ ⊙ dᵢ‖₁ for each tensor, which keeps the norm of what was drawn; "none" is cᵢ = 1. For `election` and
`normalize` see `hf_modular.merging._consensus`; mergekit's "dare_ties" has an election, its "dare_linear" has none.

"q" is DAREx-q, cᵢ = 1/q: q above 1 - p takes a bias for less variance. Which q is best depends on the data; those that
need a model are found by `hf_modular.dare_q`, and the merge gets the number, so that it stays a function of the
weights. Without data there is `q="closed_form"`: for a neuron whose input times change is c₁, c₂, ..., what dropping
changes in its output has the mean square (1 - (1 - p)/q)² S² + p (1 - p) Q/q², S = Σⱼ cⱼ, Q = Σⱼ cⱼ², and the least at

    q = (1 - p) + p Σₖ Qₖ / Σₖ Sₖ²        over the neurons k of a layer

This formula is ours (the paper searches). Here all inputs are taken for 1, so that c is a row of dᵢ. Biases have the q
of their weights, what is in no linear layer the mean of all, as the authors' code does.

`mask` says what is dropped: elements at "random"; whole "columns" at random, which are input features (second axis; in
GPT-2's Conv1D outputs); all but the largest by "magnitude" in a tensor; or all but the largest |dₖⱼ| ‖xⱼ‖ in a row,
"wanda", with the norms of the inputs as the model's `activations`, see `hf_modular.activation_norms`; where there are
none they count as 1. The last two are not random, so 1/(1 - p) would not keep any expectation and is refused.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor

from hf_modular.merging._consensus import SparseTaskVectors, Survey, norm_ratios, norms, rescale_word
from hf_modular.merging._method import Alias, Stack, Stacks
from hf_modular.merging._sparsify import ALL, Cut, Target, cuts, large

_KEYS = {"density": ("drop", lambda density: 1 - density), "rescale": ("rescale", rescale_word)}
_EMBEDDINGS = r"embed|wte|wpe|shared\.weight"  # matrices whose rows are looked up, not summed over
_CLOSED_FORM = "closed_form"
_SORTED = 1 << 20  # elements that are sorted at a time; one row at least


@dataclass(frozen=True)
class DAREConfig(SparseTaskVectors):
    """Task arithmetic with randomly thinned task vectors."""

    name: ClassVar[str] = "dare"
    aliases: ClassVar[dict[str, Alias]] = {
        "dare_linear": Alias({"drop": 0.0, "rescale": "norm"}, _KEYS),
        "dare_ties": Alias({"drop": 0.0, "rescale": "norm", "election": "mergekit"}, _KEYS),
    }

    drop: float = field(
        default=0.9,
        metadata={"help": "p, the share of each task vector that is dropped.", "law": "[0, 1)", "per_model": True},
    )
    rescale: Literal["none", "inverse", "norm", "q"] = field(  # type: ignore[assignment]
        default="inverse",
        metadata={"help": "What is kept is multiplied by 1, 1/(1 - drop), the ratio of L1 norms, or 1/q."},
    )
    q: float | str | None = field(
        default=None,
        metadata={"help": "With rescale='q' a number, or 'closed_form'.", "law": "(0, 1]", "per_model": True},
    )
    mask: Literal["random", "columns", "magnitude", "wanda"] = field(
        default="random",
        metadata={"help": "What is dropped: elements or columns at random, or all but the most important elements."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.q, str) and self.q != _CLOSED_FORM:
            raise ValueError(
                f"`q` must be a number or {_CLOSED_FORM!r}, but got q={self.q!r}: what needs a model and data is "
                "found by hf_modular.dare_q, which gives the number"
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"activations"} if self.mask == "wanda" else ())

    @property
    def elementwise(self) -> bool:
        return self.mask in ("random", "magnitude") and self.q != _CLOSED_FORM

    @property
    def survey_scope(self) -> Literal["model", "tensor"]:
        return "model" if self.q == _CLOSED_FORM else "tensor"

    def densities(self, stack: Stack) -> Sequence[float]:
        return [1 - drop for drop in stack.each("drop", self.drop)]

    def plan(self, stacks: Stacks) -> list[Cut]:
        """Where each task vector is cut, if it is by magnitude."""
        if self.mask != "magnitude":
            return []
        densities = self.densities(next(iter(stacks)))
        if all(density == 1 for density in densities):
            return [ALL] * len(densities)
        return [cut for (cut,) in cuts(stacks, Stack.task_vectors, [[Target(partial(_small, d))] for d in densities])]

    def survey(self, stacks: Stacks) -> Survey:
        if self.q == _CLOSED_FORM:
            return Survey(self._closed_form(stacks), None)
        if self.rescale == "norm" and not self.elementwise:
            return Survey([], norm_ratios(stacks.map(lambda stack: norms(stack, self.thinned(stack)))))
        return super().survey(stacks)

    def merge(self, stack: Stack, survey: Survey) -> Tensor:
        self._check(stack)
        if self.q == _CLOSED_FORM:
            kept = self.thinned(stack, [])
            return self.fused(stack, kept, [1 / q for q in _its_own(stack.name, survey.plan, self.densities(stack))])
        return super().merge(stack, survey)

    def thin(self, stack: Stack, model: int, density: float, plan: list[Cut]) -> Tensor:  # (*shape)
        delta = stack.models[model] - stack.base
        if self.mask == "magnitude":
            return large(delta, plan[model], stack.offset)
        if self.mask == "wanda":
            return _largest_of_rows(delta, stack.companions.get("activations"), model, density)
        if self.mask == "columns" and delta.ndim > 1 and delta.numel():
            column = replace(stack, base=stack.base.transpose(0, 1).flatten(1)[:, 0])
            return delta.mul_(column.bernoulli(model, density).view(1, -1, *[1] * (delta.ndim - 2)))
        return delta.mul_(stack.bernoulli(model, density))

    def norms(self, stack: Stack, plan: list[Cut]) -> list[float]:
        if self.mask != "random":
            return super().norms(stack, plan)
        pairs = []
        for model, (delta, density) in enumerate(zip(stack.task_vectors(), self.densities(stack), strict=True)):
            size = delta.abs_()
            pairs.append((float(size.sum()), float(size.mul_(stack.bernoulli(model, density)).sum())))
        return [before for before, _ in pairs] + [after for _, after in pairs]

    def _factors(self, stack: Stack) -> list[float]:
        if self.rescale != "q":
            return super()._factors(stack)
        return [1 / float(q) for q in stack.each("q", self.q) if q is not None]

    def _check(self, stack: Stack) -> None:
        """What settings must not be together."""
        given = stack.each("q", self.q)
        if self.rescale == "q" and None in given:
            raise ValueError("rescale='q' needs a `q`, a number or 'closed_form', but there is none")
        if self.rescale != "q" and any(q is not None for q in given):
            raise ValueError(f"`q` counts with rescale='q' alone, but got q={given[0]!r} and rescale={self.rescale!r}")
        if any(isinstance(q, str) for q in given) and {*given} != {self.q}:
            raise ValueError(f"q='closed_form' is for all models alike, but got {list(given)}")
        random = self.mask in ("random", "columns")
        if not random and (self.rescale == "inverse" or self.q == _CLOSED_FORM):
            raise ValueError(
                f"1/(1 - drop) and the closed form are for what is dropped at random, but got mask={self.mask!r}: "
                "choose rescale='none', 'norm', or 'q' with a number"
            )

    def _closed_form(self, stacks: Stacks) -> dict[str, list[float]]:
        """For each linear layer q of each model."""
        found = stacks.map(lambda stack: (stack.name, self._layer(stack)))
        return {name: values for name, values in found if values}

    def _layer(self, stack: Stack) -> list[float]:
        if stack.base.ndim < 2 or not stack.base.numel() or re.search(_EMBEDDINGS, stack.name):
            return []
        rows = (delta.flatten(1).double() for delta in stack.task_vectors())
        sums = [(float(c.square().sum()), float(c.sum(1).square().sum())) for c in rows]  # Σ Q and Σ S²
        if not all(math.isfinite(part) for pair in sums for part in pair):
            raise ValueError(f"{stack.name} must be finite in the base and in all models, but is not")
        return [best_q(density, *pair) for density, pair in zip(self.densities(stack), sums, strict=True)]


def best_q(density: float, squares: float, squared_sums: float) -> float:
    """(1 - p) + p Σ Q / Σ S², at most 1."""
    if squares >= squared_sums:
        return 1.0
    return density + (1 - density) * squares / squared_sums


def _its_own(name: str, layers: dict[str, list[float]], densities: Sequence[float]) -> Sequence[float]:
    """The q of each model for a tensor: that of its layer, or the mean of all layers."""
    weight = f"{name.removesuffix('bias')}weight" if name.endswith("bias") else name
    if weight in layers:
        return layers[weight]
    means = [sum(of_model) / len(layers) for of_model in zip(*layers.values(), strict=True)]
    return means or densities


def _largest_of_rows(delta: Tensor, activations: Tensor | None, model: int, density: float) -> Tensor:  # (*shape)
    """A row's elements whose size times that of their input is largest; of equal ones the first."""
    rows = delta.flatten(1) if delta.ndim > 1 else delta.view(1, -1)
    sizes = None if activations is None else activations[model].reshape(rows.shape)
    count = max(int(density * rows.shape[1]), 1)
    for part, those in _parts(rows, sizes):
        scores = part.abs() if those is None else part.abs().mul_(those)
        dropped = scores.argsort(dim=1, descending=True, stable=True)[:, count:]
        part.scatter_(1, dropped, 0.0)
    return rows.view(delta.shape)


def _parts(rows: Tensor, sizes: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """A few rows at a time."""
    step = max(_SORTED // max(rows.shape[1], 1), 1)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        yield rows[part], None if sizes is None else sizes[part]


def _small(density: float, size: int, nonzero: int) -> int:
    """How many of the elements are dropped."""
    return size - max(1, int(density * size))
