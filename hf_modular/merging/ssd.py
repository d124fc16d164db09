"""Selective synaptic dampening, unlearning without training (Foster, Schoepf, Brintrup, arXiv 2308.07707, AAAI 2024).

    W' = min(dampening · I_D / I_F, 1) W   where I_F > selection · I_D,   else W        (equations 6 and 7)

I_D is the Fisher information on all the data (`fisher` beside the model in a recipe) and I_F that on what the model is
to forget (`forget`), element by element. The paper's α is `selection`, 10 for its convolutional networks and 5 for its
vision transformer; its λ is `dampening`. Its importance is the squared gradient of a mini-batch; that of
`fisher_information`, example by example, is the one that the formula means. Where there is none, nothing is dampened.

Ours: `of="task_vector"` dampens what fine-tuning has added to the base and not the weights themselves, so that what is
forgotten goes back to the base.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hf_modular.merging._method import MergeMethod, Stack


@dataclass(frozen=True)
class SSDConfig(MergeMethod):
    """A model without the parameters that matter for what is to be forgotten alone."""

    name: ClassVar[str] = "ssd"
    base_model: ClassVar[Literal["required", "optional", "unused"]] = "optional"
    model_counts: ClassVar[tuple[int, float]] = (1, 1)
    takes_weights: ClassVar[bool] = False

    selection: float = field(
        default=10.0, metadata={"help": "How many times as important for what is to be forgotten.", "law": "(0, inf)"}
    )
    dampening: float = field(
        default=1.0, metadata={"help": "What the ratio of the importances is multiplied by.", "law": "[0, inf)"}
    )
    of: Literal["weights", "task_vector"] = field(
        default="weights", metadata={"help": "What is dampened: the weights, or what fine-tuning has added."}
    )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"fisher", "forget"})

    @property
    def elementwise(self) -> bool:
        return True

    def merge(self, stack: Stack, survey: Any) -> Tensor:
        if self.of == "task_vector" and not stack.has_base:
            raise ValueError('of="task_vector" needs a base model')
        (model,) = stack.models
        if not self.needs <= stack.companions.keys():
            return model.clone()
        importance, forgotten = (_importance(stack, kind) for kind in ("fisher", "forget"))
        factors = (importance * self.dampening).div_(forgotten).clamp_(max=1)
        kept = torch.where(forgotten > importance * self.selection, factors, 1)
        return model * kept if self.of == "weights" else torch.lerp(stack.base, model, kept)


def _importance(stack: Stack, kind: str) -> Tensor:  # (*shape)
    (fisher,) = stack.companions[kind]
    if not bool((fisher >= 0).all()) or not bool(fisher.isfinite().all()):
        raise ValueError(f"the {kind!r} information for {stack.name} must be finite and not below 0, but is not")
    return fisher
