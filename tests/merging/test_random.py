"""The random numbers: where they come from, and that they are what they claim to be."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_modular.merging import _random


@settings(deadline=None, max_examples=60)
@given(cuts=st.lists(st.integers(0, 1000), max_size=4), p=st.sampled_from([0.0, 1e-6, 0.3, 0.5, 0.999999, 1.0]))
def test_chunks_do_not_change_a_bit(cuts, p):
    edges = [0, *sorted(cuts), 1000]
    for draw in (lambda a, n: _random.bernoulli("key", a, n, p), lambda a, n: _random.uniform("key", a, n)):
        pieces = [draw(a, b - a) for a, b in pairwise(edges)]
        assert torch.equal(torch.cat(pieces), draw(0, 1000))


@pytest.mark.parametrize("p", [0.0, 2e-5, 0.1, 0.5, 1 - 1e-5, 1.0])
def test_the_probability_is_exact_below_8_bits(p):
    n = 1 << 23
    hits = int(_random.bernoulli("key", 0, n, p).sum())
    assert abs(hits - n * p) <= 5 * (n * p * (1 - p)) ** 0.5


def test_uniform_is_uniform_and_apart_from_the_mask():
    u = _random.uniform("key", 0, 1 << 20)
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, 64, 0, 1)
    assert ((counts - 2**14) ** 2 / 2**14).sum() < 120  # chi square, 63 degrees of freedom, p = 2e-5
    mask = _random.bernoulli("key", 0, 1 << 20, 0.5)
    assert abs(float(torch.corrcoef(torch.stack([u, mask.float()]))[0, 1])) < 0.005


def test_keys_give_different_numbers():
    a, b = (_random.bernoulli(key, 0, 1 << 20, 0.5).float() for key in ("0\0w\0" + i for i in "01"))
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.005


def test_the_numbers_do_not_change_between_versions():
    """A merge made with an earlier version can be replayed."""
    assert _random.bernoulli("0\0w\0" + "0", 7, 24, 0.5).int().tolist() == EXPECTED
    assert np.allclose(_random.uniform("0\0w\0" + "0", 3, 3), EXPECTED_UNIFORM, atol=0)


EXPECTED = [1, 0, 0, 1, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0]
EXPECTED_UNIFORM = [0.824031412601471, 0.7299981117248535, 0.03850996494293213]
