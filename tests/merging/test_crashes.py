"""Merges that are killed, run out of disk space or meet each other: no half checkpoint, and resumed the same bytes."""

import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hf_modular import checkpoints
from hf_modular.checkpoints import INDEX, STAGING, CheckpointWriter, TensorInfo, save_checkpoint
from hf_modular.merging import DAREConfig, MergeRecipe, merge

KILL = """
import os, signal, sys, time
from pathlib import Path
from hf_modular import checkpoints
from hf_modular.merging import merge
from hf_modular.merging.runs import _crew

checkpoints.JOURNALED = 1
for i, delay in enumerate(map(float, sys.argv[3:])):
    child = os.fork()
    if not child:
        _crew.WORTH_FORKING = i % 4 // 2 * 10**9  # every other pair by children of its own
        merge(sys.argv[1], f"{sys.argv[2]}-{i}", max_shard_size="9KB", workers=2, progress=False)
        os._exit(0)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""
KILL_AT = """
import os, signal, sys
from pathlib import Path
from hf_modular import checkpoints
from hf_modular.merging import merge

owner = {"write": checkpoints.CheckpointWriter, "replace": Path}[sys.argv[3]]
original, left = getattr(owner, sys.argv[3]), int(sys.argv[4])

def counted(*args):
    global left
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return original(*args)

setattr(owner, sys.argv[3], counted)
checkpoints.JOURNALED = 1
merge(sys.argv[1], sys.argv[2], max_shard_size="9KB", workers=1, progress=False)
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for i, name in enumerate(("base", "one", "two")):
        g = torch.Generator().manual_seed(i)
        save_checkpoint(folder / name, {f"layers.{j}.w": torch.randn(30, 50, generator=g) for j in range(12)})
    recipe = MergeRecipe.of(DAREConfig(drop=0.4), [folder / "one", folder / "two"], folder / "base", seed=3)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def expected(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    merge(recipe, out, max_shard_size="9KB")
    return contents(out)


def contents(folder):
    """What the weights' files hold, byte by byte; nothing but them is said to be the same in two runs."""
    return {path.name: path.read_bytes() for path in [*folder.glob("model*"), folder / "merge_recipe.yaml"]}


def is_complete(folder):
    return (folder / INDEX).exists()


def test_killed_at_any_moment_it_leaves_no_half_checkpoint(recipe, expected, tmp_path):
    """What is there is complete or no checkpoint at all; the next run resumes it or clears it up."""
    draw = random.Random(0)
    delays = [str(draw.uniform(0, 0.2)) for _ in range(16)]
    subprocess.run([sys.executable, "-c", KILL, recipe, tmp_path / "out", *delays], check=True)
    for i, out in enumerate(tmp_path / f"out-{i}" for i in range(len(delays))):
        if not is_complete(out):
            assert not (out / "model.safetensors").exists()
            merge(recipe, out, max_shard_size="9KB", **({"resume": True} if i % 2 else {"overwrite": True}))
            # a run killed when all was in place leaves its empty folder, this one must not
            assert not (out / STAGING).exists()
        assert contents(out) == expected


def killed_at(recipe, out, what, count):
    done = subprocess.run([sys.executable, "-c", KILL_AT, recipe, out, what, str(count)], check=False)
    assert done.returncode == -signal.SIGKILL


def test_what_is_finished_is_not_done_again(recipe, expected, tmp_path, monkeypatch):
    killed_at(recipe, tmp_path / "out", "write", 8)
    assert not is_complete(tmp_path / "out")
    written = []
    write = CheckpointWriter.write
    monkeypatch.setattr(CheckpointWriter, "write", lambda *args: written.append(args[1]) or write(*args))
    merge(recipe, tmp_path / "out", max_shard_size="9KB", resume=True)
    assert 4 <= len(written) < 12  # what was written last may not have been counted yet
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize(("owner", "step", "done"), [(CheckpointWriter, "write", 8), (Path, "replace", 2)])
def test_interrupted_it_says_how_to_go_on(recipe, expected, tmp_path, monkeypatch, owner, step, done):
    original, left = getattr(owner, step), [KeyboardInterrupt()] + [None] * done

    def interrupted(*args):
        if (interrupt := left.pop()) is not None:
            raise interrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            merge(recipe, tmp_path / "out", max_shard_size="9KB", workers=1)
    assert "--resume" in caught.value.__notes__[0]
    assert not is_complete(tmp_path / "out")
    written = []
    write = CheckpointWriter.write
    monkeypatch.setattr(CheckpointWriter, "write", lambda *args: written.append(args[1]) or write(*args))
    merge(recipe, tmp_path / "out", max_shard_size="9KB", resume=True)
    assert 12 - done <= len(written) < 12 if step == "write" else not written
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("moved", [0, 2])
def test_killed_while_the_files_are_moved(recipe, expected, tmp_path, moved):
    killed_at(recipe, tmp_path / "out", "replace", moved)
    assert not is_complete(tmp_path / "out")
    if moved:
        with pytest.raises(ValueError, match="must be absent or empty"):
            merge(recipe, tmp_path / "out", max_shard_size="9KB")
    report = merge(recipe, tmp_path / "out", max_shard_size="9KB", resume=True)
    assert contents(tmp_path / "out") == expected
    assert report.seed == 3


def test_only_the_same_merge_is_resumed(recipe, tmp_path):
    killed_at(recipe, tmp_path / "out", "write", 8)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out" / STAGING).iterdir()}
    for options in ({"seed": 4}, {"max_shard_size": "20KB"}):
        with pytest.raises(ValueError, match="only the merge that was interrupted can be resumed"):
            merge(recipe, tmp_path / "out", resume=True, **{"max_shard_size": "9KB", **options})
    one = recipe.parent / "one" / "model.safetensors"
    time = one.stat().st_mtime_ns
    os.utime(one, ns=(time, time + 1))
    with pytest.raises(ValueError, match="other inputs"):
        merge(recipe, tmp_path / "out", resume=True, max_shard_size="9KB")
    os.utime(one, ns=(time, time))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / STAGING).iterdir()} == before


def test_to_resume_what_was_never_begun_is_to_begin(recipe, expected, tmp_path):
    merge(recipe, tmp_path / "out", max_shard_size="9KB", resume=True)
    assert contents(tmp_path / "out") == expected
    with pytest.raises(ValueError, match="must be absent or empty"):
        merge(recipe, tmp_path / "out", max_shard_size="9KB", resume=True)


def test_a_journal_that_a_crash_cut(tmp_path):
    journal = checkpoints.Journal(tmp_path / "journal", "a")
    journal.begin()
    journal.finish(["moving", 'a "quoted"\nname'])
    with (tmp_path / "journal").open("a") as stream:
        stream.write('"half')
    assert journal.finished == {"moving", 'a "quoted"\nname'}
    assert journal.state == "writing"
    assert journal.fits()
    assert not checkpoints.Journal(tmp_path / "journal", "b").fits()


def test_a_limit_on_the_size_of_files(recipe, tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: the result cannot be written to .*out"):
            merge(recipe, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_on_the_way(recipe, tmp_path, monkeypatch):
    calls = iter(range(6))
    pwrite = os.pwrite

    def full(*args):
        if next(calls, None) is None:
            raise OSError(28, "No space left on device")
        return pwrite(*args)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=r"the disk is full: .* free some space or choose another folder"):
        merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_second_merge_into_a_folder_is_refused(recipe, tmp_path):
    with CheckpointWriter(tmp_path / "out", {"a": TensorInfo(torch.float32, (1,))}) as writer:
        for options in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(ValueError, match="another merge is writing to"):
                merge(recipe, tmp_path / "out", **options)
        writer.write("a", torch.ones(1))
        writer.commit()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.get_tensor("a").item() == 1


MEMORY = """
import sys
from pathlib import Path
from hf_modular.merging import merge
print(merge(sys.argv[1], sys.argv[2], workers=2, progress=False, hashes=False).peak_memory)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what counts as resident is another thing elsewhere")
def test_the_memory_does_not_grow_with_the_model(tmp_path):
    peaks = []
    for size in (64, 128):  # MB of each model
        folder = tmp_path / str(size)
        rows = size * 1000 // 4
        for name in ("base", "one", "two"):
            save_checkpoint(folder / name, {f"w{i}": torch.full((rows // 4, 1000), 0.5) for i in range(4)})
        recipe = MergeRecipe.of(DAREConfig(), [folder / "one", folder / "two"], folder / "base")
        (folder / "recipe.yaml").write_text(recipe.to_yaml())
        command = [sys.executable, "-c", MEMORY, folder / "recipe.yaml", folder / "out"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 30e6
