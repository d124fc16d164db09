"""Random numbers that are a function of (run seed, tensor name, model, element), and of nothing else.

Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a key and a
counter into bits. The key is a hash of the seed, the tensor's name and the model's place in the recipe; the
counter is the element's flat index. So the number of an element is the same in whatever chunks, order, shards
or workers it is drawn.
"""

from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

_BLOCK = 32  # bytes that Philox makes of one counter


def bernoulli(key: str, start: int, count: int, p: float) -> Tensor:
    """True with probability p for the elements start, ..., start + count - 1.

    16 bits decide for all but one element in 65,536; a second draw decides for that one, so that p is met to
    2⁻⁶⁴ and not only to 2⁻¹⁶ (which would be a relative error of 8 % for a density of 0.0001).
    """
    threshold = p * 2**16
    sure = int(threshold)
    drawn = _lanes(key, start, count, "<u2")
    true = drawn < sure
    undecided = np.flatnonzero(drawn == sure)
    if undecided.size:
        true[undecided] = _hashed(key, start + undecided) < (threshold - sure)
    return torch.from_numpy(true)


def uniform(key: str, start: int, count: int) -> Tensor:
    """Multiples of 2⁻²⁴ in [0, 1), all that fp32 holds evenly, for the elements start, ..., start + count -
    1.
    """
    drawn = _lanes(f"{key}\0uniform", start, count, "<u4")
    return torch.from_numpy((drawn >> 8).astype(np.float32) * np.float32(2**-24))


def _lanes(key: str, start: int, count: int, dtype: str) -> np.ndarray:
    """Elements start, ..., start + count - 1 of the endless array of random `dtype` that belongs to the key."""
    per_block = _BLOCK // np.dtype(dtype).itemsize
    block, skip = divmod(start, per_block)
    blocks = -(-(skip + count) // per_block)
    counter = np.array([block, 0, 0, 0], dtype=np.uint64)
    bits = np.random.Philox(key=_digest(key), counter=counter).random_raw(blocks * _BLOCK // 8)
    return bits.astype("<u8", copy=False).view(dtype)[skip : skip + count]


def _hashed(key: str, indices: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each of a few scattered elements: the finaliser of SplitMix64 over key + index."""
    z = indices.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + _digest(f"{key}\0undecided")[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def _digest(key: str) -> np.ndarray:
    return np.frombuffer(blake2b(key.encode(), digest_size=16).digest(), dtype="<u8")
