"""Exact order statistics of more numbers than memory holds, by a few passes over them.

The bits of a double, read as a whole number and negated below zero, are ordered as the doubles are; such a number is
called a key here. Each pass counts the keys in each of many equal bins, the window, and those before it; the bin that
holds the wanted rank is the next window, until a bin holds one number (radix selection). The first window is a guess
from a sample, wide enough to be right and narrow enough to need no second pass; a wrong guess costs two more passes,
never the exactness of the result.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from hf_modular.merging._method import Stack, Stacks

Array = np.ndarray[Any, Any]
Rows = Callable[[Stack], Iterable[Tensor]]  # the numbers that a stack gives: a tensor for each model
Ranks = Callable[[int], Sequence[int]]  # how many numbers a model has -> the ranks wanted, 0 for the smallest

_BITS = 24  # all windows together have at most 2**_BITS bins
_FLOAT32 = 29  # the lowest bits of a key, 0 for all that fp32 holds
_INFINITY = 0x7FF << 52  # the key of infinity
_SPREAD = 12  # standard deviations of a sample's quantile that a guess leaves to each side


class Window(NamedTuple):
    """A run of bins."""

    start: int  # the first key, a multiple of 2**shift
    shift: int  # a bin holds 2**shift keys
    bins: int

    @property
    def stop(self) -> int:
        return self.start + (self.bins << self.shift)

    def narrowed(self, chosen: int, shift: int) -> "Window":
        """One of the bins, divided anew."""
        return Window(self.start + (chosen << self.shift), shift, 1 << self.shift - shift)


def order_statistics(stacks: Stacks, rows: Rows, ranks: Ranks) -> list[list[float]]:
    """For each model the numbers of the given ranks among all that `rows` gives."""
    aims = _guesses(stacks.sample(), rows, ranks)
    while any(isinstance(aim, Window) for row in aims for aim in row):
        tallies = _pass(stacks, rows, [[aim for aim in row if isinstance(aim, Window)] for row in aims])
        bits = _bits(len(aims) * len(aims[0]))
        aims = [
            [tally.look_up(rank, aim, bits) for rank, aim in zip(ranks(tally.size), row, strict=True)]
            for tally, row in zip(tallies, aims, strict=True)
        ]
    return [[float(aim) for aim in row if not isinstance(aim, Window)] for row in aims]


class _Part(NamedTuple):
    """What a pass notes of one model in one stack."""

    size: int = 0
    low: float = math.inf
    high: float = -math.inf
    fp32: bool = True
    found: Sequence[tuple[int, Array]] = ()  # for each window: how many numbers precede it, the bins of those in it


class _Tally:
    """What a pass notes of one model."""

    def __init__(self, windows: Iterable[Window]) -> None:
        self.size = 0
        self.low, self.high = math.inf, -math.inf
        self.fp32 = True
        self.before = dict.fromkeys(windows, 0)
        self.bins = {window: np.zeros(window.bins, np.int64) for window in self.before}

    def add(self, part: _Part) -> None:
        self.size += part.size
        self.low, self.high = min(self.low, part.low), max(self.high, part.high)
        self.fp32 &= part.fp32
        for window, (before, bins) in zip(self.bins, part.found, strict=False):
            self.before[window] += before
            np.add.at(self.bins[window], bins, 1)

    def look_up(self, rank: int, aim: float | Window, bits: int) -> float | Window:
        """The number of a rank, or the window in which the next pass has to look for it."""
        if not isinstance(aim, Window):
            return aim
        if rank in (0, self.size - 1):
            return self.high if rank else self.low
        upto = self.bins[aim].cumsum()
        rank -= self.before[aim]
        if not 0 <= rank < upto[-1]:
            return _everything(bits)
        resolved = _FLOAT32 if self.fp32 else 0
        narrowed = aim.narrowed(int(upto.searchsorted(rank, "right")), max(aim.shift - bits, resolved))
        return narrowed if aim.shift > resolved else _number(narrowed.start)


def _pass(stacks: Stacks, rows: Rows, windows: Sequence[Iterable[Window]]) -> list[_Tally]:
    tallies = [_Tally(row) for row in windows]
    for parts in stacks.map(partial(_parts, rows=rows, windows=[list(tally.bins) for tally in tallies])):
        for tally, part in zip(tallies, parts, strict=True):
            tally.add(part)
    return tallies


def _parts(stack: Stack, rows: Rows, windows: Sequence[Sequence[Window]]) -> list[_Part]:
    return [_part(stack.name, _flat(row), w) for row, w in zip(rows(stack), windows, strict=True)]


def _part(name: str, numbers: Array, windows: Sequence[Window]) -> _Part:
    if not numbers.size:
        return _Part()
    low, high = float(numbers.min()), float(numbers.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name} must be finite in the base and in all models, but has NaN or infinite values")
    found = [_place(numbers, window) for window in windows]
    return _Part(numbers.size, low, high, numbers.dtype == np.float32, found)


def _place(numbers: Array, window: Window) -> tuple[int, Array]:
    """How many numbers precede the window, and the bins of those in it."""
    reached = numbers >= _at_least(window.start, numbers.dtype)
    inside = numbers[reached & (numbers < _at_least(window.stop, numbers.dtype))]
    bins = (_keys(inside) >> window.shift) - (window.start >> window.shift)
    return numbers.size - int(np.count_nonzero(reached)), bins


def _guesses(sample: Iterable[Stack], rows: Rows, ranks: Ranks) -> list[list[float | Window]]:
    parts = zip(*([_flat(row) for row in rows(stack)] for stack in sample), strict=True)
    models = [np.sort(np.concatenate(row)) for row in parts]
    bits = _bits(len(models) * len(ranks(1)))
    return [[_around(numbers, rank, bits) for rank in ranks(numbers.size)] for numbers in models]


def _around(numbers: Array, rank: int, bits: int) -> Window:
    """Where the number of a like rank may lie among all, of which the sorted `numbers` are a sample."""
    if not numbers.size:
        return _everything(bits)
    margin = 1 + math.ceil(_SPREAD * math.sqrt(rank * (1 - rank / numbers.size)))
    ends = numbers[[max(rank - margin, 0), min(rank + margin, numbers.size - 1)]]
    low, high = _keys(ends).tolist()
    shift = max(_FLOAT32, (high - low >> bits).bit_length())
    return Window(low >> shift << shift, shift, (high >> shift) - (low >> shift) + 1)


def _everything(bits: int) -> Window:
    return Window(-_INFINITY, 64 - bits, 1 << bits)


def _bits(windows: int) -> int:
    """Of a bin's number, if so many windows share the memory."""
    return max(_BITS - windows.bit_length(), 12)


def _keys(numbers: Array) -> Array:
    bits = numbers.astype(np.float64).view(np.int64)
    return np.where(bits < 0, -(bits & np.iinfo(np.int64).max), bits)


def _number(key: int) -> float:
    size = float(np.array(min(abs(key), _INFINITY)).view(np.float64))
    return -size if key < 0 else size


def _at_least(key: int, dtype: np.dtype[Any]) -> Any:
    """The smallest number of a dtype whose key is not below the given one."""
    number = _number(key)
    with np.errstate(over="ignore"):
        rounded = dtype.type(number)
    return rounded if float(rounded) >= number else np.nextafter(rounded, dtype.type(np.inf))


def _flat(row: Tensor) -> Array:
    return row.detach().flatten().numpy(force=True)
