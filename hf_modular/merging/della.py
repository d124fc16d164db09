"""DELLA: drop at random, the small elements more often than the large ones (Deep et al., arXiv 2406.11617).

    of the D elements of a row of dᵢ = Wᵢ - W₀, that which r others do not reach in magnitude is kept with probability
    pᵣ = density - epsilon + 2 epsilon r / (D - 1), and divided by pᵣ ("MAGPRUNE"); then the models vote on signs, and
    those that agree are averaged (see `hf_modular.merging._consensus`)

The paper's density is 1 - p, and its ε is the width of the window of probabilities, twice `epsilon`, which is
mergekit's. So is ranking each row apart; a tensor of one axis is one row, one of more than two has a row for each
index of the first. Equal magnitudes are ranked by their place, as in a stable sort. `rescale="inverse"` is the
paper's division by pᵣ, which keeps the expectation; "norm", mergekit's, keeps the L1 norm of what was drawn. In a
recipe "della" and "della_linear", which has no election, mean density 1 unless they say otherwise, as in mergekit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
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
    rescale_word,
)
from hf_modular.merging._method import Alias, Stack

_KEYS = {"rescale": ("rescale", rescale_word)}
_SORTED = 1 << 17  # elements that are sorted at a time, or one row


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

    def thin(self, stack: Stack, model: int, density: float, plan: Any) -> Tensor:  # (*shape)
        delta = stack.models[model] - stack.base
        if density in (0, 1):
            return delta.mul_(density)
        low, high = _window(density, stack.each("epsilon", self.epsilon)[model])
        chances = _by_rank(delta, low, high)
        delta.mul_((chances - stack.uniform(model)).sign_().clamp_(min=0))
        return delta.div_(chances) if self.rescale == "inverse" else delta


def _window(density: float, epsilon: float) -> tuple[float, float]:
    low, high = density - epsilon, density + epsilon
    if low <= 0 or high >= 1:
        raise ValueError(
            f"density - epsilon and density + epsilon must be in (0, 1), but got {density=} and {epsilon=}: "
            "make epsilon smaller"
        )
    return low, high


def _by_rank(x: Tensor, low: float, high: float) -> Tensor:  # (*shape)
    """For each element a number from low, for the smallest of its row, to high, for the largest."""
    rows = x.flatten(1) if x.dim() > 1 else x.reshape(1, -1)
    width = rows.shape[1]
    ends = (low, high) if width > 1 else ((low + high) / 2,) * 2
    steps = torch.linspace(*ends, width, dtype=x.dtype, device=x.device)
    ranked = torch.empty_like(rows)
    at_once = max(_SORTED // max(width, 1), 1)
    for part, out in zip(rows.split(at_once), ranked.split(at_once), strict=True):
        order = torch.from_numpy(_ascending(part.abs().numpy(force=True))).to(x.device)
        out.scatter_(1, order, steps.expand_as(out))
    return ranked.view(x.shape)


def _ascending(sizes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:  # (rows, width)
    """The order of each row, equal ones by their place."""
    if sizes.dtype == np.float64:
        return np.argsort(sizes, axis=1, kind="stable")
    keys = sizes.view(np.uint32).astype(np.uint64) << np.uint64(32) | np.arange(sizes.shape[1], dtype=np.uint64)
    keys.sort(axis=1)
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
