"""DARE, drop and rescale (Yu et al., arXiv 2311.03099), followed by task arithmetic or by TIES's vote on signs.

    dᵢ = Wᵢ - W₀,   mᵢ ~ Bernoulli(1 - p) for each element,   d̂ᵢ = cᵢ mᵢ ⊙ dᵢ,   W = W₀ + λ Σᵢ wᵢ d̂ᵢ

`rescale="inverse"` is the paper's cᵢ = 1/(1 - p) (equation 2), which keeps the expectation; "norm" is mergekit's
cᵢ = ‖dᵢ‖₁ / ‖mᵢ ⊙ dᵢ‖₁ for each tensor, which keeps the norm of what was drawn; "none" is cᵢ = 1. For `election` and
`normalize` see `hf_modular.merging._consensus`; mergekit's "dare_ties" has an election, its "dare_linear" has none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from hf_modular.merging._consensus import RESCALE_HELP, Rescale, SparseTaskVectors, rescale_word
from hf_modular.merging._method import Alias, Stack

_KEYS = {"density": ("drop", lambda density: 1 - density), "rescale": ("rescale", rescale_word)}


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
    rescale: Rescale = field(default="inverse", metadata={"help": RESCALE_HELP})

    def densities(self, stack: Stack) -> Sequence[float]:
        return [1 - drop for drop in stack.each("drop", self.drop)]

    def thin(self, stack: Stack, model: int, density: float, plan: Any) -> Tensor:  # (*shape)
        return (stack.models[model] - stack.base).mul_(stack.bernoulli(model, density))
