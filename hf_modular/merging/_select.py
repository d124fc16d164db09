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
Rows = Callable[[Stack], Tensor]  # the numbers that a stack gives, (n, size)
Ranks = Callable[[int], Sequence[int]]  # how many numbers a model has -> the ranks wanted, 0 for the smallest

_BITS = 24  # all windows together have at most 2**_BITS bins
_FLOAT32 = 29  # the lowest bits of a key, 0 for all that fp32 holds
_INFINITY = 0x7FF << 52  # the key of infinity
_SPREAD = 12  # standard deviations of a sample's quantile that a guess leaves to each side


class Window(NamedTuple):
    """A run of bins in which the number of a rank is looked for."""

    start: int  # the first key, a multiple of 2**shift
    shift: int  # a bin holds 2**shift keys
    bins: int

    @property
    def stop(self) -> int:
        return self.start + (self.bins << self.shift)

    def narrowed(self, chosen: int, shift: int) -> "Window":
        """One of the bins, divided anew."""
        return Window(self.start + (chosen << self.shift), shift, 1 << self.shift - shift)


NOWHERE = Window(_INFINITY, 0, 0)

Aim = float | Window  # the number of a rank, or where to look for it


def order_statistics(stacks: Stacks, rows: Rows, ranks: Ranks) -> list[list[float]]:
    """For each model the numbers of the given ranks among all that `rows` gives."""
    aims = _guesses(stacks.sample(), rows, ranks)
    while any(isinstance(aim, Window) for row in aims for aim in row):
        tally = _Tally(aims)
        for parts in stacks.map(partial(_measure, rows=rows, searches=tally.searches)):
            for part in parts:
                tally.add(part)
        aims = tally.look_up(ranks)
    return [[aim for aim in model if not isinstance(aim, Window)] for model in zip(*aims, strict=True)]


class _Part(NamedTuple):
    """What a pass notes of some of the numbers."""

    size: int
    low: Array  # (n,)
    high: Array  # (n,)
    fp32: bool
    places: list[tuple[Array, Array]]  # for each rank: how many precede each model's window, the bins of those in it


class _Search:
    """One rank's windows, one for each model, and what a pass finds in them; their bins lie one after the other."""

    def __init__(self, aims: Sequence[Aim]) -> None:
        self.aims = aims
        self.windows = tuple(aim if isinstance(aim, Window) else NOWHERE for aim in aims)
        bins = [window.bins for window in self.windows]
        self.offsets = np.cumsum([0, *bins[:-1]])
        self.shifts = np.array([window.shift for window in self.windows])
        self.starts = np.array([window.start >> window.shift for window in self.windows]) - self.offsets
        self.before = np.zeros(len(bins), np.int64)
        self.counts = np.zeros(sum(bins), np.int64)

    def place(self, numbers: Array) -> tuple[Array, Array]:
        """How many of each model's numbers (n, size) precede its window, and the bins of those in it."""
        low, high = _limits(self.windows, numbers.dtype)
        reached = numbers >= low
        inside = reached & (numbers < high)
        found = [np.count_nonzero(row) for row in inside]
        bins = (_keys(numbers.take(np.flatnonzero(inside))) >> self.shifts.repeat(found)) - self.starts.repeat(found)
        return np.array([row.size - np.count_nonzero(row) for row in reached]), bins

    def add(self, before: Array, bins: Array) -> None:
        self.before += before
        np.add.at(self.counts, bins, 1)

    def bin_of(self, model: int, rank: int) -> int | None:
        """The bin that holds a rank, if it is in the window."""
        start, bins = self.offsets[model], self.windows[model].bins
        upto = self.counts[start : start + bins].cumsum()
        rank -= int(self.before[model])
        return int(upto.searchsorted(rank, "right")) if bins and 0 <= rank < upto[-1] else None


class _Tally:
    """What a pass notes of all numbers."""

    def __init__(self, aims: Sequence[Sequence[Aim]]) -> None:
        self.searches = [_Search(row) for row in aims]
        n = len(aims[0])
        self.size = 0
        self.low, self.high = np.full(n, math.inf), np.full(n, -math.inf)
        self.fp32 = True
        self.bits = _bits(len(aims) * n)

    def add(self, part: _Part) -> None:
        self.size += part.size
        self.low, self.high = np.minimum(self.low, part.low), np.maximum(self.high, part.high)
        self.fp32 &= part.fp32
        for search, place in zip(self.searches, part.places, strict=True):
            search.add(*place)

    def look_up(self, ranks: Ranks) -> list[list[Aim]]:
        """The numbers of the ranks, or the windows in which the next pass has to look for them."""
        wanted = zip(self.searches, ranks(self.size), strict=True)
        return [[self._next(search, rank, model) for model in range(len(search.aims))] for search, rank in wanted]

    def _next(self, search: _Search, rank: int, model: int) -> Aim:
        if not isinstance(search.aims[model], Window):
            return search.aims[model]
        if rank in (0, self.size - 1):
            return float((self.high if rank else self.low)[model])
        chosen = search.bin_of(model, rank)
        if chosen is None:
            return _everything(self.bits)
        window, resolved = search.windows[model], _FLOAT32 if self.fp32 else 0
        narrowed = window.narrowed(chosen, max(window.shift - self.bits, resolved))
        return narrowed if window.shift > resolved else _number(narrowed.start)


def _measure(stack: Stack, rows: Rows, searches: Sequence[_Search]) -> list[_Part]:
    """What there is to note, run by run."""
    return [_part(run.name, rows(run).numpy(force=True), searches) for run in stack.runs() if run.base.numel()]


def _part(name: str, numbers: Array, searches: Sequence[_Search]) -> _Part:
    low, high = numbers.min(1), numbers.max(1)
    if not np.isfinite([low, high]).all():
        raise ValueError(f"{name} must be finite in the base and in all models, but has NaN or infinite values")
    places = [search.place(numbers) for search in searches]
    return _Part(numbers.shape[1], low, high, numbers.dtype == np.float32, places)


def _guesses(sample: Iterable[Stack], rows: Rows, ranks: Ranks) -> list[list[Aim]]:
    parts = [rows(stack).flatten(1).numpy(force=True).copy() for stack in sample]  # stacks are used again
    if not parts:
        return []
    models = np.sort(np.concatenate(parts, 1))
    wanted = ranks(models.shape[1])
    bits = _bits(len(wanted) * len(models))
    return [[_around(numbers, rank, bits) for numbers in models] for rank in wanted]


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


@lru_cache(maxsize=64)
def _limits(windows: Sequence[Window], dtype: np.dtype[Any]) -> tuple[Array, Array]:  # twice (n, 1)
    """The smallest numbers in and after each window."""
    ends = [[_at_least(window.start, dtype), _at_least(window.stop, dtype)] for window in windows]
    low, high = np.array(ends, dtype).T[:, :, None]
    return low, high


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
