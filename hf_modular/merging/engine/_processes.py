"""The processes of `accelerate launch`, `torchrun` or `mpirun`, or this one alone.

Each merges tensors of its own into the files that the first one laid out, and only the first makes the result visible.
What goes wrong in one of them ends all of them.
"""

import atexit
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")

_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # where accelerate looks
_LOCAL_COUNTS = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")


class _Outcome(NamedTuple):
    value: Any
    error: str | None


@dataclass(frozen=True)
class Processes:
    """How many processes work on a merge, and which of them this is."""

    index: int = 0
    count: int = 1
    local_index: int = 0  # on this machine
    local_count: int = 1

    @property
    def first(self) -> bool:
        return self.index == 0

    def together(self, step: Callable[[], T]) -> list[T]:
        """What each process makes of a step, when all are done with it; an error in one of them is raised in all."""
        if self.count == 1:
            return [step()]
        outcomes: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(outcomes, _attempt(step))
        with suppress(RuntimeError):  # nobody leaves, and breaks the connection, before all have heard
            torch.distributed.barrier()
        for index, outcome in enumerate(outcomes):
            if outcome.error:
                raise ValueError(f"process {index} of {self.count}: {outcome.error}")
        return [outcome.value for outcome in outcomes]

    def share(self, sizes: Mapping[str, int]) -> set[str]:
        """This process's part of some tensors, about as large as that of each other."""
        loads = [0] * self.count
        mine = set()
        for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
            least = loads.index(min(loads))
            loads[least] += size + 1
            if least == self.index:
                mine.add(name)
        return mine

    def device(self, device: torch.device) -> torch.device:
        """Each process of a machine has an accelerator of its own, unless one is named."""
        if self.count == 1 or device.type == "cpu" or device.index is not None:
            return device
        return torch.device(device.type, self.local_index)


@cache
def processes() -> Processes:
    """All processes, if a launcher has started several."""
    if all(os.environ.get(name, "1") == "1" for name in _COUNTS):
        return Processes()
    from accelerate import PartialState

    state = PartialState(cpu=True)  # what they tell each other is no work for an accelerator
    atexit.register(_disconnect)
    here = next((int(os.environ[name]) for name in _LOCAL_COUNTS if name in os.environ), 1)
    return Processes(state.process_index, state.num_processes, state.local_process_index, here)


def _disconnect() -> None:
    """End the threads of the connection: an interpreter that ends while they run may abort."""
    if torch.distributed.is_initialized():
        with suppress(RuntimeError):
            torch.distributed.destroy_process_group()


def _attempt(step: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(step(), None)
    except Exception as error:  # whatever it is: all must hear of it, or the others wait for ever
        return _Outcome(None, f"{type(error).__name__}: {error}")
