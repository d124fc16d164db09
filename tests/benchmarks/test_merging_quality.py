"""The benchmark of merges: its quick form from end to end, and the figures of its report."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import merging_quality
import merging_quality_report as report
import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file

from hf_modular.merging import METHODS

RESULTS = Path(merging_quality.__file__).parent / "results"
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
    return json.loads((folder / "results/merging_quality.json").read_text())["sections"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("merging-quality")
    return SimpleNamespace(folder=folder, sections=measure(folder))


@pytest.mark.parametrize("name", ["digits, full", "digits, LoRA"])
def test_everything_is_in_the_results(quick: SimpleNamespace, name: str) -> None:
    section = quick.sections[name]
    rows = {row["method"]: row for row in section["merges"]}
    assert list(rows) == [entry.name for entry in merging_quality.ENTRIES if entry.name in SHOWN]
    for row in rows.values():
        (run,) = row["runs"]
        assert run["default"].keys() == run["tuned"].keys() == section["base"].keys() == section["sha256"].keys()
        assert len(run["default"]) == 2
        assert len(run["tried"]) == (2 if row["space"] else 0)
        assert not run["tried"] or max(run["tried"]) == run["tried"][0] or run["settings"]
    (thinned,) = section["thinned"]
    assert {run["task"] for run in thinned["runs"]} == section["base"].keys()
    assert all(length > 0 for found in section["length"] for length in found.values())


def test_the_report_shows_all_of_it(quick: SimpleNamespace) -> None:
    text = (quick.folder / "results/merging_quality.md").read_text()
    assert all(f"| {name} | " in text for name in (*SHOWN, "DARE", "DAREx-q, validation"))
    assert all(text.count(f"{name}:\n") == 2 for name in quick.sections)
    assert imread(quick.folder / "results/merging_quality.png")[..., :3].std() > 0.05


def test_a_lora_changes_the_weights_of_linear_layers_alone(quick: SimpleNamespace) -> None:
    section = merging_quality.quick(merging_quality.Plan(quick.folder)).sections["digits, LoRA"]
    plan = merging_quality.quick(merging_quality.Plan(quick.folder))
    bench = merging_quality.Bench(plan, section, plan.suite("digits"))
    base, (first, second) = bench.models(bench.tasks, 0)
    assert set(base) == {n for n, t in bench.base.items() if n.startswith("layers.") and t.ndim == 2}
    adapter = load_file(bench.fine_tunes.adapter(bench.tasks[0], 0) / "adapter_model.safetensors")
    name = "layers.0.attention.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
    change = first[f"{name}.weight"] - base[f"{name}.weight"]
    torch.testing.assert_close(change, 8 / 16 * b @ a, atol=1e-6, rtol=1e-4)
    assert not torch.equal(first[f"{name}.weight"], second[f"{name}.weight"])


def test_what_is_finished_is_not_done_again(quick: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = quick.folder / "quick" / "merging_quality.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(lines[:-1]) + lines[-1][:40])  # interrupted while writing
    done = []
    carry_out = merging_quality.Job._carried_out
    monkeypatch.setattr(merging_quality.Job, "_carried_out", lambda job: done.append(job.entry.name) or carry_out(job))
    again = measure(quick.folder)
    assert done == ["SLERP"]
    for name, section in quick.sections.items():
        for before, after in zip(section["merges"], again[name]["merges"], strict=True):
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


def test_what_a_pull_does_is_read_row_by_row() -> None:
    def section(pull: float, own: float) -> dict[str, Any]:
        runs = [{"seed": 0, "task": "a", "DARE": own / 2}]
        merges = [
            {"method": name, "runs": [{"default": {"a": own / 4}, "tuned": {"a": own / 5}}]}
            for name in ("average", "TIES", "task arithmetic", "DARE, p=0.9")
        ]
        found = {"suite": "digits", "seeds": [0], "training": {"pull": pull}, "base": {"a": 0.1}, "merges": merges}
        return {**found, "individual": [{"a": own}], "length": [{"a": 0.5}], "thinned": [{"drop": 0.9, "runs": runs}]}

    found = report.pulled_table({"digits, AdamR 0": section(0, 0.8), "digits, AdamR 0.1": section(0.1, 0.6)})
    first, second = found.splitlines()[2:]
    assert first.startswith("| digits, AdamW | 0.500 | 80.0 ± 0.0 | 40.0 ± 0.0 | 20.0")
    assert second.startswith("| digits, AdamR 0.1 | 0.500 | 60.0 ± 0.0 | 30.0 ± 0.0 | 15.0")


def test_the_published_tables_are_those_of_the_raw_results() -> None:
    sections = json.loads((RESULTS / "merging_quality.json").read_text())["sections"]
    page = (RESULTS.parent / "RESULTS.md").read_text()
    assert set(sections) <= set(merging_quality.SECTIONS)
    for table in report.tables(sections).values():
        assert table in page
