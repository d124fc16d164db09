"""Sums over a data set, shared by the processes of `accelerate launch` and taken up again where a run was broken."""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Work = Callable[[Sequence[int], dict[str, Tensor]], None]  # adds some examples, given by number, to the sums


@dataclass(frozen=True)
class Store:
    """Where each process saves what it has done, beside the output folder; removed when all is done."""

    folder: Path
    run: Mapping[str, Any]  # what must be the same for a run to go on
    every: float  # seconds

    @classmethod
    def beside(cls, output: Path, run: Mapping[str, Any], every: float) -> "Store":
        return cls(output.with_name(f"{output.name}.partial"), run, every)

    def load(self, rank: int, ranks: int) -> tuple[dict[str, Tensor], int] | None:
        """The sums and how many examples they are of, if there are any."""
        file = self._file(rank, ranks)
        if not file.is_file():
            return None
        with safe_open(file, "pt") as stored:
            state = json.loads(stored.metadata()["state"])
            if state["run"] != self._digest:
                raise ValueError(
                    f"{file} is of a run with another model, data set or settings: remove {self.folder}, or choose "
                    "another output folder"
                )
            return {name: stored.get_tensor(name) for name in stored.keys()}, state["done"]  # noqa: SIM118

    def save(self, sums: Mapping[str, Tensor], done: int, rank: int, ranks: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._file(rank, ranks)
        new = file.with_suffix(".new")
        save_file({name: tensor.cpu() for name, tensor in sums.items()}, new, {"state": self._state(done)})
        new.replace(file)

    def finish(self, write: Callable[[], None]) -> None:
        """Write the result in one process, after which what was saved may go."""
        from accelerate import PartialState

        state = PartialState()
        if state.is_main_process:
            write()
            shutil.rmtree(self.folder, ignore_errors=True)
        state.wait_for_everyone()

    def _file(self, rank: int, ranks: int) -> Path:
        return self.folder / f"{rank:05d}-of-{ranks:05d}.safetensors"

    def _state(self, done: int) -> str:
        return json.dumps({"run": self._digest, "done": done})

    @property
    def _digest(self) -> str:
        return blake2b(json.dumps(self.run, sort_keys=True).encode(), digest_size=16).hexdigest()


def sums_over(
    count: int, window: int, work: Work, zeros: Mapping[str, Tensor], store: Store | None, title: str, progress: bool
) -> dict[str, Tensor]:
    """What `work` makes of all examples, a window of them at a time; on the CPU, the same in every process."""
    from accelerate import PartialState
    from huggingface_hub.utils.tqdm import tqdm

    state = PartialState()
    rank, ranks = state.process_index, state.num_processes
    mine = range(rank, count, ranks)
    sums, done = dict(zeros), 0
    if store and (found := store.load(rank, ranks)):
        sums, done = {name: found[0][name].to(tensor) for name, tensor in zeros.items()}, found[1]
    silent = None if progress and state.is_main_process else True
    saved = time.monotonic()
    with tqdm(total=len(mine), initial=done, desc=title, unit="example", disable=silent) as bar:
        for start in range(done, len(mine), window):
            part = mine[start : start + window]
            work(part, sums)
            bar.update(len(part))
            if store and time.monotonic() - saved >= store.every:
                store.save(sums, start + len(part), rank, ranks)
                saved = time.monotonic()
    return {name: _over_processes(tensor).cpu() for name, tensor in sums.items()}


def _over_processes(tensor: Tensor) -> Tensor:
    from accelerate import PartialState
    from accelerate.utils import reduce

    state = PartialState()
    return reduce(tensor.to(state.device), "sum") if state.num_processes > 1 else tensor
