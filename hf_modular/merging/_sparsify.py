"""Which elements of a tensor are the large ones: exact selection by magnitude, without sorting, a chunk at a time.

The elements of a tensor are ordered by magnitude, and a cut divides them into a small and a large side. Equal
magnitudes are ordered by their place in the tensor (see `Target.early`), so that each side has exactly the wanted
number of elements. One pass over the tensor finds a cut: it counts what lies above a window around a guess from a
sample, and looks at what lies in it. A wrong guess costs two more passes, never the exactness of the result.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from hf_modular.merging._method import Stack, Stacks

Array = np.ndarray[Any, Any]
Rows = Callable[[Stack], Iterable[Tensor]]  # the numbers that a stack gives, a tensor for each model; used up

_SAMPLE = 1 << 14  # elements of each stack of a sample
_SPREAD = 5  # standard deviations of a sample's quantile that a guess leaves to each side,
_UNLIKE = 0.005  # and the share of the elements by which a sample may differ from the tensor in any case
_INFINITY = 0x7FF0  # the leading 16 bits of infinity


class Cut(NamedTuple):
    """The small elements are below `value`, the large ones above; those equal to it are divided at `split`."""

    value: float
    below: float  # the next smaller number of the tensor's dtype
    split: int = 0  # a flat index
    early: bool = True  # whether the equal ones before the split are large, else those from it on


ALL = Cut(0.0, 0.0)  # all are large; on which side a zero is does not matter
NONE = Cut(math.inf, math.inf)


class Target(NamedTuple):
    """A wanted cut."""

    small: Callable[[int, int], int]  # how many elements there are, how many are not 0 -> how many are small
    early: bool = True  # of equal elements the earlier count as larger, as in a stable sort from the largest

    def rank(self, size: int, nonzero: int) -> int:
        """Whose magnitude is the cut's: the first large one's, or the last small one's; 0 is the smallest."""
        return self.small(size, nonzero) - (not self.early)


class _Window(NamedTuple):
    """The magnitudes from low to high, both included, in the dtype of the tensor."""

    low: Any
    high: Any


class _Part(NamedTuple):
    """What a pass notes of one model in a chunk."""

    start: int
    size: int
    nonzero: int
    views: list["_View"]  # of each window


class _View(NamedTuple):
    """What a window shows of a chunk. What equals its ends takes one bit: a frequent magnitude becomes an end."""

    beyond: int  # how many are above the window
    at_low: Array  # which are equal to its low end, as bits
    at_high: Array
    between: Array
    places: Array  # of those between, in the chunk

    def occurrences(self, value: Any, window: _Window) -> int:
        return int(np.count_nonzero(self._marks(value, window)))

    def place(self, value: Any, window: _Window, number: int) -> int:
        """Where in the chunk the first, second, ... element is that equals a value."""
        found = int(np.flatnonzero(self._marks(value, window))[number - 1])
        return found if value in window else int(self.places[found])

    def _marks(self, value: Any, window: _Window) -> Array:
        if value not in window:
            return self.between == value
        return np.unpackbits(self.at_low if value == window.low else self.at_high).view(bool)


def large(x: Tensor, cut: Cut, offset: int) -> Tensor:  # (*shape)
    """The large elements of a chunk that begins at a flat index of its tensor, and 0 in place of the small ones."""
    before = cut.split - offset
    if 0 < before < x.numel():
        flat = x.flatten()
        sides = large(flat[:before], cut, offset), large(flat[before:], cut, cut.split)
        return torch.cat(sides).view(x.shape)
    return hardshrink(x, cut.below if cut.early == (before > 0) else cut.value)


def cuts(stacks: Stacks, rows: Rows, targets: Sequence[Sequence[Target]]) -> list[list[Cut]]:
    """For each model its wanted cuts; `rows` gives what is ordered by magnitude."""
    try:
        return _search(stacks, rows, targets, _guesses(stacks, rows, targets))
    except _OutsideError:
        return _search(stacks, rows, targets, _bins(stacks, rows, targets))


class _OutsideError(Exception):
    """A cut is not in its window."""


def _search(
    stacks: Stacks, rows: Rows, targets: Sequence[Sequence[Target]], windows: Sequence[Sequence[_Window]]
) -> list[list[Cut]]:
    """The cuts, by one pass."""
    parts = stacks.map(lambda stack: [_part(stack, *row) for row in zip(rows(stack), windows, strict=True)])
    return [
        [_cut(model, i, *pair) for i, pair in enumerate(zip(*row, strict=True))]
        for model, *row in zip(zip(*parts, strict=True), targets, windows, strict=True)
    ]


def _part(stack: Stack, row: Tensor, windows: Iterable[_Window]) -> _Part:
    sizes = _magnitudes(stack, row)
    views = [_view(sizes, window) for window in windows]
    return _Part(stack.offset, sizes.size, int(np.count_nonzero(sizes > 0)), views)


def _view(sizes: Array, window: _Window) -> _View:
    low, high = window
    from_low, past_low, from_high, past_high = sizes >= low, sizes > low, sizes >= high, sizes > high
    places = np.flatnonzero(past_low > from_high).astype(np.int32)
    ends = np.packbits(from_low > past_low), np.packbits(from_high > past_high)
    return _View(int(np.count_nonzero(past_high)), *ends, sizes[places], places)


def _cut(parts: Sequence[_Part], i: int, target: Target, window: _Window) -> Cut:
    size, nonzero = sum(part.size for part in parts), sum(part.nonzero for part in parts)
    small = target.small(size, nonzero)
    if small <= size - nonzero:
        return ALL
    if small >= size:
        return NONE
    views = [part.views[i] for part in parts]
    value, smaller = _find(views, window, size, target.rank(size, nonzero))
    counts = [view.occurrences(value, window) for view in views]
    before = smaller + sum(counts) - small if target.early else small - smaller
    chunk, before = _reached(counts, before)
    split = parts[chunk].start + views[chunk].place(value, window, before) + 1
    return Cut(float(value), float(np.nextafter(value, value.dtype.type(0))), split, target.early)


def _find(views: Sequence[_View], window: _Window, size: int, rank: int) -> tuple[Any, int]:
    """The magnitude of a rank, and how many are smaller."""
    between = np.concatenate([view.between for view in views])
    at_low, at_high = (sum(view.occurrences(end, window) for view in views) for end in window)
    at_high *= window.low < window.high
    first = size - sum(view.beyond for view in views) - at_high - between.size  # the rank of the first that is between
    if not first - at_low <= rank < first + between.size + at_high:
        raise _OutsideError
    if rank < first:
        return window.low, first - at_low
    if rank >= first + between.size:
        return window.high, first + between.size
    between.partition(rank - first)
    value = between[rank - first]
    return value, first + int(np.count_nonzero(between < value))


def _reached(counts: Sequence[int], number: int) -> tuple[int, int]:
    """In which chunk a number of elements is reached, and how many of them are in it."""
    upto = [*accumulate(counts)]
    chunk = bisect_left(upto, number)
    return chunk, number - upto[chunk] + counts[chunk]


def _guesses(stacks: Stacks, rows: Rows, targets: Sequence[Sequence[Target]]) -> list[list[_Window]]:
    sample = stacks.sample(_SAMPLE)
    parts = zip(*([_magnitudes(stack, row).copy() for row in rows(stack)] for stack in sample), strict=True)
    samples = [np.sort(np.concatenate(model)) for model in parts]
    return [[_around(sample, target) for target in row] for sample, row in zip(samples, targets, strict=True)]


def _around(sample: Array, target: Target) -> _Window:
    """Where a cut may lie, by the sorted magnitudes of a sample."""
    size = sample.size
    rank = target.rank(size, int(np.count_nonzero(sample)))
    margin = 1 + math.ceil(_UNLIKE * size + _SPREAD * math.sqrt(max(rank * (1 - rank / size), 0)))
    low, high = rank - margin, rank + margin
    return _window(sample[low] if low >= 0 else 0, sample[high] if high < size else math.inf, sample.dtype)


def _window(low: float, high: float, dtype: np.dtype[Any]) -> _Window:
    """Without the zeros, which are on neither side and may be many."""
    with np.errstate(over="ignore"):
        return _Window(max(dtype.type(low), np.finfo(dtype).smallest_subnormal), dtype.type(high))


def _bins(stacks: Stacks, rows: Rows, targets: Sequence[Sequence[Target]]) -> list[list[_Window]]:
    """The magnitudes that share a cut's leading 16 bits, by one pass."""
    parts = stacks.map(lambda stack: [_tally(_magnitudes(stack, row)) for row in rows(stack)])
    models = (reduce(_Tally.plus, model) for model in zip(*parts, strict=True))
    return [[tally.window(target) for target in row] for tally, row in zip(models, targets, strict=True)]


class _Tally(NamedTuple):
    size: int
    nonzero: int
    bins: Array  # how many numbers have each leading 16 bits as fp64
    dtype: np.dtype[Any]

    def plus(self, other: "_Tally") -> "_Tally":
        return _Tally(self.size + other.size, self.nonzero + other.nonzero, self.bins + other.bins, self.dtype)

    def window(self, target: Target) -> _Window:
        place = int(self.bins.cumsum().searchsorted(target.rank(self.size, self.nonzero), "right"))
        low, high = (np.minimum([place, place + 1], _INFINITY) << 48).view(np.float64)
        return _window(low, high, self.dtype)


def _tally(sizes: Array) -> _Tally:
    leading = sizes.astype(np.float64).view(np.int64) >> 48
    bins = np.bincount(leading, minlength=1 << 15)
    return _Tally(sizes.size, int(np.count_nonzero(sizes)), bins, sizes.dtype)


def _magnitudes(stack: Stack, row: Tensor) -> Array:
    """|x| in the place of x, flat; the selection is made on the CPU, whatever the device."""
    sizes: Array = row.abs_().reshape(-1).numpy(force=True)
    if sizes.size and not np.isfinite(sizes.max()):
        raise ValueError(f"{stack.name} must be finite in the base and in all models, but has NaN or infinite values")
    return sizes
