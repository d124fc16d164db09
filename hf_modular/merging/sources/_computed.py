"""Checkpoints some of whose tensors are not stored but computed, a group at a time, when they are asked for."""

import ctypes
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from hf_modular.checkpoints import Checkpoint, StoredTensor

_MMAP_THRESHOLD, _LARGE = -3, 1 << 20  # glibc's parameter, and from how many bytes on a block is large
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None

Group = Callable[[], Mapping[str, Tensor]]  # computes some tensors together, in fp32 or wider

KEPT = 3  # groups of which the values stay for the blocks that are asked for next
_SMALL = 1 << 14  # elements of a tensor that always stays: a bias is asked for long after its weight


class ComputedCheckpoint(Checkpoint):
    """The tensors of other checkpoints, and computed ones among them.

    Args:
        path: Where the files are.
        files: All files that are read.
        tensors: What a header would say; of a computed tensor, the place does not matter.
        groups: What computes the tensors that it is listed for.
    """

    def __init__(
        self,
        path: Path,
        files: Sequence[Path],
        tensors: Mapping[str, StoredTensor],
        groups: Mapping[str, tuple[str, Group]],
    ) -> None:
        free_at_once()
        self.path, self.files, self.tensors = path, list(files), dict(tensors)
        self._descriptors: dict[Path, int] = {}
        self._lock = Lock()
        self.groups = groups  # name of a tensor -> name of its group, and the group
        self._small: dict[str, Tensor] = {}
        self._recent: OrderedDict[str, Mapping[str, Tensor]] = OrderedDict()
        self._working: dict[str, Lock] = {}

    def computed(self, name: str) -> Tensor | None:
        """A computed tensor, flat and as precise as it is; None for one that is stored."""
        if name not in self.groups:
            return None
        if (small := self._small.get(name)) is not None:
            return small
        key, compute = self.groups[name]
        with self._lock:
            working = self._working.setdefault(key, Lock())
        with working:  # one thread computes, others that need the same wait
            with self._lock:
                values = self._recent.get(key)
            if values is None:
                values = {each: value.contiguous().reshape(-1) for each, value in compute().items()}
                self._keep(key, values)
        return values[name]

    def read_bytes(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with the tensor's bytes from the given one on, rounded to its dtype."""
        value = self.computed(name)
        if value is None:
            super().read_bytes(name, start, out)
            return
        raw = value.to(self.tensors[name].dtype).view(torch.uint8).numpy()
        out[:] = raw[start : start + len(out)].data

    def _keep(self, key: str, values: Mapping[str, Tensor]) -> None:
        with self._lock:
            self._small.update({name: value for name, value in values.items() if value.numel() <= _SMALL})
            self._recent[key] = values
            while len(self._recent) > KEPT:
                self._recent.popitem(last=False)


def free_at_once() -> None:
    """Have the C library return large blocks when they are freed: it would keep as much again for each thread."""
    if (mallopt := getattr(_LIBC, "mallopt", None)) is not None:
        mallopt(_MMAP_THRESHOLD, _LARGE)
