"""Several processes, as `accelerate launch` starts them: the bytes of one."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from hf_modular.checkpoints import save_checkpoint
from hf_modular.merging import DAREConfig, MergeRecipe, merge
from hf_modular.merging.engine._processes import Processes


@pytest.fixture
def recipe(tmp_path):
    for i, name in enumerate(("base", "one", "two")):
        g = torch.Generator().manual_seed(i)
        tensors = {f"layers.{j}.w": torch.randn(30 + j, 50, generator=g) for j in range(7)}
        save_checkpoint(tmp_path / name, tensors | {"steps": torch.tensor(i), "none": torch.zeros(0, 3)})
    config = DAREConfig(drop=0.4, rescale="norm")
    recipe = MergeRecipe.of(config, [tmp_path / "one", tmp_path / "two"], tmp_path / "base", seed=3)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    return tmp_path / "recipe.yaml"


def launched(*arguments):
    """Two processes with what a launcher puts in their environment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "hf_modular.cli", "merge", *map(str, arguments)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    return [(process.communicate(timeout=120), process.returncode) for process in started]


def test_two_processes_write_the_bytes_of_one(recipe, tmp_path):
    with pytest.warns(UserWarning, match="steps"):
        report = merge(recipe, tmp_path / "one-process", max_shard_size="20KB")
    first, second = launched(recipe, tmp_path / "out", "--max-shard-size", "20KB")
    assert (first[1], second[1]) == (0, 0), (first, second)
    assert "Merged 2 models" in first[0][0]
    assert second[0][0] == ""
    expected = {path.name: path.read_bytes() for path in (tmp_path / "one-process").iterdir()}
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    expected.pop("merge_report.json")
    assert str(report.notes[0]) in found.pop("merge_report.json").decode()
    assert len([name for name in found if name.endswith(".safetensors")]) > 2
    assert found == expected


def test_accelerate_launches_them(recipe, tmp_path):
    with pytest.warns(UserWarning, match="steps"):
        merge(recipe, tmp_path / "one-process")
    settings = "--multi_gpu --num_processes=2 --num_machines=1 --main_process_port=0 --mixed_precision=no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *settings.split(), "--dynamo_backend=no"]
    done = subprocess.run(
        [*command, "-m", "hf_modular.cli", "merge", recipe, tmp_path / "out", "--no-verify"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Merged 2 models") == 1
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "one-process" / weights).read_bytes()


def test_what_fails_in_one_ends_both(recipe, tmp_path):
    tensors = {f"layers.{j}.w": torch.full((30 + j, 50), float("nan") if j == 6 else 1.0) for j in range(7)}
    save_checkpoint(tmp_path / "two", tensors | {"steps": torch.tensor(1), "none": torch.zeros(0, 3)}, overwrite=True)
    for (_, errors), code in launched(recipe, tmp_path / "out"):
        assert code == 2
        assert "process 0 of 2: ValueError: the merged tensor layers.6.w must be finite" in errors
    assert not (tmp_path / "out").exists()


def test_the_parts_are_disjoint_complete_and_alike():
    sizes = {f"t{i}": (i * 7919) % 1000 for i in range(200)}
    parts = [Processes(i, 3).share(sizes) for i in range(3)]
    assert sorted(name for part in parts for name in part) == sorted(sizes)
    loads = [sum(sizes[name] for name in part) for part in parts]
    assert max(loads) - min(loads) <= 1000


def test_an_accelerator_for_each_process_of_a_machine():
    two = Processes(5, 8, 1)
    assert two.device(torch.device("cuda")) == torch.device("cuda:1")
    assert two.device(torch.device("cuda:3")) == torch.device("cuda:3")
    assert two.device(torch.device("cpu")) == torch.device("cpu")
    assert Processes().device(torch.device("cuda")) == torch.device("cuda")
