"""Model Breadcrumbs: task vectors without their smallest and their largest elements (Davari & Belilovsky, ECCV 2024,
arXiv 2312.06795).

    of the D elements of dᵢ = Wᵢ - W₀ in ascending order of magnitude, keep density · D that come after the smallest
    (1 - density - gamma) · D; the largest gamma · D are outliers.   W = W₀ + λ Σᵢ wᵢ d̂ᵢ

The paper masks each layer apart; its β is 1 - density - gamma here and its γ is 1 - gamma. That density takes
precedence over gamma where they exceed 1 together, and that numbers of elements are rounded down, is mergekit's
choice. Of equal magnitudes the later in the tensor counts as larger, as in a stable sort. mergekit's
"breadcrumbs_ties" lets the models vote on signs afterwards (see `hf_modular.merging._consensus`). In a recipe
"breadcrumbs" means density 1 unless it says otherwise, as in mergekit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from torch import Tensor

from hf_modular.merging._consensus import SparseTaskVectors, rescale_word
from hf_modular.merging._method import Alias, Stack, Stacks
from hf_modular.merging._sparsify import ALL, NONE, Cut, Target, cuts, large

_KEYS = {"rescale": ("rescale", rescale_word)}


@dataclass(frozen=True)
class BreadcrumbsConfig(SparseTaskVectors):
    """Task vectors without their smallest and their largest elements."""

    name: ClassVar[str] = "breadcrumbs"
    aliases: ClassVar[dict[str, Alias]] = {
        "breadcrumbs": Alias(defaults={"density": 1.0}, keys=_KEYS),
        "breadcrumbs_ties": Alias(defaults={"density": 1.0, "election": "mergekit"}, keys=_KEYS),
    }

    density: float = field(
        default=0.1,
        metadata={"help": "The share of each task vector that is kept.", "law": "[0, 1]", "per_model": True},
    )
    gamma: float = field(
        default=0.01,
        metadata={"help": "The share of largest elements that is dropped.", "law": "[0, 1]", "per_model": True},
    )

    def densities(self, stack: Stack) -> Sequence[float]:
        return stack.each("density", self.density)

    def plan(self, stacks: Stacks) -> list[list[Cut]]:
        """Where the small elements end and where the outliers begin, for each model."""
        first = next(iter(stacks))
        densities, gammas = self.densities(first), first.each("gamma", self.gamma)
        if all(density == 1 for density in densities):
            return [[ALL, NONE] for _ in densities]
        targets = [
            [Target(partial(small, *pair), early=False) for small in (_smallest, _up_to_outliers)]
            for pair in zip(densities, gammas, strict=True)
        ]
        return cuts(stacks, Stack.task_vectors, targets)

    def thin(self, stack: Stack, model: int, density: float, plan: list[list[Cut]]) -> Tensor:  # (*shape)
        delta = stack.models[model] - stack.base
        notable, outlying = (large(delta, cut, stack.offset) for cut in plan[model])
        return notable.sub_(outlying)


def _smallest(density: float, gamma: float, size: int, nonzero: int) -> int:
    return max(0, size - int(density * size) - int(gamma * size))


def _up_to_outliers(density: float, gamma: float, size: int, nonzero: int) -> int:
    return _smallest(density, gamma, size, nonzero) + int(density * size)
