"""RMM, Reversible Model Merging (arXiv 2510.14163): many adapters in one, any of them back at will.

    xᵢ ≈ μ + U cᵢ   for the vectors xᵢ of n adapters at each position, a column of their A or a row of their B

`hf_modular._reversible` has the mathematics, and what is the paper's and what is ours.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from hf_modular._reversible import Granularity
from hf_modular.merging._method import MergeSettings


@dataclass(frozen=True)
class RMMConfig(MergeSettings):
    """Reversible Model Merging: adapters stored in common, each of which can be had back."""

    name: ClassVar[str] = "rmm"
    base_model: ClassVar[Literal["required", "optional", "unused"]] = "optional"
    model_counts: ClassVar[tuple[int, float]] = (2, float("inf"))

    p: int = field(
        default=2,
        metadata={
            "help": "The directions in which the tasks may differ; all are exact from n - 1 on.",
            "law": "[1, inf)",
        },
    )
    granularity: Granularity = field(
        default="position",
        metadata={
            "help": "What has directions of its own: each `position`, as in the paper, each `tensor`, or each `layer`."
        },
    )
    canonicalize: bool = field(
        default=False, metadata={"help": "Balance the factors first, which the paper does not: U √S and √S Vᵀ."}
    )
    rank: int | None = field(
        default=None,
        metadata={
            "help": "What each model is reduced to first, by the truncated SVD; full fine-tunes need it.",
            "law": "[1, inf)",
        },
    )
