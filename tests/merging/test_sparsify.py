"""Selection by magnitude: exactly what a stable sort selects, whatever the numbers, the chunks and the guess."""

from functools import partial

import numpy as np
import pytest
import torch
from chunks import Chunks, stack_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hf_modular.merging._sparsify import ALL, NONE, Target, cuts, large


def share(fraction, size, nonzero):
    return round(fraction * size)


def by_sorting(x, small, early):
    """The numbers that are left when the small ones of a stable sort, from the largest or from the smallest, are 0."""
    order = torch.argsort(x.abs().flatten(), descending=early, stable=True)
    kept = order[: x.numel() - small] if early else order[small:]
    out = torch.zeros(x.numel(), dtype=x.dtype)
    out[kept] = x.flatten()[kept]
    return out.view(x.shape)


def selected(x, fraction, early, *, surveyed, merged, sampled=None):
    """In chunks of one size surveyed, and of another merged."""
    stack = stack_of(torch.zeros_like(x), x)
    chunks = Chunks(stack, surveyed, sampled)
    [[cut]] = cuts(chunks, lambda part: part.deltas, [[Target(partial(share, fraction), early)]])
    parts = [large(part.models[0], cut, part.offset).flatten() for part in Chunks(stack, merged)]
    return torch.cat(parts).view(x.shape), chunks.passes


NUMBERS = {
    "finite": st.floats(allow_nan=False, allow_infinity=False, width=32),
    "few": st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 2.0]),
    "subnormal": st.integers(-700, 700).map(lambda n: n * 2.0**-149),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", NUMBERS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_it_is_that_of_a_stable_sort(dtype, kind, data):
    x = torch.from_numpy(data.draw(arrays.arrays(dtype, st.integers(1, 60), elements=NUMBERS[kind])))
    fraction = data.draw(st.floats(0, 1))
    early = data.draw(st.booleans())
    sizes = {"surveyed": data.draw(st.sampled_from([1, 7, 60])), "merged": data.draw(st.sampled_from([1, 4, None]))}
    found, _ = selected(x, fraction, early, **sizes)
    assert torch.equal(found, by_sorting(x, round(fraction * len(x)), early))


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("kind", ["growing", "sparse", "coarse", "constant"])
def test_a_sample_unlike_the_rest_costs_passes_and_changes_nothing(kind, fraction, early):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5000, generator=g)
    x = {
        "growing": x * torch.linspace(0, 1, 5000) ** 8,
        "sparse": x * (torch.rand(5000, generator=g) < torch.linspace(0, 0.9, 5000)),
        "coarse": (x * torch.linspace(1, 4, 5000)).round() / 8,
        "constant": x.sign() * torch.linspace(0.5, 1.5, 5000).round(),
    }[kind]
    good = selected(x, fraction, early, surveyed=512, merged=512)
    bad = selected(x, fraction, early, surveyed=512, merged=300, sampled=1)
    assert torch.equal(bad[0], by_sorting(x, round(fraction * 5000), early))
    assert torch.equal(bad[0], good[0])
    assert good[1] == 1
    assert bad[1] in (1, 3)


def test_some_of_those_samples_were_bad():
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * torch.linspace(0, 1, 5000) ** 8
    assert selected(x, 0.5, True, surveyed=512, merged=512, sampled=1)[1] == 3


def test_numbers_of_16_bits_have_ties_at_the_cut_and_the_first_are_kept():
    g = torch.Generator().manual_seed(1)
    base = (0.02 * torch.randn(40_000, generator=g)).bfloat16()
    delta = (base.float() + 2e-4 * torch.randn(40_000, generator=g)).bfloat16().float() - base.float()
    kept, _ = selected(delta, 0.6, True, surveyed=4096, merged=1000)
    threshold = kept[kept != 0].abs().min()
    tied = (delta.abs() == threshold).nonzero()[:, 0]
    assert int((kept != 0).sum()) == 16_000
    assert len(tied) > 100
    assert 0 < int((kept[tied] != 0).sum()) < len(tied)
    assert kept[tied].abs().bool().int().diff().max() <= 0


def test_trivial_cuts():
    x = torch.tensor([[3.0, -1.0], [0.0, 2.0]])
    assert torch.equal(large(x, ALL, 0), x)
    assert torch.equal(large(x, NONE, 0), torch.zeros_like(x))


def test_the_shape_is_kept_and_the_input_too():
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(2))
    before = x.clone()
    found, _ = selected(x, 0.5, True, surveyed=13, merged=None)
    assert found.shape == x.shape
    assert torch.equal(x, before)
    assert torch.equal(found, by_sorting(x, 60, True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name(value):
    x = torch.ones(10)
    x[3] = value
    with pytest.raises(ValueError, match="w must be finite"):
        selected(x, 0.5, True, surveyed=4, merged=4)
