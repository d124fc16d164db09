"""TIES: trim, elect signs, merge disjointly (Yadav et al., arXiv 2306.01708, section 4 and algorithm 1).

    d̂ᵢ = the density · D largest of the D elements of dᵢ = Wᵢ - W₀ by magnitude, and 0 elsewhere
    s = sign(Σᵢ wᵢ d̂ᵢ),   Aᵢ = [sign(wᵢ d̂ᵢ) = s],   W = W₀ + λ Σᵢ Aᵢ wᵢ d̂ᵢ / Σᵢ Aᵢ |wᵢ|

The paper keeps 20 % and takes λ = 1 if there is nothing to tune it on. As in mergekit each tensor is trimmed apart,
and keeps one element at least. Of equal magnitudes the first in the tensor are kept; mergekit's sort is not stable, so
that there it is up to the processor. In a recipe "ties" means mergekit's density of 1 and its rules of election (see
`hf_modular.merging._consensus`), unless it says otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from torch import Tensor

from hf_modular.merging._consensus import ELECTION_HELP, NORMALIZE_HELP, Election, SparseTaskVectors, rescale_word
from hf_modular.merging._method import Alias, Stack, Stacks
from hf_modular.merging._sparsify import ALL, NONE, Cut, Target, cuts, large


@dataclass(frozen=True)
class TIESConfig(SparseTaskVectors):
    """Task vectors trimmed to their largest elements, which vote on signs."""

    name: ClassVar[str] = "ties"
    aliases: ClassVar[dict[str, Alias]] = {
        "ties": Alias(defaults={"density": 1.0, "election": "mergekit"}, keys={"rescale": ("rescale", rescale_word)})
    }

    density: float = field(
        default=0.2,
        metadata={"help": "The share of each task vector that is kept.", "law": "[0, 1]", "per_model": True},
    )
    normalize: bool = field(default=True, metadata={"help": NORMALIZE_HELP})
    election: Election = field(default="symmetric", metadata={"help": ELECTION_HELP})

    def densities(self, stack: Stack) -> Sequence[float]:
        return stack.each("density", self.density)

    def plan(self, stacks: Stacks) -> list[list[Cut]]:
        """Where each model is trimmed; it takes no pass over the tensor if everything is kept or nothing."""
        densities = self.densities(next(iter(stacks)))
        if all(density in (0, 1) for density in densities):
            return [[ALL if density else NONE] for density in densities]
        return cuts(stacks, Stack.task_vectors, [[Target(partial(_trimmed, d))] for d in densities])

    def thin(self, stack: Stack, model: int, density: float, plan: list[list[Cut]]) -> Tensor:  # (*shape)
        return large(stack.models[model] - stack.base, plan[model][0], stack.offset)


def _trimmed(density: float, size: int, nonzero: int) -> int:
    """How many of the elements are dropped."""
    return size - max(1, int(density * size)) if density > 0 else size
