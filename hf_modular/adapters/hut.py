"""HUT, Hadamard Updated Transformation (Zhang, Zhou, Chen, arXiv 2409.13501).

    W' = γ ⊙ (A↑ ⊙ W ⊙ B↑),   b' = γ ⊙ b + β

The weight is multiplied elementwise from both sides by two low-rank matrices that are brought to its shape, and
the output is scaled and shifted.

The operator is reconstructed. The paper says that the new weight is a Hadamard transformation of the old one by
two low-rank matrices, with a scale and a shift of the output; how the matrices are brought to the weight's shape
it leaves open in what can be read of it. The readings, for W of shape (out, in):

- `form="tile"`: A (r, in) and B (out, r) are repeated, W'[o, i] = A[⌊o·r/out⌋, i] · W[o, i] · B[o, ⌊i·r/in⌋].
  It is the default since the rank then matters while the cost does not depend on it, as the paper claims. Tiles
  are contiguous (ours); where r does not divide a side they differ in size by one, and a side shorter than r has
  as many tiles as entries.
- `form="row_column"`: the columns of A multiply one after the other, and so do those of B:
  W' = diag(Π_k B[:, k]) W diag(Π_k A[k, :]).
- `form="low_rank"`: W' = W ⊙ (1 + B A), as HiRA; B starts at zero.

Ours beside the form: the start (exactly the identity), the dropout, and no shift where the layer has no bias.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_modular.adapters._method import (
    Adapter,
    AdapterConfig,
    Site,
    pattern_value,
    require_between,
    require_choice,
    require_rank,
)


@dataclass
class HUTConfig(AdapterConfig):
    """Settings of HUT (arXiv 2409.13501); see `hf_modular.adapters.hut` for what is reconstructed.

    Args:
        r (`int`, defaults to 8):
            The rank of the two matrices: the number of tiles along each side with `form="tile"`.
        form (`str`, defaults to `"tile"`):
            How the matrices meet the weight: `"tile"`, `"row_column"` or `"low_rank"`.
        scale_shift (`bool`, defaults to `True`):
            Whether the output is scaled and, where the layer has a bias, shifted.
        init_weights (`bool`, defaults to `True`):
            Start at exactly the identity. `False` starts at random, for tests.
        dropout (`float`, defaults to 0.0):
            In training, the probability with which an entry's departure from the identity is left out.
        rank_pattern (`dict[str, int]`, defaults to `{}`):
            Ranks of single layers, by name or regular expression.
    """

    r: int = field(default=8, metadata={"help": "Rank of the two matrices; with form='tile' the tiles along a side."})
    form: str = field(default="tile", metadata={"help": "How they meet the weight: tile, row_column or low_rank."})
    scale_shift: bool = field(default=True, metadata={"help": "Scale the output; shift it where there is a bias."})
    init_weights: bool = field(default=True, metadata={"help": "Start at the identity; False: at random."})
    dropout: float = field(default=0.0, metadata={"help": "Probability of leaving an entry's change out in training."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Ranks of single layers, by name."})

    type_name: ClassVar[str] = "HFM_HUT"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_rank("r", self.r)
        for name, rank in self.rank_pattern.items():
            require_rank(f"rank_pattern[{name!r}]", rank)
        require_choice("form", self.form, ["tile", "row_column", "low_rank"])
        require_between("dropout", self.dropout, 0.0, 1.0, open_high=True)


class HUT(Adapter):
    """One HUT adapter: `A` and `B`, and `scale` (out,) and `shift` (out,) if asked for."""

    def __init__(self, config: HUTConfig, site: Site) -> None:
        super().__init__(config, site)
        if site.is_norm:
            raise TypeError(f"HUT needs a weight with two sides, but layer '{site.name}' is a norm.")
        out_features, in_features = site.weight_shape[:2]
        r = pattern_value(config.rank_pattern, site.name, config.r)
        tiled = config.form == "tile"
        self.form, self.dropout = config.form, config.dropout
        self.A = nn.Parameter(torch.ones(min(r, out_features) if tiled else r, in_features))
        self.B = nn.Parameter(torch.ones(out_features, min(r, in_features) if tiled else r))
        self.scale = nn.Parameter(torch.ones(out_features)) if config.scale_shift else None
        self.shift = nn.Parameter(torch.zeros(out_features)) if config.scale_shift and site.has_bias else None
        self._start(config)

    @torch.no_grad()
    def _start(self, config: HUTConfig) -> None:
        if self.form == "low_rank":  # 1 + BA
            nn.init.kaiming_uniform_(self.A, a=5**0.5)
            self.B.zero_()
        if not config.init_weights:
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)

    def transform(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight = self._multiplied(weight)
        if self.scale is None:
            return weight, bias
        weight = weight * _over_rows(self.scale, weight)
        bias = None if bias is None else bias * self.scale
        return weight, bias if bias is None or self.shift is None else bias + self.shift

    def _multiplied(self, weight: Tensor) -> Tensor:  # (out, in, *kernel)
        if self.form == "low_rank":
            return weight * _over_kernel(1 + self._drop(self.B @ self.A), weight)
        A, B = 1 + self._drop(self.A - 1), 1 + self._drop(self.B - 1)
        if self.form == "row_column":
            return weight * _over_kernel(B.prod(1, keepdim=True) * A.prod(0), weight)
        rows, columns = weight.shape[:2]
        A, B = A[_tiles(rows, len(A), A)], B[:, _tiles(columns, B.shape[1], B)]
        return weight * _over_kernel(A, weight) * _over_kernel(B, weight)

    def _drop(self, change: Tensor) -> Tensor:
        return F.dropout(change, self.dropout, self.training) if self.dropout else change


def _tiles(size: int, count: int, like: Tensor) -> Tensor:  # (size,): the tile of each entry
    return torch.arange(size, device=like.device) * count // size


def _over_kernel(mask: Tensor, weight: Tensor) -> Tensor:  # (out, in) -> (out, in, 1, ...)
    return mask.reshape(*mask.shape, *[1] * (weight.ndim - 2))


def _over_rows(scale: Tensor, weight: Tensor) -> Tensor:  # (out,) -> (out, 1, ...)
    return scale.reshape(-1, *[1] * (weight.ndim - 1))
