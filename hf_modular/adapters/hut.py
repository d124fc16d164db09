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
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_modular.adapters._method import (
    Adapter,
    AdapterConfig,
    Site,
    pattern_value,
    plus,
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
        form, *factors = self._factors()
        return weight * _over_kernel(form.mask(*factors), weight), self._shifted(bias)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        form, *factors = self._factors()
        bias = self._shifted(bias)
        if form is _RowColumn:
            return _ScaledLinear.apply(x, weight, *factors, bias)[0]
        return _MaskedLinear.apply(x, weight, *factors, bias, form)

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
    """How A, B and the scale make the mask, as a matrix product L R for each tile of rows.

    So everything is small matrix products, which read and write the large matrices only once.
    """

    identity = 1.0  # the entries of B that change nothing

    @staticmethod
    def products(A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:  # (tiles, rows, k), (tiles, k, in)
        """L and R."""
        raise NotImplementedError

    @staticmethod
    def gradients(
        dL: Tensor, dR: Tensor, A: Tensor, B: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:  # as A, B, scale
        """What A, B and the scale get of the gradients of L and R."""
        raise NotImplementedError

    @classmethod
    def mask(cls, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:  # (out, in)
        return _joined(torch.bmm(*cls.products(A, B, scale)), len(B))

    @classmethod
    def rewritten(cls, weight: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:  # (out, in)
        """mask ⊙ W."""
        return cls.mask(A, B, scale).mul_(weight)

    @classmethod
    def gathered(
        cls,
        G: Tensor,  # (out, in): the gradient of mask ⊙ W, times W
        A: Tensor,
        B: Tensor,
        scale: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # as A, B, scale
        """What A, B and the scale get of it."""
        L, R = cls.products(A, B, scale)
        G = _split(G, len(L))
        return cls.gradients(torch.bmm(G, R.mT), torch.bmm(L.mT, G), A, B, scale)


class _Tile(_Form):
    """scale[o] · A[⌊o·a/out⌋, i] · B[o, ⌊i·b/in⌋], with a tiles along out and b along in.

    The rows of tile t have the mask B Rₜ, where row u of Rₜ (b, in) holds the entries of A[t] in tile u, and zeros.
    """

    @staticmethod
    def products(A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        parts = _split(A, B.shape[1], 1)  # (a, b, entries)
        R = torch.diag_embed(parts.mT, dim1=1, dim2=2)  # (a, b, b, entries)
        return _split(B * scale.unsqueeze(1), len(A)), _joined(R, A.shape[1], 2)

    @staticmethod
    def gradients(dL: Tensor, dR: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = _split(dR, B.shape[1], 2).diagonal(dim1=1, dim2=2).mT  # (a, b, entries)
        dscaled = _joined(dL, len(B))
        return _joined(parts, A.shape[1], 1), dscaled * scale.unsqueeze(1), (dscaled * B).sum(1)

    # where all tiles are of one size, no product is needed: A and B have the axes of the tiled weight, or 1

    @classmethod
    def rewritten(cls, weight: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
        tiles = len(A), B.shape[1]
        if _uneven(weight, *tiles):
            return super().rewritten(weight, A, B, scale)
        over_A, over_B = cls._over_tiles(A, B * scale.unsqueeze(1))
        return (_tiled(weight, *tiles) * over_A).mul_(over_B).view(weight.shape)

    @classmethod
    def gathered(cls, G: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tiles = len(A), B.shape[1]
        if _uneven(G, *tiles):
            return super().gathered(G, A, B, scale)
        over_A, over_B = cls._over_tiles(A, B * scale.unsqueeze(1))
        G = _tiled(G, *tiles)
        dscaled = (G * over_A).sum(3).view(B.shape)
        return (G * over_B).sum(1).view(A.shape), dscaled * scale.unsqueeze(1), (dscaled * B).sum(1)

    @staticmethod
    def _over_tiles(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:  # (a, 1, b, entries), (a, rows, b, 1)
        return A.view(len(A), 1, B.shape[1], -1), B.view(len(A), -1, B.shape[1], 1)


class _LowRank(_Form):
    """scale · (1 + B A): one tile, in which the 1 is one more column of B and row of A."""

    identity = 0.0

    @staticmethod
    def products(A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        scaled = scale.unsqueeze(1)
        return torch.cat([B * scaled, scaled], 1).unsqueeze(0), torch.cat([A, torch.ones_like(A[:1])]).unsqueeze(0)

    @staticmethod
    def gradients(dL: Tensor, dR: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dscaled, done = dL[0, :, :-1], dL[0, :, -1]
        return dR[0, :-1], dscaled * scale.unsqueeze(1), done + (dscaled * B).sum(1)


class _RowColumn(_Form):
    """scale · (Π_k B[:, k]) (Π_k A[k, :])."""

    @staticmethod
    def products(A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return B.prod(1).mul(scale).reshape(1, -1, 1), A.prod(0).reshape(1, 1, -1)

    @staticmethod
    def gradients(dL: Tensor, dR: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        drows, others = dL.reshape(-1, 1), _others(B.T).T
        return dR.reshape(1, -1) * _others(A), drows * scale.unsqueeze(1) * others, (drows * B.prod(1, True)).flatten()


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
        rewritten = form.rewritten(weight, A, B, scale).to(weight.dtype)
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
            rewritten = ctx.form.rewritten(weight, A, B, scale)
            dx = (g @ rewritten.to(g.dtype)).to(x.dtype).reshape(x.shape)
        if any(ctx.needs_input_grad[2:5]):
            G = g.T @ x.reshape(len(g), weight.shape[1]).to(g.dtype)  # of the rewritten weight
            dA, dB, dscale = ctx.form.gathered(G.to(A.dtype).mul_(weight), A, B, scale)
        if ctx.needs_input_grad[5]:
            dbias = g.sum(0).to(scale.dtype)
        return dx, None, dA, dB, dscale, dbias, None


class _ScaledLinear(torch.autograd.Function):
    """rows ⊙ ((x ⊙ columns) Wᵀ) + bias, for the mask rows columnsᵀ: the weight itself needs no rewriting.

    Gives the product before it is scaled too, which backward needs: as a result like any other, so that gradients of
    gradients are right.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,  # (*, in)
        weight: Tensor,  # (out, in), frozen
        A: Tensor,
        B: Tensor,
        scale: Tensor,  # (out,)
        bias: Tensor | None,  # (out,)
    ) -> tuple[Tensor, Tensor]:  # (*, out), twice
        rows, columns = (factor.flatten() for factor in _RowColumn.products(A, B, scale))
        product = F.linear(x * columns.to(x.dtype), weight)
        y = product * rows.to(product.dtype)
        return y if bias is None else plus(y, bias.to(y.dtype)), product

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, A, B, scale, _ = inputs
        ctx.set_materialize_grads(False)  # no zeros for the product, which is as large as y
        ctx.save_for_backward(x, weight, A, B, scale, output[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dproduct: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, A, B, scale, product = ctx.saved_tensors
        g = (torch.zeros_like(product) if dy is None else dy).reshape(-1, len(weight))  # (n, out)
        rows, columns = (factor.flatten() for factor in _RowColumn.products(A, B, scale))
        scaled = g * rows.to(g.dtype)
        scaled = scaled if dproduct is None else scaled + dproduct.reshape(g.shape)
        dx = scaled @ weight.to(g.dtype)  # of x ⊙ columns
        dcolumns = (dx * x.reshape(dx.shape)).sum(0, dtype=A.dtype)
        drows = (g * product.reshape(g.shape)).sum(0, dtype=A.dtype)
        factors = _RowColumn.gradients(drows, dcolumns, A, B, scale)
        dbias = g.sum(0).to(scale.dtype) if ctx.needs_input_grad[5] else None
        return (dx * columns).to(x.dtype).reshape(x.shape), None, *factors, dbias


def _others(factors: Tensor) -> Tensor:  # (r, n)
    """The product of all rows but each one: of the r - 1 that follow it, counted in a circle."""
    r = len(factors)
    return torch.cat([factors[1:], factors])[: 2 * r - 2].unfold(0, r - 1, 1).prod(-1)


def _split(tensor: Tensor, tiles: int, axis: int = 0) -> Tensor:  # (*, size, *) -> (*, tiles, entries, *)
    """The tiles along an axis, with zeros behind those that are shorter than the longest."""
    size = tensor.shape[axis]
    if size % tiles:
        place, longest = _places(size, tiles, tensor.device)
        padded = [*tensor.shape[:axis], tiles * longest, *tensor.shape[axis + 1 :]]
        tensor = tensor.new_zeros(padded).index_copy(axis, place, tensor)
    return tensor.unflatten(axis, (tiles, -1))


def _joined(parts: Tensor, size: int, axis: int = 0) -> Tensor:  # (*, tiles, entries, *) -> (*, size, *)
    """The inverse of `_split`."""
    padded = parts.flatten(axis, axis + 1)
    if padded.shape[axis] == size:
        return padded
    return padded.index_select(axis, _places(size, parts.shape[axis], parts.device)[0])


def _places(size: int, tiles: int, device: torch.device) -> tuple[Tensor, int]:  # (size,)
    """Where each entry lies if all tiles are as long as the longest, and how long that is."""
    entry, longest = torch.arange(size, device=device), -(-size // tiles)
    tile = entry * tiles // size
    first = (tile * size + tiles - 1) // tiles
    return tile * longest + entry - first, longest


def _uneven(weight: Tensor, a: int, b: int) -> bool:
    return bool(weight.shape[0] % a or weight.shape[1] % b)


def _tiled(weight: Tensor, a: int, b: int) -> Tensor:  # (out, in) -> (a, rows, b, entries)
    return weight.reshape(a, -1, b, weight.shape[1] // b)


def _over_kernel(mask: Tensor, weight: Tensor) -> Tensor:  # (out, in) -> (out, in, 1, ...)
    return mask.reshape(*mask.shape, *[1] * (weight.ndim - 2))
