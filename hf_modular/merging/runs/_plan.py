"""What a merge would do: found from headers and settings, and from a trial on a few tensors; nothing is written."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from hf_modular.checkpoints import TensorInfo, plan_shards
from hf_modular.merging.engine._engine import Engine, Inputs
from hf_modular.merging.engine._forks import Forks
from hf_modular.merging.engine._workers import Pool, Workers
from hf_modular.merging.runs._crew import crew
from hf_modular.merging.runs._sampled import infos, part_of, sample
from hf_modular.merging.sources._computed import KEPT, ComputedCheckpoint
from hf_modular.merging.sources._sources import Source

_TRIED, _TENSORS = 1 << 22, 64  # elements and tensors of the trial
_LIBRARIES = 350 << 20  # bytes that Python and torch take
_FORK = 20 << 20  # bytes of what a child shares with its parent at first that it changes
_PEFT = 500 << 20  # bytes that transformers and PEFT take beside them, where there is an adapter
_WHOLE = 1 << 30  # bytes for whole tensors, for methods that need them, as long as one tensor does not take more
_COPIES = 3  # of a layer in fp32 while an adapter is merged into it, beside those that are kept


@dataclass(frozen=True)
class MergePlan:
    """What a merge would do.

    Args:
        merge_method: The method's name.
        models: What is merged.
        tensors: How many tensors would be written.
        parameters: How many numbers they hold.
        files: How many files of weights.
        bytes_read: Of all models, once.
        bytes_written: Of weights.
        peak_memory: About how much memory it takes, in bytes, without verification.
        seconds: About how long it takes, by a trial on some tensors, without writing and verification. None where
            models are taken one by one.
        workers: How many work at a time.
        notes: What was decided and may surprise.
    """

    merge_method: str
    models: list[str]
    tensors: int
    parameters: int
    files: int
    bytes_read: int
    bytes_written: int
    peak_memory: int
    seconds: float | None
    workers: int
    notes: list[str]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    def summary(self) -> str:
        """The plan in a few lines."""
        notes = "".join(f"note: {note}\n" for note in self.notes)
        duration = "" if self.seconds is None else f", about {self.seconds:,.1f} s on {self.workers} workers"
        return (
            f"{notes}Would merge {len(self.models)} models by {self.merge_method}: {self.tensors} tensors, "
            f"{self.parameters:,} parameters, {self.files} files\n"
            f"Reads {self.bytes_read / 1e6:,.1f} MB, writes {self.bytes_written / 1e6:,.1f} MB, takes about "
            f"{self.peak_memory / 1e6:,.0f} MB of memory{duration}"
        )


class _Nowhere:
    def write(self, name: str, data: Tensor, start: int) -> None:
        pass


def make_plan(
    engines: Sequence[Engine],
    sources: Sequence[Source],
    *,
    notes: Sequence[str],
    workers: int | None,
    max_shard_size: int | str,
    one_by_one: bool,
) -> MergePlan:
    """The plan of a merge that has no problems."""
    tensors = {name: info for engine in engines for name, info in infos(engine).items()}
    with crew(engines, sources, workers) as pool:
        seconds = None if one_by_one else sum(map(_tried, engines)) / pool.count
    return MergePlan(
        merge_method=engines[0].method.name,
        models=[source.reference for source in sources],
        tensors=len(tensors),
        parameters=sum(info.numel for info in tensors.values()),
        files=len(plan_shards(tensors, max_shard_size)),
        bytes_read=sum(file.stat().st_size for file in {f for source in sources for f in source.weights.files}),
        bytes_written=sum(info.nbytes for info in tensors.values()),
        peak_memory=_libraries(sources) + sum(map(_computing, sources)) + max(_working(e, pool) for e in engines),
        seconds=seconds,
        workers=pool.count,
        notes=list(notes),
    )


def _tried(engine: Engine) -> float:
    """Seconds for all tensors and one worker, by those for some."""
    sizes = {name: info.numel for name, info in infos(engine).items()}
    names = sample(sizes, engine.seed, _TRIED, _TENSORS) or {min(sizes, key=sizes.__getitem__)}
    trial = part_of(engine, names, _as_it_is, engine.device)
    durations = []
    with Workers(1) as alone:
        for _ in range(2):  # the first time there is more to load and to make room for
            started = time.perf_counter()
            trial.run(_Nowhere(), alone, lambda name, size: None)
            durations.append(time.perf_counter() - started)
    return min(durations) * sum(sizes.values()) / max(sum(sizes[name] for name in names), 1)


def _as_it_is(inputs: Inputs, plan: Mapping[str, TensorInfo]) -> Inputs:
    return inputs


def _libraries(sources: Sequence[Source]) -> int:
    return _LIBRARIES + (_PEFT if any(source.parts for source in sources) else 0)


def _working(engine: Engine, pool: Pool) -> int:
    """Bytes of the buffers in which models are read and merged."""
    wide = max((dtype.itemsize for dtype in engine.dtypes.values()), default=0)
    rows = (len(engine.models) * (1 + len(engine.companions)) + 2) * 2 * wide
    whole = [info.numel for name, info in infos(engine).items() if not engine.settings[name].method.elementwise]
    largest = sorted((rows * size for size in whole), reverse=True)[: pool.count]
    blocks = pool.count * (rows * (engine.block or pool.block) + (_FORK if isinstance(pool, Forks) else 0))
    return max(blocks, min(sum(largest), max(_WHOLE, *largest)) if largest else 0)


def _computing(source: Source) -> int:
    """Bytes of the layers into which an adapter is merged, or that are dequantised."""
    if not isinstance(source.weights, ComputedCheckpoint):
        return 0
    groups: dict[str, int] = {}
    for name, (group, _) in source.weights.groups.items():
        groups[group] = groups.get(group, 0) + source.weights.tensors[name].numel * torch.float32.itemsize
    return (_COPIES + KEPT) * max(groups.values(), default=0)
