"""Exact order statistics of more numbers than memory holds, by a few passes over them.

The bits of a double, read as a whole number and negated below zero, are ordered as the doubles are; such a number is
called a key here. Each pass counts the keys in each of many equal bins, the window, and those before it; the bin that
holds the wanted rank is the next window, until a bin holds one number (radix selection). The first window is a guess
from a sample, wide enough to be right and narrow enough to need no second pass; a wrong guess costs two more passes,
never the exactness of the result.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from hf_modular.merging._method import Stack, Stacks

Array = np.ndarray[Any, Any]
Rows = Callable[[Stack], Iterable[Tensor]]  # the numbers that a stack gives, a tensor for each model; used up
Ranks = Callable[[int], Sequence[int]]  # how many numbers a model has -> the ranks wanted, 0 for the smallest

_BITS = 24  # all windows together have at most 2**_BITS bins
_FLOAT32 = 29  # the lowest bits of a key, 0 for all that fp32 holds
_INFINITY = 0x7FF << 52  # the key of infinity
_SPREAD = 8  # standard deviations of a sample's quantile that a guess leaves to each side


class Window(NamedTuple):
    """A run of bins in which the number of a rank is looked for."""

    start: int  # the first key, a multiple of 2**shift
    shift: int  # a bin holds 2**shift keys
    bins: int

    @property
    def stop(self) -> int:
        return self.start + (self.bins << self.shift)

    def place(self, numbers: Array) -> tuple[int, Array]:
        """How many numbers precede the window, and the bins of those in it, or how many they are if it has one bin."""
        if not self.bins:
            return 0, np.empty(0, np.int32)
        low, high = (_at_least(key, numbers.dtype) for key in (self.start, self.stop))
        reached = numbers >= low
        inside = reached > (numbers >= high)
        before = numbers.size - int(np.count_nonzero(reached))
        if self.bins == 1:  # as around a frequent number, such as the 0 of what was not trained
            return before, np.array([np.count_nonzero(inside)])
        bins = (_keys(numbers.compress(inside)) >> self.shift) - (self.start >> self.shift)
        return before, bins.astype(np.int32)

    def narrowed(self, chosen: int, shift: int) -> "Window":
        """One of the bins, divided anew."""
        return Window(self.start + (chosen << self.shift), shift, 1 << self.shift - shift)


NOWHERE = Window(_INFINITY, 0, 0)

Aim = float | Window  # the number of a rank, or where to look for it


def order_statistics(stacks: Stacks, rows: Rows, ranks: Ranks) -> list[list[float]]:
    """For each model the numbers of the given ranks among all that `rows` gives."""
    aims = _guesses(stacks.sample(), rows, ranks)
    bits = _bits(sum(map(len, aims)))
    while any(isinstance(aim, Window) for row in aims for aim in row):
        tallies = [_Tally(row) for row in aims]
        windows = [[search.window for search in tally.searches] for tally in tallies]
        for parts in stacks.map(partial(_measure, rows=rows, windows=windows)):
            for tally, part in zip(tallies, parts, strict=False):  # none of a stack without elements
                tally.add(part)
        aims = [tally.look_up(ranks, bits) for tally in tallies]
    return [[aim for aim in row if not isinstance(aim, Window)] for row in aims]


class _Part(NamedTuple):
    """What a pass notes of some of a model's numbers."""

    size: int
    low: float
    high: float
    fp32: bool
    places: list[tuple[int, Array]]  # in the window of each rank


class _Search:
    """What a pass finds in the window of one rank."""

    def __init__(self, aim: Aim) -> None:
        self.aim = aim
        self.window = aim if isinstance(aim, Window) else NOWHERE
        self.before = 0
        self.counts = np.zeros(self.window.bins, np.int64)

    def add(self, before: int, bins: Array) -> None:
        self.before += before
        if self.window.bins == 1:
            self.counts += bins
        else:
            np.add.at(self.counts, bins, 1)

    def bin_of(self, rank: int) -> int | None:
        """The bin that holds a rank, if it is in the window."""
        upto = self.counts.cumsum()
        rank -= self.before
        return int(upto.searchsorted(rank, "right")) if upto.size and 0 <= rank < upto[-1] else None


class _Tally:
    """What a pass notes of all of a model's numbers."""

    def __init__(self, aims: Sequence[Aim]) -> None:
        self.searches = [_Search(aim) for aim in aims]
        self.size = 0
        self.low, self.high = math.inf, -math.inf
        self.fp32 = True

    def add(self, part: _Part) -> None:
        self.size += part.size
        self.low, self.high = min(self.low, part.low), max(self.high, part.high)
        self.fp32 &= part.fp32
        for search, place in zip(self.searches, part.places, strict=True):
            search.add(*place)

    def look_up(self, ranks: Ranks, bits: int) -> list[Aim]:
        """The numbers of the ranks, or the windows in which the next pass has to look for them."""
        return [self._next(*pair, bits) for pair in zip(self.searches, ranks(self.size), strict=True)]

    def _next(self, search: _Search, rank: int, bits: int) -> Aim:
        if not isinstance(search.aim, Window):
            return search.aim
        if rank in (0, self.size - 1):
            return self.high if rank else self.low
        chosen = search.bin_of(rank)
        if chosen is None:
            return _everything(bits)
        window, resolved = search.window, _FLOAT32 if self.fp32 else 0
        narrowed = window.narrowed(chosen, max(window.shift - bits, resolved))
        return narrowed if window.shift > resolved else _number(narrowed.start)


def _measure(stack: Stack, rows: Rows, windows: Sequence[Sequence[Window]]) -> list[_Part]:
    """What there is to note of each model."""
    pairs = zip(rows(stack), windows, strict=True) if stack.base.numel() else ()
    return [_part(stack.name, row.reshape(-1).numpy(force=True), of_model) for row, of_model in pairs]


def _part(name: str, numbers: Array, windows: Iterable[Window]) -> _Part:
    low, high = float(numbers.min()), float(numbers.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name} must be finite in the base and in all models, but has NaN or infinite values")
    return _Part(numbers.size, low, high, numbers.dtype == np.float32, [window.place(numbers) for window in windows])


def _guesses(sample: Iterable[Stack], rows: Rows, ranks: Ranks) -> list[list[Aim]]:
    # Copies, for stacks are used again.
    parts = [[row.reshape(-1).numpy(force=True).copy() for row in rows(stack)] for stack in sample]
    models = [np.sort(np.concatenate(model)) for model in zip(*parts, strict=True)]
    bits = _BITS
    while True:  # wide windows have coarser bins, so that all fit
        guesses = [[_around(numbers, rank, bits) for rank in ranks(numbers.size)] for numbers in models]
        if sum(window.bins for row in guesses for window in row) <= 1 << _BITS:
            return [[*row] for row in guesses]
        bits -= 1


def _around(numbers: Array, rank: int, bits: int) -> Window:
    """Where the number of a like rank may lie among all, of which the sorted `numbers` are a sample."""
    if rank in (0, numbers.size - 1):
        return NOWHERE  # every pass notes the ends
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


@lru_cache(maxsize=256)
def _at_least(key: int, dtype: np.dtype[Any]) -> Any:
    """The smallest number of a dtype whose key is not below the given one."""
    number = _number(key)
    with np.errstate(over="ignore"):
        rounded = dtype.type(number)
    return rounded if float(rounded) >= number else np.nextafter(rounded, dtype.type(np.inf))


def _keys(numbers: Array) -> Array:
    bits = numbers.astype(np.float64).view(np.int64)
    return np.where(bits < 0, -(bits & np.iinfo(np.int64).max), bits)


def _number(key: int) -> float:
    size = float(np.array(min(abs(key), _INFINITY)).view(np.float64))
    return -size if key < 0 else size
