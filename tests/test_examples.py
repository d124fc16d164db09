"""The examples run as they are, offline, and do what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d\.\d+(?:e[-+]\d+)?", text)]


def learns(output: str) -> None:
    (accuracy,) = numbers(output.splitlines()[-1])
    assert accuracy > 0.8  # of ten classes


def merges(output: str) -> None:
    base, code, verse, merged = (numbers(line) for line in output.splitlines()[-4:])
    assert all(m < b for m, b in zip(merged, base, strict=True))  # better at both than the base
    assert merged[1] < code[1]  # and at what the other one was not taught
    assert merged[0] < verse[0]


def serves(output: str) -> None:
    lines = output.splitlines()[-3:]
    assert [line.split()[0] for line in lines] == ["first", "second", "__base__"]
    assert all(difference < 1e-5 for line in lines for difference in numbers(line))


def holds_tasks(output: str) -> None:
    lines = output.splitlines()
    assert all(0 < error < 0.6 for line in lines[:3] for error in numbers(line))
    losses = [numbers(line) for line in lines[4:7]]  # of each task on each text
    assert all(min(range(3), key=lambda text: losses[task][text]) == task for task in range(3))
    assert "torch.Size([3, 20, 256])" in lines[7]
    assert lines[8] == "back as LoRA: adapter_config.json adapter_model.safetensors"


CHECKS = {
    "train_hut_adapter.py": learns,
    "merge_two_models.py": merges,
    "serve_mixed_batch.py": serves,
    "one_adapter_many_tasks.py": holds_tasks,
}


def test_every_example_is_checked() -> None:
    assert CHECKS.keys() == {path.name for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("name", CHECKS)
def test_example(name: str) -> None:
    CHECKS[name](run(name))


@pytest.mark.parametrize("name", CHECKS)
def test_example_is_short(name: str) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) < 60
