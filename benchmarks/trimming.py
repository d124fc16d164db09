"""Trimming the task vectors of three bf16 fine-tunes to their largest 20 %: by selection, and by sorting.

    OMP_NUM_THREADS=1 python benchmarks/trimming.py [ELEMENTS]

CPU seconds of one thread, the least of several runs, and nanoseconds for each element of each model. Selection
includes reading the numbers as bf16 and converting them; sorting is what mergekit does, of deltas that it is given.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_modular.merging import TIESConfig
from hf_modular.merging._method import BLOCK, Stack
from hf_modular.merging.engine._pieces import _thinned

DENSITY = 0.2
MODELS = 3


@dataclass
class Blocks:
    """A tensor of a base and its fine-tunes in blocks, as the engine gives them to a method."""

    tensors: list[Tensor]  # bf16, the base first

    def __iter__(self) -> Iterator[Stack]:
        return (self._block(start) for start in range(0, self.tensors[0].numel(), BLOCK))

    def map(self, function: Callable) -> Iterator:
        return map(function, self)

    def sample(self, of_each: int = 2048) -> Iterator[Stack]:
        starts = range(0, self.tensors[0].numel(), 32 * BLOCK)
        return (_thinned(self._block(start), of_each) for start in starts)

    def _block(self, start: int) -> Stack:
        numbers = torch.stack([tensor[start : start + BLOCK].float() for tensor in self.tensors])
        return Stack("w", numbers[0], numbers[1:], torch.ones(MODELS), offset=start)


def least(function: Callable[[], object], runs: int) -> float:
    seconds = []
    for _ in range(runs):
        start = time.thread_time()
        function()
        seconds.append(time.thread_time() - start)
    return min(seconds)


def sort(deltas: list[Tensor], *, stable: bool) -> None:
    for delta in deltas:
        mask = torch.zeros_like(delta)
        mask[torch.argsort(delta.abs(), descending=True, stable=stable)[: int(DENSITY * delta.numel())]] = 1


def main() -> None:
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 1 << 22
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(size, generator=g)).bfloat16()
    models = [(base.float() + 1e-3 * torch.randn(size, generator=g)).bfloat16() for _ in range(MODELS)]
    deltas = [model.float() - base.float() for model in models]
    method, blocks = TIESConfig(density=DENSITY), Blocks([base, *models])
    survey = method.survey(blocks)
    rank = size - int(DENSITY * size) + 1
    ways = {
        "selection, in blocks": (lambda: method.survey(blocks), 5),
        "... and the merge itself": (lambda: [method.merge(block, survey) is None for block in blocks], 5),
        "torch.kthvalue": (lambda: [torch.kthvalue(delta.abs(), rank) for delta in deltas], 2),
        "torch.argsort": (lambda: sort(deltas, stable=False), 2),
        "torch.argsort, stable": (lambda: sort(deltas, stable=True), 2),
    }
    for name, (way, runs) in ways.items():
        seconds = least(way, runs)
        print(f"{name:26} {seconds:8.3f} s {1e9 * seconds / size / MODELS:8.1f} ns")


if __name__ == "__main__":
    main()
