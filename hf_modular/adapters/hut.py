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
from itertools import pairwise
from typing import Any, ClassVar

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
    require_matrix,
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

    on_linear = True

    def __init__(self, config: HUTConfig, site: Site) -> None:
        super().__init__(config, site)
        require_matrix("HUT", site)
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
        form, A, B, scale = self._factors()
        return weight * _over_kernel(form.mask(A, B, scale, weight), weight), self._shifted(bias)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        form, A, B, scale = self._factors()
        bias = self._shifted(bias)
        if form is not _RowColumn:
            return _MaskedLinear.apply(x, weight, A, B, scale, bias, form)
        y = F.linear(x * A.prod(0).to(x.dtype), weight)  # the weight itself needs no rewriting
        y = y * B.prod(1).mul(scale).to(y.dtype)
        return y if bias is None else y + bias.to(y.dtype)

    def _factors(self) -> tuple[type["_Form"], Tensor, Tensor, Tensor]:
        """The form, A and B (with dropout in training), and the scale."""
        form = _FORMS[self.form]
        A: Tensor = self.A
        B: Tensor = self.B
        if self.dropout and self.training:
            B = form.identity + F.dropout(B - form.identity, self.dropout)
            A = A if form is _LowRank else 1 + F.dropout(A - 1, self.dropout)  # there, no B is no change
        return form, A, B, torch.ones_like(B[:, 0]) if self.scale is None else self.scale

    def _shifted(self, bias: Tensor | None) -> Tensor | None:
        if bias is None or self.scale is None:
            return bias
        bias = bias * self.scale
        return bias if self.shift is None else bias + self.shift


class _Form:
    """How A, B and the scale make the mask, and what A, B and the scale get of its gradient G (out, in)."""

    identity = 1.0  # the entries of B that change nothing

    @staticmethod
    def mask(A: Tensor, B: Tensor, scale: Tensor, weight: Tensor) -> Tensor:  # (out, in)
        raise NotImplementedError

    @staticmethod
    def gradients(G: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError


class _Tile(_Form):
    """scale[o] · A[⌊o·a/out⌋, i] · B[o, ⌊i·b/in⌋], with a tiles along out and b along in.

    The rows of one tile have the low-rank mask B (A[tile] ⊙ inside), where inside[t, i] says whether entry i is
    in tile t: everything is small matrix products, which read and write the large matrices only once.
    """

    @staticmethod
    def mask(A: Tensor, B: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        inside, scaled = _inside(weight.shape[1], B), B * scale.unsqueeze(1)
        return torch.cat([scaled[rows] @ (A[tile] * inside) for tile, rows in enumerate(_rows(A, B))])

    @staticmethod
    def gradients(G: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inside, scaled = _inside(G.shape[1], B), B * scale.unsqueeze(1)
        dA, dscaled = torch.empty_like(A), torch.empty_like(B)
        for tile, rows in enumerate(_rows(A, B)):
            dscaled[rows] = G[rows] @ (A[tile] * inside).T
            dA[tile] = ((scaled[rows].T @ G[rows]) * inside).sum(0)
        return dA, dscaled * scale.unsqueeze(1), (dscaled * B).sum(1)


class _LowRank(_Form):
    """scale · (1 + B A)."""

    identity = 0.0

    @staticmethod
    def mask(A: Tensor, B: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        return torch.addmm(scale.unsqueeze(1), B * scale.unsqueeze(1), A)

    @staticmethod
    def gradients(G: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dscaled = G @ A.T
        dA = (B * scale.unsqueeze(1)).T @ G
        return dA, dscaled * scale.unsqueeze(1), G.sum(1) + (dscaled * B).sum(1)


class _RowColumn(_Form):
    """scale · (Π_k B[:, k]) (Π_k A[k, :])."""

    @staticmethod
    def mask(A: Tensor, B: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        return B.prod(1).mul(scale).unsqueeze(1) * A.prod(0)


_FORMS: dict[str, type[_Form]] = {"tile": _Tile, "low_rank": _LowRank, "row_column": _RowColumn}


class _MaskedLinear(torch.autograd.Function):
    """x (mask(A, B, scale) ⊙ W)ᵀ + bias, keeping x for backward and neither the mask nor the rewritten weight."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,  # (*, in)
        weight: Tensor,  # (out, in), frozen
        A: Tensor,
        B: Tensor,
        scale: Tensor,  # (out,)
        bias: Tensor | None,  # (out,)
        form: type[_Form],
    ) -> Tensor:  # (*, out)
        rewritten = form.mask(A, B, scale, weight).mul_(weight).to(weight.dtype)
        return F.linear(x, rewritten, None if bias is None else bias.to(weight.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, A, B, scale, _, ctx.form = inputs
        ctx.save_for_backward(x, weight, A, B, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, scale = ctx.saved_tensors
        g = gradients[0].reshape(-1, len(weight))  # (n, out)
        dx = dA = dB = dscale = dbias = None
        if ctx.needs_input_grad[0]:
            rewritten = ctx.form.mask(A, B, scale, weight).mul_(weight)
            dx = (g @ rewritten.to(g.dtype)).to(x.dtype).reshape(x.shape)
        if any(ctx.needs_input_grad[2:5]):
            G = g.T @ x.reshape(len(g), -1).to(g.dtype)  # of the rewritten weight
            dA, dB, dscale = ctx.form.gradients(G.to(A.dtype).mul_(weight), A, B, scale)
        if ctx.needs_input_grad[5]:
            dbias = g.sum(0).to(scale.dtype)
        return dx, None, dA, dB, dscale, dbias, None


def _tiles(size: int, count: int, device: torch.device) -> Tensor:  # (size,): the tile of each entry
    return torch.arange(size, device=device) * count // size


def _inside(size: int, B: Tensor) -> Tensor:  # (tiles, size)
    count = B.shape[1]
    return (torch.arange(count, device=B.device).unsqueeze(1) == _tiles(size, count, B.device)).to(B.dtype)


def _rows(A: Tensor, B: Tensor) -> list[slice]:
    """The rows of each tile along out."""
    bounds = [-(-tile * len(B) // len(A)) for tile in range(len(A) + 1)]
    return [slice(low, high) for low, high in pairwise(bounds)]


def _over_kernel(mask: Tensor, weight: Tensor) -> Tensor:  # (out, in) -> (out, in, 1, ...)
    return mask.reshape(*mask.shape, *[1] * (weight.ndim - 2))
