"""Robust weight signatures (Cai et al., arXiv 2302.12480, ICML 2023): robustness as a patch that models can be given.

    a = W_c - W₀,   vᵢ = Wᵢ - W₀,   RWSᵢ = vᵢ - (vᵢ·a / a·a) a   for each tensor,   W = W_t + λ/n Σᵢ RWSᵢ

Of a base W₀ are a model W_c fine-tuned on clean data, the first of the recipe, and n models Wᵢ fine-tuned on
corrupted data, each on a corruption of its own. What of vᵢ is not the clean fine-tuning is the signature of its
robustness. It is added to W_t, which is the clean model, or with `target="last"` the last of the recipe, another model
of the same base. A negative λ takes the patch out again.

The paper patches the first layers alone: name them by `include`. Tensors that `average` finds get the robust models'
mean departure from the clean model, λ/n Σᵢ (Wᵢ - W_c), which for the clean model and λ = 1 makes them the mean, as the
authors' code does with batch norms. Ours: that this is a departure, so that it can be taken out again as well.
"""

import math
import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from hf_modular.merging._method import MergeMethod, Stack, Stacks, weighted_sum


@dataclass(frozen=True)
class RWSConfig(MergeMethod):
    """A model patched with what makes others robust."""

    name: ClassVar[str] = "rws"
    takes_weights: ClassVar[bool] = False
    model_counts: ClassVar[tuple[int, float]] = (2, math.inf)

    scale: float = field(default=1.0, metadata={"help": "λ, the strength of the patch; -1 takes it out again."})
    target: Literal["first", "last"] = field(
        default="first", metadata={"help": "What is patched: the clean model, which is the first, or the last model."}
    )
    include: str = field(default="", metadata={"help": "A regular expression: the tensors that are patched."})
    average: str | None = field(
        default=None,
        metadata={"help": "A regular expression: tensors that get the mean and no signature."},
    )

    @property
    def elementwise(self) -> bool:
        return True

    @property
    def survey_scope(self) -> Literal["model", "tensor"]:
        return "tensor"

    def survey(self, stacks: Stacks) -> list[float]:
        """vᵢ·a / a·a of each robust model."""
        sums = [math.fsum(parts) for parts in zip(*stacks.map(self._products), strict=True)]
        *products, square = sums
        return [product / square if square else 0.0 for product in products]

    def merge(self, stack: Stack, survey: list[float]) -> Tensor:
        target = stack.models[0 if self.target == "first" else -1]
        if not re.search(self.include, stack.name):
            return target.clone()
        clean, robust = self._roles(stack)
        averaged = self.average is not None and re.search(self.average, stack.name)
        shares = [1.0] * len(robust) if averaged else survey
        along = clean - stack.base
        signatures = ((model - stack.base).sub_(along * share) for model, share in zip(robust, shares, strict=True))
        return weighted_sum([self.scale / len(robust)] * len(robust), signatures).add_(target)

    def _roles(self, stack: Stack) -> tuple[Tensor, Tensor]:  # (*shape), (n, *shape)
        """The clean model and the robust ones."""
        clean, *_ = stack.models
        robust = stack.models[1:] if self.target == "first" else stack.models[1:-1]
        if not len(robust):
            raise ValueError(
                "rws needs a clean model, robust ones and with target='last' one to patch, but got "
                f"{len(stack.models)} models and target={self.target!r}"
            )
        return clean, robust

    def _products(self, stack: Stack) -> list[float]:
        clean, robust = self._roles(stack)
        along = (clean - stack.base).double()
        return [float(((model - stack.base) * along).sum()) for model in [*robust, clean]]
