"""Changes of weights as matrices (out, in · kernel): dense, or of low rank as up · down; their sums and truncations.

A sum of products is the product of the stacked factors, Σ cᵢ Uᵢ Dᵢ = [c₁U₁ ... cₙUₙ] [D₁; ...; Dₙ], so it is never
built: with the QR decompositions Q R of the stacked factors its singular values are those of the small core R_u R_dᵀ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

EXACT = 1024  # a dense matrix with a side up to this is decomposed by LAPACK, larger ones by subspace iteration
_OVERSAMPLED = 16  # columns that the iteration carries beside those that are wanted
_ITERATIONS = 40
_CONVERGED = 1e-7  # of the squared norm: what an iteration must gain to be followed by another

Rank = int | float | None  # a number, the share of the squared norm to keep, or as much as it takes to be exact


@dataclass(frozen=True, eq=False)
class LowRank:
    """up · down."""

    up: Tensor  # (out, r)
    down: Tensor  # (r, columns)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.up), self.down.shape[1]

    @property
    def rank(self) -> int:
        return len(self.down)

    def dense(self) -> Tensor:  # (out, columns)
        return self.rows(0, len(self.up))

    def rows(self, start: int, stop: int) -> Tensor:  # (stop - start, columns)
        return self.up[start:stop] @ self.down

    def scaled(self, factor: float) -> "LowRank":
        return LowRank(self.up * factor, self.down)


@dataclass(frozen=True, eq=False)
class Dense:
    """A matrix as it is."""

    matrix: Tensor  # (out, columns)

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    def dense(self) -> Tensor:
        return self.matrix

    def rows(self, start: int, stop: int) -> Tensor:
        return self.matrix[start:stop]

    def scaled(self, factor: float) -> "Dense":
        return Dense(self.matrix * factor)


Matrix = LowRank | Dense


class Truncated(NamedTuple):
    """The nearest matrix of a rank, the squared distance to it, and the squared norm of what was truncated."""

    matrix: LowRank
    error: float
    norm: float


def summed(terms: Sequence[Matrix], coefficients: Sequence[float]) -> Matrix:
    """Σ cᵢ Mᵢ, of low rank if all terms are."""
    scaled = [term.scaled(c) for term, c in zip(terms, coefficients, strict=True)]
    products = [term for term in scaled if isinstance(term, LowRank)]
    if len(products) == len(scaled):
        return LowRank(torch.cat([p.up for p in products], 1), torch.cat([p.down for p in products]))
    total = torch.zeros_like(scaled[0].dense())
    for term in scaled:
        total += term.dense()
    return Dense(total)


def truncated(matrix: Matrix, rank: Rank) -> Truncated:
    """The matrix at a rank; at no rank or a sufficient one a product is kept as it is."""
    if isinstance(matrix, Dense):
        return _truncated_dense(matrix.matrix, rank)
    highest = min(matrix.shape)
    enough = rank is None or (isinstance(rank, int) and rank >= matrix.rank)
    if enough and matrix.rank <= highest:
        return Truncated(matrix, 0.0, squared_norm(matrix))
    found = _of_product(matrix)
    return _cut(found, _number(found.S, highest if rank is None else rank), matrix.up.dtype)


def balanced(matrix: LowRank, rank: int) -> LowRank:
    """The same matrix with the factors U √S and √S Vᵀ, which it determines up to signs.

    The largest entry of each column of U is made positive.
    """
    U, S, Vh = _of_product(matrix)
    signs = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()  # (1, r)
    return _cut(_SVD(U * signs, S, Vh * signs.t()), min(rank, len(S)), matrix.up.dtype).matrix


class _SVD(NamedTuple):
    U: Tensor
    S: Tensor  # fp64
    Vh: Tensor


def _decomposed(matrix: Tensor) -> _SVD:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return _SVD(U, S.double(), Vh)


def _of_product(matrix: LowRank) -> _SVD:
    left, right = (torch.linalg.qr(factor.double()) for factor in (matrix.up, matrix.down.t()))
    core = _decomposed(left.R @ right.R.t())
    return _SVD(left.Q @ core.U, core.S, core.Vh @ right.Q.t())


def squared_norm(matrix: LowRank) -> float:
    """‖U D‖² = ⟨UᵀU, D Dᵀ⟩."""
    up, down = matrix.up.double(), matrix.down.double()
    return max(float((up.t() @ up * (down @ down.t())).sum()), 0.0)


def squared_distance(product: LowRank, matrix: Matrix) -> float:
    """‖U D - M‖², of which nothing that is large is built."""
    if isinstance(matrix, LowRank):
        return squared_norm(LowRank(torch.cat([product.up, -matrix.up], 1), torch.cat([product.down, matrix.down])))
    wide = matrix.matrix.double()
    common = float((wide @ product.down.double().t() * product.up.double()).sum())
    return max(float(wide.square().sum()) - 2 * common + squared_norm(product), 0.0)


def _truncated_dense(matrix: Tensor, rank: Rank) -> Truncated:
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    if isinstance(rank, int) and min(matrix.shape) > EXACT and rank * 4 < min(matrix.shape):
        found = _leading(wide, rank)
        unseen = float(matrix.double().square().sum() - found.S.square().sum())
        return _cut(found, rank, matrix.dtype, max(unseen, 0.0))
    found = _decomposed(wide)
    return _cut(found, _number(found.S, len(found.S) if rank is None else rank), matrix.dtype)


def _leading(matrix: Tensor, rank: int) -> _SVD:
    """The leading singular vectors by subspace iteration, until what they hold of the norm no longer grows."""
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], rank + _OVERSAMPLED, generator=rng, dtype=matrix.dtype).to(matrix.device)
    right, held = torch.linalg.qr(start).Q, 0.0
    for _ in range(_ITERATIONS):
        left = torch.linalg.qr(matrix @ right).Q
        right, core = torch.linalg.qr(matrix.t() @ left)  # matrix ≈ left coreᵀ rightᵀ
        before, held = held, float(torch.linalg.svdvals(core)[:rank].double().square().sum())
        if held - before <= _CONVERGED * held:
            break
    found = _decomposed(core.t())
    return _SVD(left @ found.U, found.S, found.Vh @ right.t())


def _number(singular: Tensor, rank: int | float) -> int:
    """How many singular values are kept."""
    if isinstance(rank, int):
        return min(rank, len(singular))
    energy = singular.square().cumsum(0)
    return min(int((energy < rank * energy[-1]).sum()) + 1, len(singular))


def _cut(found: _SVD, rank: int, dtype: torch.dtype, unseen: float = 0.0) -> Truncated:
    """U √S · √S Vᵀ at a rank, in `dtype`; `unseen` is the squared norm that the decomposition lacks."""
    U, S, Vh = found
    root = S[:rank].sqrt()
    matrix = LowRank((U[:, :rank] * root).to(dtype), (Vh[:rank] * root.unsqueeze(1)).to(dtype))
    lost = float(S[rank:].square().sum()) + unseen
    return Truncated(matrix, lost, float(S[:rank].square().sum()) + lost)
