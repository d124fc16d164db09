"""The benchmark of merges: its quick form from end to end, and the figures of its report."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import merging_quality
import merging_quality_report as report
import pytest
from matplotlib.image import imread

from hf_modular.merging import METHODS

SHOWN = ("average", "TIES", "Fisher", "SLERP", "model stock")


def measure(folder: Path) -> dict[str, Any]:
    entries = tuple(entry for entry in merging_quality.ENTRIES if entry.name in SHOWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging_quality, "ENTRIES", entries)
        patch.setattr(merging_quality, "DROPS", (0.9,))
        patch.setattr(merging_quality, "FISHER_EXAMPLES", 4)
        arguments = ["--quick", "--cache", str(folder), "--output", str(folder / "results")]
        patch.setattr(sys, "argv", ["merging_quality.py", *arguments])
        merging_quality.main()
    return json.loads((folder / "results/merging_quality.json").read_text())


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("merging-quality")
    return SimpleNamespace(folder=folder, results=measure(folder))


def test_everything_is_in_the_results(quick: SimpleNamespace) -> None:
    rows = {row["method"]: row for row in quick.results["merges"]}
    assert list(rows) == [entry.name for entry in merging_quality.ENTRIES if entry.name in SHOWN]
    for row in rows.values():
        (run,) = row["runs"]
        assert run["default"].keys() == run["tuned"].keys()
        assert len(run["default"]) == 2
        assert len(run["tried"]) == (2 if row["space"] else 1)
        assert max(run["tried"]) == run["tried"][0] or run["settings"]
    (thinned,) = quick.results["thinned"]
    assert {run["task"] for run in thinned["runs"]} == {*list(quick.results["base"])[:4]}
    text = (quick.folder / "results/merging_quality.md").read_text()
    assert all(f"| {name} | " in text for name in (*rows, "DARE", "DAREx-q, validation"))
    assert imread(quick.folder / "results/merging_quality.png")[..., :3].std() > 0.05


def test_what_is_finished_is_not_done_again(quick: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = quick.folder / "quick" / "merging_quality.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(lines[:-1]) + lines[-1][:40])  # interrupted while writing
    done = []
    carry_out = merging_quality.Job._carried_out
    monkeypatch.setattr(merging_quality.Job, "_carried_out", lambda job: done.append(job.entry.name) or carry_out(job))
    again = measure(quick.folder)
    assert done == ["SLERP"]
    for before, after in zip(quick.results["merges"], again["merges"], strict=True):
        assert [run["tuned"] for run in before["runs"]] == [run["tuned"] for run in after["runs"]]


def test_every_method_is_measured_or_named_as_left_out() -> None:
    measured = {entry.config.name for entry in merging_quality.ENTRIES}
    for name in METHODS:
        assert name in measured or name in merging_quality.__doc__, name


def test_accuracies_are_shares_of_the_tasks_own_models() -> None:
    results = {"individual": [{"a": 0.8, "b": 0.5}, {"a": 1.0, "b": 0.4}]}
    row = {"runs": [{"tuned": {"a": 0.4, "b": 0.5}}, {"tuned": {"a": 0.5, "b": 0.2}}]}
    assert report.normalised(results, row, "tuned") == [0.75, 0.5]
    assert report.worst(row, "tuned") == pytest.approx(0.3)
