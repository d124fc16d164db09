"""What the merge methods cost for each element of the result: CPU nanoseconds of one thread.

    OMP_NUM_THREADS=1 python benchmarks/merge_kernels.py [--elements N] [--block N ...] [METHOD ...]

A base and three bf16 fine-tunes of it in a file, read block by block as the engine does: read, convert to fp32 or
fp64, survey in as many passes as the method takes, merge, round, check. The least of several interleaved runs.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hf_modular.merging import (
    BreadcrumbsConfig,
    DAREConfig,
    DELLAConfig,
    LinearConfig,
    PCBConfig,
    SCEConfig,
    TaskArithmeticConfig,
    TIESConfig,
)
from hf_modular.merging._method import MergeMethod, Stack
from hf_modular.merging.engine._pieces import Piece, Pieces, PieceStacks
from hf_modular.merging.engine._preflight import is_finite
from hf_modular.merging.engine._rounding import rounded

MODELS = 3
METHODS: dict[str, MergeMethod | None] = {
    "nothing": None,  # read, convert, round, check
    "linear": LinearConfig(),
    "task_arithmetic": TaskArithmeticConfig(),
    "dare": DAREConfig(),
    "dare_linear": DAREConfig(rescale="norm"),
    "dare_ties": DAREConfig(rescale="norm", election="mergekit"),
    "ties": TIESConfig(),
    "pcb": PCBConfig(),
    "pcb_raw": PCBConfig(variant="raw"),
    "sce": SCEConfig(select_topk=0.2),
    "breadcrumbs": BreadcrumbsConfig(),
    "della": DELLAConfig(),
}


class _Stacks(PieceStacks):
    def sample(self, of_each: int = 2048) -> Iterable[Stack]:
        """As many elements as the engine would take of a model of half a billion parameters in many tensors."""
        return super().sample(8 * of_each if of_each == 2048 else of_each)


@dataclass
class Blocks:
    """A tensor of a base and its fine-tunes in blocks, as the engine gives them to a method."""

    file: int
    size: int
    block: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.raw = torch.empty(self.block, dtype=torch.bfloat16)
        self.bytes = self.raw.view(torch.uint8).numpy().data
        self.memory = torch.empty(1 + MODELS, self.block, dtype=self.dtype)
        self.rows = self.memory.unbind()
        self.weights = torch.ones(MODELS, dtype=self.dtype)

    @property
    def stacks(self) -> PieceStacks:
        return _Stacks(Pieces({"w": self.size}, block=self.block), self.stack)

    def stack(self, piece: Piece) -> Stack:
        for model, row in enumerate(self.rows):
            os.preadv(self.file, [self.bytes], 2 * (model * self.size + piece.start))
            row.copy_(self.raw)
        return Stack("w", self.memory[0], self.memory[1:], self.weights, offset=piece.start)


def written(size: int) -> int:
    """A file with a tensor of all models, which is gone when it is closed."""
    g = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(size, generator=g)
    models: list[Tensor] = [base, *(base + 1e-3 * torch.randn(size, generator=g) for _ in range(MODELS))]
    with tempfile.TemporaryFile(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as file:
        for model in models:
            file.write(model.bfloat16().view(torch.uint8).numpy().data)
        return os.dup(file.fileno())


def seconds(method: MergeMethod | None, file: int, size: int, block: int) -> tuple[float, float]:
    """Of the survey and of the merge."""
    blocks = Blocks(file, size, block, torch.float64 if method and method.in_fp64 else torch.float32)
    start = time.thread_time()
    survey = method.survey(blocks.stacks) if method else None
    surveyed = time.thread_time()
    for stack in blocks.stacks:
        merged = rounded(method.merge(stack, survey) if method else stack.models[0], torch.bfloat16)
        if not is_finite(merged):
            raise ValueError("the merged tensor must be finite")
    return surveyed - start, time.thread_time() - surveyed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--elements", type=int, default=1 << 23)
    parser.add_argument("--block", type=int, nargs="+", default=[1 << 16, 1 << 17, 1 << 18])
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    file = written(options.elements)
    names = options.methods or [*METHODS]
    least: dict[tuple[str, int], tuple[float, float]] = {}
    for _ in range(options.runs):
        for block in options.block:
            for name in names:
                taken = seconds(METHODS[name], file, options.elements, block)
                least[name, block] = min(least.get((name, block), taken), taken, key=sum)
    print(f"{'CPU ns per element':18}", *(f"{block:>20}" for block in options.block))
    for name in names:
        cells = [[1e9 * part / options.elements for part in least[name, block]] for block in options.block]
        print(f"{name:18}", *(f"{survey:7.2f} +{merge:5.2f} ={survey + merge:6.2f}" for survey, merge in cells))


if __name__ == "__main__":
    main()
