"""Adapters of a chosen type that come as near as possible to given changes of weights.

- LoRA: the truncated SVD, the nearest matrix of a rank.
- FLoRA: the same for matrices; for kernels the higher-order orthogonal iteration (HOOI), begun with the HOSVD.
- SSF: γ of each channel by least squares, ⟨W', W⟩ / ⟨W, W⟩; β is what the bias then lacks.
- HUT: its two factors by alternating least squares, W' ≈ M(A, B) ⊙ W; the shift is the change of the bias.

Distances and norms are those of weight and bias together.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from peft import LoraConfig
from torch import Tensor

from hf_modular.adapter_merging._matrix import Dense, LowRank, Rank, truncated
from hf_modular.adapter_merging._source import PREFIX, Change
from hf_modular.adapters import FLoRAConfig, HUTConfig, SSFConfig
from hf_modular.adapters._method import Site, pattern_value

_SWEEPS = 200
_CONVERGED = 1e-9  # of the squared norm: what a sweep must gain to be followed by another

BaseLayer = Callable[[], tuple[Tensor, Tensor | None]]  # the weight (out, in, *kernel) and the bias


class Fitted(NamedTuple):
    """What an adapter needs on one layer."""

    tensors: dict[str, Tensor]  # by the ends of their names
    rank: Any  # of the layer, if it has one
    error: float  # squared distance from what was wanted
    norm: float  # squared norm of what was wanted


class Fit(Protocol):
    """A type of adapter with its settings."""

    def __call__(self, site: Site, change: Change, base: BaseLayer, exact_rank: int | None) -> Fitted:
        """The adapter of one layer; `exact_rank` is one at which nothing that is of low rank needs to be lost."""
        ...

    def adapter(self, fitted: Mapping[str, Fitted]) -> tuple[Any, dict[str, Tensor]]:
        """The config, still without targets, and all tensors by their names in a file."""
        ...


def can_fit(config: Any) -> bool:
    return isinstance(config, tuple(_FITS))


def fit_of(config: Any, rank: Rank) -> Fit:
    """How to fit adapters like `config`, or LoRA at a rank."""
    if config is None:
        return LoRAFit(LoraConfig(), rank)
    if rank is not None:
        raise ValueError(f"Give `rank` or `into`, not both, but got {rank=} and a {type(config).__name__}.")
    require_fit(config)
    return next(fit for kind, fit in _FITS.items() if isinstance(config, kind))(config)


def require_fit(config: Any) -> None:
    """Refuse a type that cannot be fitted."""
    if not can_fit(config):
        raise ValueError(
            f"Changes of weights are fitted by {[kind.__name__ for kind in _FITS]}, but got {type(config).__name__}."
        )


@dataclass(frozen=True, eq=False)
class LoRAFit:
    """LoRA at the ranks of its config, or at `rank` and with a scaling of 1."""

    config: LoraConfig
    rank: Rank = None
    chosen: bool = False  # whether the config says which ranks

    @classmethod
    def of(cls, config: LoraConfig) -> "LoRAFit":
        if config.use_dora or config.modules_to_save or config.bias != "none":
            raise ValueError(f"Only plain LoRA can be fitted, but got {config.use_dora=}, {config.modules_to_save=}.")
        return cls(config, chosen=True)

    def __call__(self, site: Site, change: Change, base: BaseLayer, exact_rank: int | None) -> Fitted:
        if site.is_norm:
            raise ValueError(
                f"LoRA needs weights with two sides, but layer '{site.name}' is a norm. Choose another type, such as "
                "`into=SSFConfig()`."
            )
        product, lost, norm = truncated(change.weight, self._rank(site, change, exact_rank))
        A, B = product.down.unflatten(1, site.weight_shape[1:]), product.up
        B = B.reshape(*B.shape, *[1] * (A.ndim - 2))
        ends = ("lora_embedding_A", "lora_embedding_B") if site.kind == "Embedding" else _MATRICES
        tensors = dict(zip(ends, (A, B), strict=True))
        if change.bias is not None and bool(change.bias.any()):
            tensors["lora_B.bias"] = change.bias
            norm += _squared(change.bias)
        return Fitted(tensors, len(A), lost, norm)

    def adapter(self, fitted: Mapping[str, Fitted]) -> tuple[LoraConfig, dict[str, Tensor]]:
        ranks = {name: layer.rank for name, layer in fitted.items()}
        r = self.config.r if self.chosen else Counter(ranks.values()).most_common(1)[0][0]
        biased = any("lora_B.bias" in layer.tensors for layer in fitted.values())
        config = replace(
            self.config,
            r=r,
            lora_alpha=self.config.lora_alpha if self.chosen else r,
            rank_pattern={f"^{name}": rank for name, rank in ranks.items() if rank != r},
            lora_bias=biased,
            init_lora_weights=True,
        )
        tensors = {}
        for name, layer in fitted.items():
            tensors.update(_named(name, self._scaled(name, layer, config)))
        return config, tensors

    def _rank(self, site: Site, change: Change, exact_rank: int | None) -> Rank:
        if self.chosen:
            return pattern_value(self.config.rank_pattern or {}, site.name, self.config.r)
        if self.rank is None and isinstance(change.weight, Dense):
            if exact_rank is None:
                raise ValueError(
                    f"What is added to layer '{site.name}' has no low rank of its own: state the `rank` of the result."
                )
            return exact_rank
        return self.rank

    def _scaled(self, name: str, layer: Fitted, config: LoraConfig) -> dict[str, Tensor]:
        """The tensors for the scaling that the config gives to the layer."""
        alpha = pattern_value(config.alpha_pattern or {}, name, config.lora_alpha)
        scaling = alpha / (layer.rank**0.5 if config.use_rslora else layer.rank)
        tensors = dict(layer.tensors)
        if config.lora_bias:
            if "lora_B.weight" not in tensors:
                raise ValueError(
                    f"A LoRA with biases (`lora_bias`) cannot be on an embedding, but '{name}' is one. Merge into the "
                    "model's weights instead, or leave the embedding out."
                )
            tensors.setdefault("lora_B.bias", torch.zeros_like(tensors["lora_B.weight"].flatten(1)[:, 0]))
        return {end: t / scaling if "B" in end and scaling != 1 else t for end, t in tensors.items()}


_MATRICES = ("lora_A.weight", "lora_B.weight")


@dataclass(frozen=True, eq=False)
class _OwnFit:
    """What the types of this package have in common."""

    config: Any

    def adapter(self, fitted: Mapping[str, Fitted]) -> tuple[Any, dict[str, Tensor]]:
        slot = f"{self.config.type_name.lower()}_adapter"
        tensors: dict[str, Tensor] = {}
        for name, layer in fitted.items():
            tensors.update(_named(f"{name}.{slot}", layer.tensors))
        return replace(self.config), tensors


class FLoRAFit(_OwnFit):
    """FLoRA: the SVD of a matrix, HOOI of a kernel."""

    def __call__(self, site: Site, change: Change, base: BaseLayer, exact_rank: int | None) -> Fitted:
        out_features, in_features, *kernel = site.weight_shape
        sides = [in_features, out_features, *kernel]
        wanted = pattern_value(self.config.rank_pattern, site.name, self.config.ranks or self.config.r)
        ranks = [min(wanted, side) for side in sides] if isinstance(wanted, int) else wanted[: len(sides)]
        core, factors = _tucker(change, ranks, site) if kernel else _as_tucker(change, ranks)
        approximation = core
        for factor in factors:  # the first axis left goes to the end, where it belongs once all have gone
            approximation = torch.tensordot(approximation, factor, ([0], [1]))
        tensors = {"core": core / self.config.scale, "P_in": factors[0], "P_out": factors[1]}
        tensors |= {f"P_kernel.{axis}": factor for axis, factor in enumerate(factors[2:])}
        delta = change.weight.dense().unflatten(1, site.weight_shape[1:])
        lost, norm = _distance(approximation.transpose(0, 1), delta, change.bias, None)
        return Fitted(tensors, ranks, lost, norm)


class SSFFit(_OwnFit):
    """SSF by least squares."""

    def __call__(self, site: Site, change: Change, base: BaseLayer, exact_rank: int | None) -> Fitted:
        weight, bias = base()
        rows = weight.reshape(len(weight), -1)
        delta = change.weight.dense().to(rows)
        scale = 1 + _ratio((delta * rows).sum(1), rows.square().sum(1))
        tensors = {"scale": scale}
        if self.config.shift is True or (self.config.shift == "auto" and bias is not None):
            tensors["shift"] = torch.zeros_like(scale) if change.bias is None else change.bias.to(scale)
        shifted = tensors.get("shift")
        if bias is not None and shifted is not None:
            tensors["shift"] = shifted - (scale - 1) * bias
        elif bias is not None:
            shifted = (scale - 1) * bias
        lost, norm = _distance((scale - 1).unsqueeze(1) * rows, delta, change.bias, shifted)
        return Fitted(tensors, None, lost, norm)


class HUTFit(_OwnFit):
    """HUT by alternating least squares."""

    def __call__(self, site: Site, change: Change, base: BaseLayer, exact_rank: int | None) -> Fitted:
        if site.is_norm:
            raise ValueError(f"HUT needs a weight with two sides, but layer '{site.name}' is a norm.")
        weight, bias = base()
        weight = weight.flatten(2) if weight.ndim > 2 else weight.unsqueeze(2)  # (out, in, kernel)
        delta = change.weight.dense().to(weight).reshape(weight.shape)
        r = pattern_value(self.config.rank_pattern, site.name, self.config.r)
        inner, squares = ((weight + delta) * weight).sum(2), weight.square().sum(2)  # of W' and W, of W
        A, B, scale, mask = _MASKS[self.config.form](inner, squares, r, scaled=self.config.scale_shift)
        tensors, shifted = {"A": A, "B": B}, None
        if self.config.scale_shift:
            tensors["scale"] = scale
        if self.config.scale_shift and bias is not None:
            shifted = torch.zeros_like(bias) if change.bias is None else change.bias.to(bias)
            tensors["shift"] = shifted - (scale - 1) * bias
        lost, norm = _distance((mask - 1).unsqueeze(2) * weight, delta, change.bias, shifted)
        return Fitted(tensors, r, lost, norm)


_FITS: dict[Any, Callable[[Any], Fit]] = {
    LoraConfig: LoRAFit.of,
    FLoRAConfig: FLoRAFit,
    SSFConfig: SSFFit,
    HUTConfig: HUTFit,
}


def _named(layer: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{PREFIX}{layer}.{end}": tensor.contiguous() for end, tensor in tensors.items()}


def _squared(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


def _ratio(numerator: Tensor, denominator: Tensor, otherwise: float = 0.0) -> Tensor:
    known = denominator > 0
    return torch.where(known, numerator / denominator.where(known, 1), otherwise)


def _distance(fitted: Tensor, wanted: Tensor, bias: Tensor | None, shifted: Tensor | None) -> tuple[float, float]:
    """The squared distance of two changes, and the squared norm of the wanted one."""
    zero = torch.zeros(())
    bias, shifted = (zero if b is None else b for b in (bias, shifted))
    wanted = wanted.reshape(fitted.shape).to(fitted)
    return _squared(fitted - wanted) + _squared(shifted - bias), _squared(wanted) + _squared(bias)


# -- Tucker ------------------------------------------------------------------------------------------------------


def _as_tucker(change: Change, ranks: list[int]) -> tuple[Tensor, list[Tensor]]:
    """A matrix: the core (r_in, r_out) holds singular values, and what a larger rank would add is nothing."""
    product = truncated(change.weight, min(ranks)).matrix
    up, down = (torch.linalg.qr(factor) for factor in (product.up, product.down.t()))
    core = down.R @ up.R.t()  # (r, r)
    pads = [rank - size for rank, size in zip(ranks, core.shape, strict=True)]
    core = torch.nn.functional.pad(core, (0, pads[1], 0, pads[0]))
    factors = zip((down.Q, up.Q), pads, strict=True)
    return core, [torch.nn.functional.pad(Q, (0, pad)) for Q, pad in factors]


def _tucker(change: Change, ranks: list[int], site: Site) -> tuple[Tensor, list[Tensor]]:
    """HOOI: each factor in turn spans the leading singular vectors of what the others leave."""
    delta = change.weight.dense().double().unflatten(1, site.weight_shape[1:]).transpose(0, 1)  # (in, out, *kernel)
    factors = [_leading(delta, axis, rank) for axis, rank in enumerate(ranks)]
    held, norm = 0.0, _squared(delta)
    for _ in range(_SWEEPS):
        for axis, rank in enumerate(ranks):
            factors[axis] = _leading(_projected(delta, factors, leave=axis), axis, rank)
        core = _projected(delta, factors)
        before, held = held, _squared(core)
        if held - before <= _CONVERGED * norm:
            break
    dtype = change.weight.dense().dtype
    return core.to(dtype), [factor.to(dtype) for factor in factors]


def _leading(tensor: Tensor, axis: int, rank: int) -> Tensor:  # (size of the axis, rank)
    unfolded = tensor.movedim(axis, 0).flatten(1)
    return torch.linalg.eigh(unfolded @ unfolded.t()).eigenvectors[:, -rank:].flip(1)


def _projected(tensor: Tensor, factors: Iterable[Tensor], leave: int | None = None) -> Tensor:
    """The tensor in the coordinates of the factors' columns, along all axes but one."""
    for axis, factor in enumerate(factors):
        if axis != leave:
            tensor = torch.tensordot(tensor, factor, ([axis], [0])).movedim(-1, axis)
    return tensor


# -- the masks of HUT: A, B, the scale and the mask that minimise Σ (W' - M ⊙ W)², of which `inner` and `squares` are
# W' ⊙ W and W ⊙ W, summed over the kernel

Mask = tuple[Tensor, Tensor, Tensor, Tensor]


def _tiled(inner: Tensor, squares: Tensor, r: int, *, scaled: bool) -> Mask:
    rows, columns = (torch.arange(n, device=inner.device) * min(r, n) // n for n in inner.shape)
    A = torch.ones_like(inner[: rows[-1] + 1])  # (tiles, in)
    B = torch.ones_like(inner[:, : columns[-1] + 1])  # (out, tiles), which a scale would add nothing to
    gain = -torch.inf
    for _ in range(_SWEEPS):
        wide = B[:, columns]
        A = _ratio(_over(inner * wide, rows, A), _over(squares * wide.square(), rows, A), 1.0)
        wide = A[rows]
        B = _ratio(_over(inner * wide, columns, B.t(), 1), _over(squares * wide.square(), columns, B.t(), 1), 1.0).t()
        mask = wide * B[:, columns]
        before, gain = gain, _gain(inner, squares, mask)
        if gain - before <= _CONVERGED * float(squares.sum()):
            break
    return A, B.contiguous(), torch.ones_like(B[:, 0]), mask


def _gain(inner: Tensor, squares: Tensor, mask: Tensor) -> float:
    """What the mask takes off the squared distance."""
    return float((2 * inner * mask - squares * mask.square()).double().sum())


def _over(values: Tensor, tiles: Tensor, like: Tensor, axis: int = 0) -> Tensor:  # (tiles, other side)
    """The sums over the rows, or with axis 1 the columns, of each tile."""
    return torch.zeros_like(like).index_add_(0, tiles, values.t() if axis else values)


def _row_column(inner: Tensor, squares: Tensor, r: int, *, scaled: bool) -> Mask:
    row, column, scale, mask = _tiled(inner, squares, 1, scaled=scaled)
    A, B = torch.ones(r, inner.shape[1]).to(row), torch.ones(len(inner), r).to(row)
    A[0], B[:, 0] = row[0], column[:, 0]
    return A, B, scale, mask


def _low_rank(inner: Tensor, squares: Tensor, r: int, *, scaled: bool) -> Mask:
    """M = γ 1ᵀ + C A with C = γ B: least squares for γ and C, then for A, weighted by W²."""
    one = torch.ones_like(inner[:1])
    start = (inner - squares) / (squares + 1e-3 * squares.mean())
    A, _ = _padded(truncated(Dense(start - start.mean(1, keepdim=True)), r).matrix, r)
    scale, gain = torch.ones_like(inner[:, :1]), -torch.inf
    for _ in range(_SWEEPS):
        if scaled:
            scale, C = _weighted(inner, squares, torch.cat([one, A])).split([1, r], 1)
        else:
            C = _weighted(inner - squares, squares, A)
        A = _weighted((inner - squares * scale).t(), squares.t(), C.t()).t()
        mask = scale + C @ A
        before, gain = gain, _gain(inner, squares, mask)
        if gain - before <= _CONVERGED * float(squares.sum()):
            break
    return A.contiguous(), C / scale, scale[:, 0].contiguous(), mask


def _padded(product: LowRank, r: int) -> tuple[Tensor, Tensor]:
    missing = r - product.rank
    return (
        torch.nn.functional.pad(product.down, (0, 0, 0, missing)),
        torch.nn.functional.pad(product.up, (0, missing)),
    )


def _weighted(rest: Tensor, squares: Tensor, A: Tensor) -> Tensor:  # (out, r)
    """For each row the b that minimises Σᵢ sᵢ (b·Aᵢ)² - 2 restᵢ b·Aᵢ: (A diag(s) Aᵀ) b = A rest."""
    pairs = (A.unsqueeze(0) * A.unsqueeze(1)).flatten(0, 1)  # (r², in)
    gram = (squares @ pairs.t()).double().unflatten(1, (len(A), len(A)))
    ridge = 1e-9 * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    gram = gram + ridge[:, None, None] * torch.eye(len(A), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram, (rest @ A.t()).double()).to(A)


_MASKS = {"tile": _tiled, "row_column": _row_column, "low_rank": _low_rank}
