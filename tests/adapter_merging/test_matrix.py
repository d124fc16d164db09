"""Sums and truncations of low rank, against dense linear algebra."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hf_modular.adapter_merging import _matrix
from hf_modular.adapter_merging._matrix import Dense, LowRank, balanced, summed, truncated

ranks = st.lists(st.integers(1, 5), min_size=1, max_size=4)


def products(ranks, out, columns, seed):
    rng = torch.Generator().manual_seed(seed)
    return [LowRank(torch.randn(out, r, generator=rng), torch.randn(r, columns, generator=rng)) for r in ranks]


@settings(max_examples=60, deadline=None)
@given(ranks, st.integers(2, 14), st.integers(2, 14), st.integers(1, 8), st.integers(0, 99))
def test_a_truncated_sum_is_that_of_the_dense_matrix(ranks, out, columns, rank, seed):
    terms = products(ranks, out, columns, seed)
    weights = [(-0.7) ** i for i in range(len(ranks))]
    dense = sum(w * term.dense().double() for w, term in zip(weights, terms, strict=True))
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    found = truncated(summed(terms, weights), rank)
    assert found.matrix.rank <= max(rank, 1)
    assert found.error == pytest.approx(float(S[rank:].square().sum()), abs=1e-5 * float(S[0]) ** 2)
    assert found.norm == pytest.approx(float(dense.square().sum()), rel=1e-5)
    if rank >= len(S) or S[rank - 1] - S[rank] > 1e-3 * S[0]:  # else the nearest matrix is not determined
        nearest = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        assert_close(found.matrix.dense().double(), nearest, rtol=0, atol=1e-5 * float(S[0]))
    from_dense = truncated(Dense(dense), rank)
    assert from_dense.error == pytest.approx(found.error, abs=1e-5 * found.norm)


@settings(max_examples=30, deadline=None)
@given(ranks, st.integers(0, 99))
def test_without_a_rank_nothing_is_lost(ranks, seed):
    terms = products(ranks, 9, 7, seed)
    found = truncated(summed(terms, [1.0] * len(terms)), None)
    assert found.error <= 1e-9 * found.norm
    assert found.matrix.rank == min(sum(ranks), 7)
    assert_close(found.matrix.dense(), sum(term.dense() for term in terms), rtol=1e-4, atol=1e-4)


def test_a_sum_at_a_sufficient_rank_is_the_stacked_factors():
    one, two = products([2, 3], 9, 8, 0)
    found = truncated(summed([one, two], [1.0, 1.0]), 6).matrix
    assert torch.equal(found.up, torch.cat([one.up, two.up], 1))
    assert torch.equal(found.down, torch.cat([one.down, two.down]))


def test_a_share_of_the_squared_norm_needs_the_smallest_rank_that_has_it():
    matrix = Dense(torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5])))
    total = 9 + 4 + 1 + 0.25
    assert [truncated(matrix, share).matrix.rank for share in (9 / total - 1e-6, 9 / total + 1e-6, 0.999)] == [1, 2, 4]


def test_a_large_dense_matrix_is_truncated_almost_as_by_lapack(monkeypatch):
    torch.manual_seed(0)
    dense = torch.randn(90, 6) @ torch.diag(torch.tensor([9.0, 7, 5, 3, 2, 1])) @ torch.randn(6, 120)
    dense += torch.randn(90, 120)
    exact = truncated(Dense(dense), 5)
    monkeypatch.setattr(_matrix, "EXACT", 10)
    found = truncated(Dense(dense), 5)
    assert found.norm == pytest.approx(exact.norm, rel=1e-5)
    assert found.error == pytest.approx(exact.error, rel=1e-4)
    assert float((dense - found.matrix.dense()).square().sum()) == pytest.approx(found.error, rel=1e-4)


def test_balanced_factors_belong_to_the_matrix_and_not_to_its_factors():
    (product,) = products([4], 9, 8, 0)
    mixed = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    other = LowRank(product.up @ mixed, torch.linalg.solve(mixed, product.down))
    one, two = balanced(product, 4), balanced(other, 4)
    assert_close(one.up, two.up, rtol=1e-3, atol=1e-4)
    assert_close(one.down, two.down, rtol=1e-3, atol=1e-4)
    assert_close(one.dense(), product.dense(), rtol=1e-4, atol=1e-4)
    assert_close(one.up.t() @ one.up, one.down @ one.down.t(), rtol=1e-3, atol=1e-4)


def test_nothing_is_nothing():
    for matrix in (LowRank(torch.zeros(5, 2), torch.zeros(2, 4)), Dense(torch.zeros(5, 4))):
        found = truncated(matrix, 1)
        assert (found.error, found.norm) == (0, 0)
        assert not found.matrix.dense().any()
