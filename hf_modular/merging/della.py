"""DELLA: drop at random, the small elements more often than the large ones (Deep et al., arXiv 2406.11617).

    of the D elements of a row of dᵢ = Wᵢ - W₀, the one with r smaller magnitudes is kept with probability
    pᵣ = density - epsilon + 2 epsilon r / (D - 1), and divided by pᵣ ("MAGPRUNE"); then the models vote on signs, and
    those that agree are averaged (see `hf_modular.merging._consensus`)

The paper's density is 1 - p, and its ε is the width of the window of probabilities, twice `epsilon`, which is
mergekit's. So is ranking each row apart; a tensor of one axis is one row, one of more than two has a row for each
index of the first. Equal magnitudes are ranked by their place, as in a stable sort. `rescale="inverse"` is the
paper's division by pᵣ, which keeps the expectation; "norm", mergekit's, keeps the L1 norm of what was drawn. In a
recipe "della" and "della_linear", which has no election, mean density 1 unless they say otherwise, as in mergekit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_modular.merging._consensus import (
    ELECTION_HELP,
    NORMALIZE_HELP,
    RESCALE_HELP,
    Election,
    Rescale,
    SparseTaskVectors,
    Survey,
    norm_ratios,
    norms,
    rescale_word,
)
from hf_modular.merging._method import Alias, Stack

_KEYS = {"rescale": ("rescale", rescale_word)}
_SORTED = 1 << 16  # elements that are sorted at a time; one row at least


@dataclass(frozen=True)
class DELLAConfig(SparseTaskVectors):
    """Task vectors thinned at random, their small elements more than their large ones."""

    name: ClassVar[str] = "della"
    aliases: ClassVar[dict[str, Alias]] = {
        "della": Alias({"density": 1.0, "rescale": "norm", "election": "mergekit"}, _KEYS),
        "della_linear": Alias({"density": 1.0, "rescale": "norm", "election": "none", "normalize": False}, _KEYS),
    }

    density: float = field(
        default=0.5,
        metadata={"help": "The mean share of a row that is kept.", "law": "[0, 1]", "per_model": True},
    )
    epsilon: float = field(
        default=0.15,
        metadata={
            "help": "How much likelier than density the largest element is kept, and less likely the smallest.",
            "law": "[0, 0.5)",
            "per_model": True,
        },
    )
    normalize: bool = field(default=True, metadata={"help": NORMALIZE_HELP})
    rescale: Rescale = field(default="inverse", metadata={"help": RESCALE_HELP})
    election: Election = field(default="symmetric", metadata={"help": ELECTION_HELP})

    @property
    def elementwise(self) -> bool:
        return False

    def densities(self, stack: Stack) -> Sequence[float]:
        return stack.each("density", self.density)

    def inverse(self, density: float) -> float:
        return 1.0

    def merge(self, stack: Stack, survey: Survey) -> Tensor:
        """A few rows at a time, so that what is made of them stays in a core's cache."""
        parts = [*_rows(stack)]
        kept = [[*self.thinned(part)] for part in parts]
        ratios = norm_ratios(map(norms, parts, kept)) if self.rescale == "norm" else None
        merged = [self.fused(part, thin, ratios) for part, thin in zip(parts, kept, strict=True)]
        return torch.cat(merged).view(stack.base.shape)

    def thin(self, stack: Stack, model: int, density: float, plan: Any) -> Tensor:  # (rows, width)
        delta = stack.models[model] - stack.base
        if density in (0, 1):
            return delta.mul_(density)
        low, high = _window(density, stack.each("epsilon", self.epsilon)[model])
        chances = by_rank(delta, low, high)
        delta.mul_((chances - stack.uniform(model)).sign_().clamp_(min=0))
        return delta.div_(chances) if self.rescale == "inverse" else delta


def _rows(stack: Stack) -> Iterator[Stack]:
    """The stack in flat parts of whole rows, at least one, in two axes."""
    by_first = stack.base.dim() > 1 and len(stack.base)
    width = max((stack.base[0] if by_first else stack.base).numel(), 1)
    for part in stack.runs(max(_SORTED // width, 1) * width):
        base, models = part.base.view(-1, width), part.models.reshape(len(part.models), -1, width)
        yield replace(part, base=base, models=models)


def _window(density: float, epsilon: float) -> tuple[float, float]:
    low, high = density - epsilon, density + epsilon
    if low <= 0 or high >= 1:
        raise ValueError(
            f"density - epsilon and density + epsilon must be in (0, 1), but got {density=} and {epsilon=}: "
            "make epsilon smaller"
        )
    return low, high


def by_rank(x: Tensor, low: float, high: float) -> Tensor:  # (rows, width)
    """For each element a number from low, for the smallest of its row, to high, for the largest."""
    width = x.shape[1]
    ends = (low, high) if width > 1 else ((low + high) / 2,) * 2
    steps = torch.linspace(*ends, width, dtype=x.dtype, device=x.device)
    order = torch.from_numpy(_ascending(x.abs().numpy(force=True))).to(x.device)
    return torch.empty_like(x).scatter_(1, order, steps.expand_as(x))


def _ascending(sizes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:  # (rows, width)
    """The order of each row, equal ones by their place."""
    if sizes.dtype == np.float64:
        return np.argsort(sizes, axis=1, kind="stable")
    keys = sizes.view(np.uint32).astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= np.arange(sizes.shape[1], dtype=np.uint64)
    keys.sort(axis=1)
    keys &= np.uint64(0xFFFFFFFF)
    return keys.view(np.int64)
