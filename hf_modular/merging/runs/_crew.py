"""Who does the work of a merge."""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager

from hf_modular.merging.engine._engine import Engine
from hf_modular.merging.engine._forks import Forks, can_fork
from hf_modular.merging.engine._workers import Pool, Workers, worker_count
from hf_modular.merging.sources._computed import ComputedCheckpoint
from hf_modular.merging.sources._sources import Source

WORTH_FORKING = 1 << 24  # elements of the result; threads have done with fewer before children have begun


def crew(
    engines: Sequence[Engine], sources: Collection[Source], workers: int | None, beside: int = 1
) -> AbstractContextManager[Pool]:
    """Processes where threads would wait for each other at Python's lock, threads everywhere else: for whole tensors
    and accelerators, whose operations are long, and for layers that are computed once and kept for all.

    Args:
        engines: The parts of the merge.
        sources: The models.
        workers: How many are wanted; the usable cores by default.
        beside: How many processes do the same on this machine.
    """
    count = worker_count(workers, beside)
    elements = sum(size for engine in engines for size in engine.sizes.values())
    forks = (
        can_fork()
        and count > 1
        and elements >= WORTH_FORKING
        and all(engine.device.type == "cpu" and not engine.whole for engine in engines)
        and not any(isinstance(source.weights, ComputedCheckpoint) for source in sources)
    )
    return Forks(count) if forks else Workers(count)
