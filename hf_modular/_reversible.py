"""The mathematics of Reversible Model Merging (RMM, arXiv 2510.14163): the factors of n adapters, stored in common.

Adapters of rank r have factors of r rows, and a column of a factor is what the paper calls a position: r numbers for
each input, and r for each output. At each position the n vectors are stored as their mean, the p directions that hold
most of what they differ by, and n · p coefficients:

    μ = 1/n Σ xᵢ,   U = the top-p left singular vectors of [x₁ - μ ... xₙ - μ],   cᵢ = Uᵀ (xᵢ - μ),   xᵢ ≈ μ + U cᵢ

which is the nearest such set of vectors (Eckart and Young), and exact at p = min(r, n - 1). In all that is
(p (r + n) + r) / (r n) of the numbers of the adapters.

The paper's: positions, the closed form, and the storage. Centring by the mean and the singular vectors follow from
these, but its theorem could not be read. Ours: one basis for all positions of a tensor, or of both factors of a layer
(the vectors are then whole tensors); balanced factors, which the adapter determines, instead of those that it has.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Granularity = Literal["position", "tensor", "layer"]
GRANULARITIES = ("position", "tensor", "layer")


class Parts(NamedTuple):
    """One factor of n adapters, stored in common."""

    mean: Tensor  # (r, positions)
    basis: Tensor  # (p, r, positions)
    coefficients: Tensor  # (n, p, positions), or (n, p, 1) where a basis is for all positions


def decomposed(factors: Sequence[Tensor], p: int, granularity: Granularity) -> list[Parts]:
    """The parts of each factor, (n, r, positions), of a layer."""
    if granularity == "layer":
        return _shared(factors, p)
    return [_by_position(factor, p) if granularity == "position" else _shared([factor], p)[0] for factor in factors]


def restored(mean: Tensor, basis: Tensor, coefficients: Tensor) -> Tensor:  # (r, positions)
    """μ + U c for the coefficients (p, positions) or (p, 1) of one adapter, with nothing of the basis's size built."""
    for direction, number in zip(basis, coefficients, strict=True):
        mean = torch.addcmul(mean, direction, number)
    return mean


def projected(
    factors: Sequence[Tensor], means: Sequence[Tensor], bases: Sequence[Tensor], granularity: Granularity
) -> list[Tensor]:
    """The coefficients of another adapter, whose factors are (r, positions): the nearest that the basis has."""
    inner = [
        (basis * (factor - mean)).sum(1, keepdim=True)  # (p, 1, positions)
        for factor, mean, basis in zip(factors, means, bases, strict=True)
    ]
    if granularity == "position":
        return [part[:, 0] for part in inner]
    sums = [part.sum(2) for part in inner]  # (p, 1)
    return [torch.stack(sums).sum(0)] * len(sums) if granularity == "layer" else sums


def storage(n: int, r: int, p: int) -> float:
    """What is stored at each position over what n adapters have there."""
    return (p * (r + n) + r) / (r * n)


def _by_position(factor: Tensor, p: int) -> Parts:  # of (n, r, positions)
    mean, basis, coefficients = _leading(factor.permute(2, 1, 0), p)
    return Parts(mean.t(), basis.permute(2, 1, 0), coefficients.permute(2, 1, 0))


def _shared(factors: Sequence[Tensor], p: int) -> list[Parts]:
    """One basis of whole tensors, and the same coefficients for all of them."""
    flat = torch.cat([factor.flatten(1) for factor in factors], 1)  # (n, numbers)
    mean, basis, coefficients = (part[0] for part in _leading(flat.t().unsqueeze(0), p))
    sizes = [factor[0].numel() for factor in factors]
    pieces = zip(factors, mean.split(sizes), basis.t().split(sizes, 1), strict=True)
    return [
        Parts(center.view(f.shape[1:]), part.reshape(-1, *f.shape[1:]), coefficients.t().unsqueeze(2))
        for f, center, part in pieces
    ]


def _leading(vectors: Tensor, p: int) -> tuple[Tensor, Tensor, Tensor]:  # of (positions, d, n)
    """The means (positions, d), bases (positions, d, p) and coefficients (positions, p, n)."""
    wide = vectors.double()
    mean = wide.mean(2)
    rest = wide - mean.unsqueeze(2)
    if rest.shape[1] < rest.shape[2]:
        basis = torch.linalg.eigh(rest @ rest.mT).eigenvectors.flip(2)[..., :p]
    else:  # the smaller Gram matrix: rest = U S Vᵀ, so U = rest V / S
        squares, V = torch.linalg.eigh(rest.mT @ rest)
        S = squares.clamp_min(0).sqrt().flip(1)[:, None, :p]
        basis = rest @ V.flip(2)[..., :p]
        basis = torch.where(1e-7 * S[..., :1] < S, basis / S, 0.0)
    dtype = vectors.dtype
    return mean.to(dtype), basis.to(dtype), (basis.mT @ rest).to(dtype)
