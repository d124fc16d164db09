"""Children of the process that work through a list: like threads, whatever happens to them."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from hf_modular.checkpoints import save_checkpoint
from hf_modular.merging import DAREConfig, LinearConfig, MergeRecipe, PCBConfig, TIESConfig, merge
from hf_modular.merging.engine._forks import Forks, can_fork
from hf_modular.merging.engine._workers import Workers
from hf_modular.merging.runs import _crew, _stream

pytestmark = pytest.mark.skipif(not can_fork(), reason="processes are forked on Linux alone")


@pytest.fixture
def forks():
    with Forks(3) as pool:
        yield pool


def children() -> set[str]:
    return {*Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def test_results_come_in_the_order_of_the_items(forks):
    def slow_at_first(number):
        time.sleep(0.05 if number < 2 else 0)
        return number, os.getpid()

    before = children()
    results = [*forks.map(slow_at_first, range(40))]
    assert [number for number, _ in results] == [*range(40)]
    assert len({process for _, process in results} - {os.getpid()}) == 3
    assert [*forks.map(str, [])] == []
    assert children() == before
    assert forks.memory > 0


class OddError(Exception):
    """Cannot be made again from its arguments."""

    def __init__(self, one, two):
        super().__init__(f"{one}, {two}")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ValueError("seven"), ValueError, "^seven"),
        (OSError(28, "No space left"), OSError, r"\[Errno 28\] No space left"),
        (OddError(1, 2), RuntimeError, "^OddError: 1, 2$"),
    ],
)
def test_the_first_error_in_order_is_raised(forks, error, kind, message):
    def fails(number):
        if number == 7:
            raise error
        return number

    results = forks.map(fails, range(100))
    assert [next(results) for _ in range(7)] == [*range(7)]
    with pytest.raises(kind, match=message) as caught:
        next(results)
    assert kind is RuntimeError or "in a worker process" in caught.value.__notes__[0]


def test_no_child_outlives_the_context():
    before = children()
    with Forks(2) as pool:
        results = pool.map(lambda number: number, iter(int, 1))
        next(results)
        assert len(children() - before) == 2
    assert children() == before


def test_only_the_main_thread_of_a_process_that_may_have_children_forks():
    assert can_fork()
    with ThreadPoolExecutor(1) as threads:
        assert not threads.submit(can_fork).result()
    with get_context("fork").Pool(1) as processes:
        assert not processes.apply(can_fork)


def test_a_child_that_is_killed_is_said(forks):
    def killed(number):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match="ended with exit code -9, perhaps because memory ran out"):
        [*forks.map(killed, range(5))]


ORPHANS = """
import os, time
from hf_modular.merging.engine._forks import Forks
with Forks(2) as pool:
    for child in pool.map(lambda number: time.sleep(60 * (number > 1)) or os.getpid(), range(9)):
        print(child, flush=True)
"""


def test_children_die_with_their_parent():
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True)
    processes = {int(parent.stdout.readline()) for _ in range(2)}
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while any(is_alive(process) for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for i, name in enumerate(("base", "one", "two")):
        g = torch.Generator().manual_seed(i)
        tensors = {f"layers.{j}.w": torch.randn(300 if j == 3 else 20, 50, generator=g) for j in range(9)}
        save_checkpoint(folder / name, tensors | {"steps": torch.tensor(i), "none": torch.zeros(0, 3)})
    return folder


@pytest.mark.filterwarnings("ignore:steps:UserWarning")
@pytest.mark.parametrize("config", [LinearConfig(), TIESConfig(rescale="norm"), PCBConfig()], ids=lambda c: c.name)
def test_a_merge_by_processes_is_that_by_threads(models, tmp_path, monkeypatch, config):
    """With a tensor that all of them look at, small ones that one does alone, and notes that they take."""
    base = None if config.base_model == "unused" else models / "base"
    recipe = MergeRecipe.of(config, [models / "one", models / "two"], base)
    threads = merge(recipe, tmp_path / "threads", workers=2, max_shard_size="9KB")
    monkeypatch.setattr(_crew, "WORTH_FORKING", 0)
    monkeypatch.setattr(_stream, "crew", lambda *arguments: used.append(_crew.crew(*arguments)) or used[-1])
    used = []
    processes = merge(recipe, tmp_path / "processes", workers=3, max_shard_size="9KB")
    assert isinstance(used[0], Forks)
    assert used[0].memory > 0
    for file in (tmp_path / "threads").glob("model*"):
        assert (tmp_path / "processes" / file.name).read_bytes() == file.read_bytes()
    assert processes.notes == threads.notes
    assert any("steps" in note for note in processes.notes)


def test_whole_tensors_are_merged_by_threads(models, tmp_path, monkeypatch):
    monkeypatch.setattr(_crew, "WORTH_FORKING", 0)
    used = []
    monkeypatch.setattr(_stream, "crew", lambda *arguments: used.append(_crew.crew(*arguments)) or used[-1])
    with pytest.warns(UserWarning, match="steps"):
        merge(
            MergeRecipe.of(DAREConfig(mask="columns"), [models / "one", models / "two"], models / "base"),
            tmp_path / "out",
            workers=2,
        )
    assert isinstance(used[0], Workers)
