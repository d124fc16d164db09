"""The result's dtype: the nearest number, by way of no other dtype."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_modular.merging.engine._rounding import rounded

NARROW = [torch.bfloat16, torch.float16]


def neighbours(dtype, bits):
    """A positive number of 16 bits and the next larger one."""
    return torch.tensor([bits, bits + 1], dtype=torch.int16).view(dtype).double().tolist()


@st.composite
def beside_a_middle(draw, dtype):
    """Numbers that are in the middle of two neighbours, or so little beside it that fp32 does not know."""
    low, high = neighbours(dtype, draw(st.integers(0, 0x7B00)))
    sides = draw(st.lists(st.integers(-3, 3), min_size=1, max_size=8))
    middle = torch.tensor((low + high) / 2, dtype=torch.float64)
    return [
        float((middle.view(torch.int64) + side).view(torch.float64)) * draw(st.sampled_from([1, -1])) for side in sides
    ]


def nearest(x, dtype):
    """By comparing exact distances to all candidates around."""
    guess = torch.tensor(abs(x), dtype=torch.float64).to(dtype).view(torch.int16).item()
    largest = torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(torch.int16).item()
    bits = [b for b in range(guess - 2, guess + 3) if 0 <= b <= largest]
    found = min(bits, key=lambda b: (abs(Fraction(neighbours(dtype, b)[0]) - Fraction(abs(x))), b % 2))
    return neighbours(dtype, found)[0] * (-1 if x < 0 else 1)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@given(data=st.data())
def test_doubles_become_the_nearest_of_16_bits(dtype, data):
    numbers = data.draw(st.one_of(beside_a_middle(dtype), st.lists(st.floats(-60000, 60000), max_size=8)))
    found = rounded(torch.tensor(numbers, dtype=torch.float64), dtype)
    assert found.dtype == dtype
    assert found.double().tolist() == [nearest(x, dtype) for x in numbers]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_torch_alone_goes_wrong_there(dtype):
    """Without which `rounded` would not be needed."""
    low, high = neighbours(dtype, 0x3C00)
    x = torch.tensor([(low + high) / 2 + 2.0**-50], dtype=torch.float64)
    assert x.to(dtype).item() == low
    assert rounded(x, dtype).item() == high


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_what_is_too_large_or_no_number_says_so(dtype):
    x = torch.tensor([[torch.inf, -torch.inf, 1e300, -1e300], [0.0, -0.0, 1.5, torch.nan]], dtype=torch.float64)
    expected = [[torch.inf, -torch.inf, torch.inf, -torch.inf], [0.0, 0.0, 1.5]]
    found = rounded(x, dtype)
    assert [found[0].tolist(), found[1, :3].tolist()] == expected
    assert found[1, 1].signbit()
    assert found[1, 3].isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_fp32_is_rounded_as_torch_does(dtype):
    x = torch.randn(3, 50)
    assert torch.equal(rounded(x, dtype), x.to(dtype))
