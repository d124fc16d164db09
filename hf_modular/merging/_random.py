"""Random numbers that are a function of (run seed, tensor name, model, element), and of nothing else.

PCG64-DXSM (O'Neill, "PCG: a family of simple fast space-efficient statistically good algorithms for random number
generation", 2014, in the variant that numpy recommends for parallel use) gives one endless stream of bits for each
key, which is a hash of the seed, the tensor's name and the model's place in the recipe. An element's bits lie in it at
a place that is its flat index, and the generator can jump there. So the number of an element is the same in whatever
chunks, order, shards or workers it is drawn. (Philox, whose counter is the place, takes twice as long.)
"""

from collections import OrderedDict
from functools import lru_cache
from hashlib import blake2b
from threading import local
from typing import Any

import numpy as np
import torch
from torch import Tensor

_WORD = 8  # bytes that the generator makes at a time
_PERIOD = 1 << 128
_STREAMS = 64  # generators that a thread keeps
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_KEPT = local()


def bernoulli(key: str, start: int, count: int, p: float) -> Tensor:
    """True with probability p for the elements start, ..., start + count - 1.

    8 bits decide for all but one element in 256; a second draw decides for that one, so that p is met to 2⁻⁶¹ and
    not only to 2⁻⁸.
    """
    threshold = p * 2**8
    sure = int(threshold)
    drawn = _lanes(key, start, count, "u1")
    true = drawn < sure
    if threshold > sure:
        undecided = (drawn == sure).nonzero()[0]
        true[undecided] = _hashed(key, start, undecided) < np.uint64((threshold - sure) * 2**64)
    return torch.from_numpy(true)


def uniform(key: str, start: int, count: int) -> Tensor:
    """Multiples of 2⁻²⁴ in [0, 1), all that fp32 holds evenly, for the elements start, ..., start + count -
    1.
    """
    drawn = _lanes(f"{key}\0uniform", start, count, "<u4")
    return torch.from_numpy((drawn >> 8).astype(np.float32) * np.float32(2**-24))


def _lanes(key: str, start: int, count: int, dtype: str) -> np.ndarray[Any, Any]:
    """Elements start, ..., start + count - 1 of the endless array of random `dtype` that belongs to the key."""
    per_word = _WORD // np.dtype(dtype).itemsize
    word, skip = divmod(start, per_word)
    streams: OrderedDict[str, _Stream] = _KEPT.__dict__.setdefault("streams", OrderedDict())  # this thread's
    if key not in streams:
        streams[key] = streams.popitem(last=False)[1] if len(streams) == _STREAMS else _Stream()
        streams[key].begin(key)
    bits = streams[key].words(word, -(-(skip + count) // per_word))
    return bits.astype("<u8", copy=False).view(dtype)[skip : skip + count]


class _Stream:
    """A generator and its place, where the next block of a tensor mostly goes on: to set one to a place takes time."""

    def __init__(self) -> None:
        self._generator = np.random.PCG64DXSM(0)
        self._place = 0

    def begin(self, key: str) -> None:
        state, increment = _digest(key)
        self._generator.state = {
            "bit_generator": "PCG64DXSM",
            "state": {"state": state, "inc": increment | 1},  # an odd increment makes the period full
            "has_uint32": 0,
            "uinteger": 0,
        }
        self._place = 0

    def words(self, start: int, count: int) -> np.ndarray[Any, Any]:
        if start != self._place:
            self._generator.advance((start - self._place) % _PERIOD)
        self._place = start + count
        words: np.ndarray[Any, Any] = self._generator.random_raw(count)
        return words


def _hashed(key: str, start: int, places: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """64 bits for each of a few scattered elements: the finaliser of SplitMix64 over key + index, as far as it changes
    the leading half.
    """
    z = places.astype(np.uint64)
    z *= _GOLDEN
    z += np.uint64((_digest(f"{key}\0undecided")[0] + start * int(_GOLDEN)) % 2**64)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    return z


@lru_cache(maxsize=256)
def _digest(key: str) -> tuple[int, int]:
    """Two numbers of 128 bits."""
    digest = blake2b(key.encode(), digest_size=32).digest()
    return int.from_bytes(digest[:16], "little"), int.from_bytes(digest[16:], "little")
