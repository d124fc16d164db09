"""FLoRA, low-rank core space for N dimensions (Si et al., arXiv 2405.14739, ICLR 2025).

    W' = W + s · G ×₁ P₁ ×₂ P₂ ... ×ₙ Pₙ

A Tucker decomposition: a core G (r₁, ..., rₙ) and one matrix Pᵢ (dᵢ, rᵢ) for each axis of the weight, the axes in
the order in, out, *kernel. For a linear layer that is s · P_out Gᵀ P_inᵀ; a convolution keeps its kernel axes
instead of being flattened into a matrix. Not to be confused with Flora (2402.03293), which compresses gradients.

The paper's: the formula, the start (G zero, Pᵢ normal with variance 0.5 / rᵢ) and the plain scale s. Ours: a
rank that is clipped to short axes, grouped convolutions (whose second axis is in / groups), deconvolutions and
embeddings, and the factored computation: 1×1, then the small kernel, then 1×1.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from hf_modular.adapters._method import (
    AdapterConfig,
    Factors,
    LowRank,
    Site,
    pattern_value,
    require_between,
    require_choice,
    require_rank,
)


@dataclass
class FLoRAConfig(AdapterConfig):
    """Settings of FLoRA (arXiv 2405.14739): a low-rank core and a factor for each axis of the weight.

    Args:
        r (`int`, defaults to 8):
            The rank along every axis, or the axis' length where it is shorter.
        ranks (`list[int]`, *optional*):
            The rank along each axis, in the order in, out, and the kernel's axes; a layer with fewer axes takes the
            first ones. A rank above the length of its axis is refused.
        scale (`float`, defaults to 4.0):
            What the change of the weight is multiplied by.
        dropout (`float`, defaults to 0.0):
            The probability of dropping an entry of the input in training, on the way through the adapter only.
        init_weights (`bool`, defaults to `True`):
            Start at exactly the identity. `False` starts at random, for tests.
        rank_pattern (`dict[str, int | list[int]]`, defaults to `{}`):
            The `r` or the `ranks` of single layers, by name or regular expression.
    """

    r: int = field(default=8, metadata={"help": "Rank along every axis, clipped to short ones."})
    ranks: list[int] | None = field(default=None, metadata={"help": "Ranks along the axes in, out, *kernel."})
    scale: float = field(default=4.0, metadata={"help": "What the change of the weight is multiplied by."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the adapter in training."})
    init_weights: bool = field(default=True, metadata={"help": "Start at the identity; False: at random."})
    rank_pattern: dict[str, int | list[int]] = field(
        default_factory=dict, metadata={"help": "The r or the ranks of single layers, by name."}
    )

    type_name: ClassVar[str] = "HFM_FLORA"

    def __post_init__(self) -> None:
        super().__post_init__()
        named = {"r": self.r, "ranks": self.ranks or self.r}
        named.update({f"rank_pattern[{name!r}]": value for name, value in self.rank_pattern.items()})
        for name, value in named.items():
            for rank in value if isinstance(value, list) else [value]:
                require_rank(name, rank)
        require_between("dropout", self.dropout, 0.0, 1.0, open_high=True)
        require_choice("init_weights", self.init_weights, [True, False])


class FLoRA(LowRank):
    """One FLoRA adapter: `core` (r_in, r_out, *r_kernel), `P_in` (in, r_in), `P_out` and one `P_kernel` per axis."""

    def __init__(self, config: FLoRAConfig, site: Site) -> None:
        super().__init__(config, site, config.scale)
        out_features, in_features, *kernel = site.weight_shape
        sides = [in_features, out_features, *kernel]
        ranks = _ranks(pattern_value(config.rank_pattern, site.name, config.ranks or config.r), site.name, sides)
        self.core = nn.Parameter(torch.zeros(ranks))
        self.P_in, self.P_out, *rest = (_factor(side, rank) for side, rank in zip(sides, ranks, strict=True))
        self.P_kernel = nn.ParameterList(rest)
        if not config.init_weights:
            nn.init.normal_(self.core, std=0.1)

    def factors(self) -> Factors:
        core = self.core.transpose(0, 1)  # (r_out, r_in, *r_kernel)
        for P in self.P_kernel:  # the first kernel axis left goes to the end, where it belongs once all have gone
            core = torch.tensordot(core, P, ([2], [1]))
        return Factors(self.P_out, core, self.P_in.t())


def _ranks(wanted: int | list[int], layer: str, sides: list[int]) -> list[int]:
    """The rank along each side.

    Raises:
        ValueError: If they were given one by one, and there are too few or one is above its side.
    """
    if isinstance(wanted, int):
        return [min(wanted, side) for side in sides]
    if len(wanted) < len(sides):
        raise ValueError(
            f"`ranks` must hold a rank for each axis (in, out, *kernel), but got ranks={wanted} for layer '{layer}', "
            f"whose axes are {sides}."
        )
    for axis, (rank, side) in enumerate(zip(wanted, sides, strict=False)):
        if rank > side:
            name = ["in", "out", *(f"kernel[{k}]" for k in range(len(sides) - 2))][axis]
            raise ValueError(
                f"A rank must not be above the length of its axis, but got ranks={wanted} for layer '{layer}', whose "
                f"axis '{name}' has length {side}. Give this layer other ranks with `rank_pattern`."
            )
    return wanted[: len(sides)]


def _factor(side: int, rank: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(side, rank) * (0.5 / rank) ** 0.5)
