"""The examples run as they are, offline, and do what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d\.\d+(?:e[-+]\d+)?", text)]


def learns(output: str, folder: Path) -> None:
    (accuracy,) = numbers(output.splitlines()[-1])
    assert accuracy > 0.8  # of ten classes


def merges(output: str, folder: Path) -> None:
    base, code, verse, merged = (numbers(line) for line in output.splitlines()[-4:])
    assert all(m < b for m, b in zip(merged, base, strict=True))  # better at both than the base
    assert merged[1] < code[1]  # and at what the other one was not taught
    assert merged[0] < verse[0]


def serves(output: str, folder: Path) -> None:
    lines = output.splitlines()[-3:]
    assert [line.split()[0] for line in lines] == ["first", "second", "__base__"]
    assert all(difference < 1e-5 for line in lines for difference in numbers(line))


def holds_tasks(output: str, folder: Path) -> None:
    *errors, summary, answers = output.splitlines()
    assert all(0 < error < 0.5 for line in errors for error in numbers(line))
    assert "0.792 of their numbers" in summary  # (p (r + n) + r) / (r n) for three adapters of rank 8
    # each sample of one batch was continued by the task that it names
    assert all(text in answers for text in ["Dear Sir or Madam", "Dear diary, today", "Dear heart, the Tyg"])
    (reverted,) = folder.glob("*/verse-again")
    assert LoraConfig.from_pretrained(reverted).r == 8
    assert {path.name for path in reverted.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


CHECKS = {
    "train_hut_adapter.py": learns,
    "merge_two_models.py": merges,
    "serve_mixed_batch.py": serves,
    "one_adapter_many_tasks.py": holds_tasks,
}


def test_every_example_is_checked() -> None:
    assert CHECKS.keys() == {path.name for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("name", CHECKS)
def test_example(name: str, tmp_path: Path) -> None:
    CHECKS[name](run(name, tmp_path), tmp_path)


@pytest.mark.parametrize("name", CHECKS)
def test_example_is_short(name: str) -> None:
    longest = 40 if name == "one_adapter_many_tasks.py" else 60
    assert len((EXAMPLES / name).read_text().splitlines()) <= longest
