"""The mathematics of RMM, against the singular value decomposition of each position."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hf_modular._reversible import decomposed, projected, restored, storage

SIZES = {"n": st.integers(2, 7), "r": st.integers(1, 6), "positions": st.integers(1, 5), "seed": st.integers(0, 99)}


def factors(n, r, positions, seed):
    return torch.randn(n, r, positions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def all_restored(part):
    return torch.stack([restored(part.mean, part.basis, own) for own in part.coefficients])


@given(**SIZES, p=st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_each_position_is_the_nearest_of_p_directions(n, r, positions, seed, p):
    X = factors(n, r, positions, seed)
    p = min(p, r, n - 1)
    (part,) = decomposed([X], p, "position")
    assert (part.mean.shape, part.basis.shape) == ((r, positions), (p, r, positions))
    assert part.coefficients.shape == (n, p, positions)
    for q in range(positions):
        S = torch.linalg.svdvals(X[:, :, q] - X[:, :, q].mean(0))
        lost = (all_restored(part)[:, :, q] - X[:, :, q]).square().sum()
        assert_close(lost, S[p:].square().sum(), atol=1e-9, rtol=1e-6)


@given(**SIZES, granularity=st.sampled_from(["position", "tensor", "layer"]))
@settings(max_examples=60, deadline=None)
def test_all_directions_lose_nothing(n, r, positions, seed, granularity):
    both = [factors(n, r, positions, seed), factors(n, r, positions + 2, seed + 1)]
    p = min(n - 1, r) if granularity == "position" else n - 1
    for X, part in zip(both, decomposed(both, p, granularity), strict=True):
        assert_close(all_restored(part), X, atol=1e-6, rtol=0)


@pytest.mark.parametrize("granularity", ["tensor", "layer"])
def test_one_basis_for_all_positions_is_the_nearest(granularity):
    both = [factors(5, 3, 4, 1), factors(5, 3, 7, 2)]
    parts = decomposed(both, 2, granularity)
    found = [(all_restored(part) - X).square().sum() for X, part in zip(both, parts, strict=True)]
    flat = [X.flatten(1) for X in both]
    flat = [torch.cat(flat, 1)] if granularity == "layer" else flat
    lost = sum(torch.linalg.svdvals(X - X.mean(0))[2:].square().sum() for X in flat)
    assert_close(sum(found), lost)


@pytest.mark.parametrize("granularity", ["position", "tensor", "layer"])
def test_another_adapter_gets_the_nearest_coefficients(granularity):
    """No change of them comes nearer to it."""
    both, other = [factors(4, 5, 3, 1), factors(4, 5, 6, 2)], [factors(1, 5, 3, 7)[0], factors(1, 5, 6, 8)[0]]
    parts = decomposed(both, 2, granularity)
    found = projected(other, [part.mean for part in parts], [part.basis for part in parts], granularity)
    if granularity == "layer":
        assert torch.equal(found[0], found[1])
    moved = [own.clone().requires_grad_() for own in found]
    moved = [moved[0]] * 2 if granularity == "layer" else moved
    distances = [
        (restored(part.mean, part.basis, own) - X).square().sum()
        for X, part, own in zip(other, parts, moved, strict=True)
    ]
    for gradient in torch.autograd.grad(sum(distances), list(dict.fromkeys(moved))):
        assert_close(gradient, torch.zeros_like(gradient), atol=1e-9, rtol=0)


def test_equal_adapters_have_no_directions():
    X = factors(1, 3, 4, 0).expand(4, -1, -1)
    (part,) = decomposed([X], 2, "position")
    assert_close(all_restored(part), X)
    assert float(part.coefficients.abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("n", "r", "p", "share"), [(8, 16, 1, 0.3125), (8, 16, 2, 0.5), (8, 16, 3, 0.6875), (8, 64, 1, 0.265625)]
)
def test_storage(n, r, p, share):
    assert storage(n, r, p) == share
    (part,) = decomposed([factors(n, r, 3, 0)], p, "position")
    assert sum(tensor.numel() for tensor in part) == share * n * r * 3
