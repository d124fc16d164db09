"""Exact order statistics out of core: every rank, whatever the numbers, the blocks and the guess."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hf_modular.merging import _select
from hf_modular.merging._method import Stack
from hf_modular.merging._select import order_statistics


@dataclass
class Blocks:
    """One model's numbers in blocks; counts the passes."""

    numbers: torch.Tensor
    every: int = 7
    size: int = 5
    passes: int = 0

    def __iter__(self):
        self.passes += 1
        return (self.stack(part) for part in self.numbers.split(self.size))

    def map(self, function):
        return map(function, self)

    def sample(self):
        return [self.stack(self.numbers[:: self.every])]

    def stack(self, part):
        return Stack("w", torch.zeros_like(part), torch.stack([part, -part]), torch.ones(2))


def values(stack):
    return stack.models


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_every_rank_is_that_of_the_sorted_numbers(dtype, data):
    finite = st.floats(allow_nan=False, allow_infinity=False, width=np.dtype(dtype).itemsize * 8)
    numbers = data.draw(arrays.arrays(dtype, st.integers(1, 40), elements=finite))
    ranks = data.draw(st.lists(st.integers(0, numbers.size - 1), min_size=1, max_size=3))
    found = order_statistics(Blocks(torch.from_numpy(numbers)), values, lambda count: [r % count for r in ranks])
    assert found == [np.sort(numbers)[ranks].tolist(), np.sort(-numbers)[ranks].tolist()]


@pytest.mark.parametrize(("every", "passes"), [(1, 1), (2, 1), (200_000, 3)])
def test_a_good_guess_needs_one_pass_and_a_bad_one_does_no_harm(every, passes):
    numbers = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * 1e-3
    numbers[0] = 5e20
    blocks = Blocks(numbers, every, size=50_000)
    found = order_statistics(blocks, values, lambda count: [count * 3 // 4, count * 9 // 10, count - 1])
    wanted = [150_000, 180_000, 199_999]
    assert found == [numbers.sort().values[wanted].tolist(), (-numbers).sort().values[wanted].tolist()]
    assert blocks.passes == passes


@pytest.mark.parametrize("bits", [5, 9, 24])
def test_few_bins_take_more_passes_and_change_nothing(bits, monkeypatch):
    monkeypatch.setattr(_select, "_BITS", bits)
    numbers = torch.randn(200_000, generator=torch.Generator().manual_seed(1)) * 1e-3
    blocks = Blocks(numbers, every=2, size=50_000)
    found = order_statistics(blocks, values, lambda count: [count // 100, count * 9 // 10])
    assert found == [x.sort().values[[2_000, 180_000]].tolist() for x in (numbers, -numbers)]
    assert (blocks.passes > 1) == (bits < 24)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0]), min_size=1, max_size=80), st.integers(1, 9), st.data())
def test_frequent_numbers(numbers, every, data):
    rank = data.draw(st.integers(0, len(numbers) - 1))
    found = order_statistics(Blocks(torch.tensor(numbers), every), values, lambda count: [min(rank, count - 1)])
    assert found == [[sorted(numbers)[rank]], [sorted(-x for x in numbers)[rank]]]


def test_what_is_not_finite_is_refused_by_name():
    with pytest.raises(ValueError, match="w must be finite in the base and in all models"):
        order_statistics(Blocks(torch.tensor([1.0, float("nan"), 2.0])), values, lambda count: [1])


def test_nothing_has_no_order():
    @dataclass
    class Nothing(Blocks):
        def sample(self):
            return []

    assert order_statistics(Nothing(torch.zeros(0)), values, lambda count: [0]) == []


@settings(deadline=None)
@given(st.floats(allow_nan=False, width=32), st.floats(allow_nan=False, width=32))
def test_keys_are_ordered_as_numbers_are(a, b):
    low, high = (int(key) for key in _select._keys(np.array([a, b], np.float32)))
    assert (low < high, low == high) == (a < b, a == b)
    assert _select._number(low) == a
