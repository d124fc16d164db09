"""The benchmark of quality: its quick form from end to end, and the statistics of its report."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import quality
import quality_report
from matplotlib.image import imread

RESULTS = Path(quality.__file__).parent / "results"


def measure(folder: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["--suite", "digits", "--quick", "--cache", str(folder), "--output", str(folder / "results")]
        patch.setattr(sys, "argv", ["quality.py", *arguments])
        quality.main()
    return json.loads((folder / "results/quality.json").read_text())["suites"]["digits"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("quality")
    return SimpleNamespace(folder=folder, suite=measure(folder))


def test_every_case_is_in_the_results(quick: SimpleNamespace) -> None:
    rows = {row["case"]: row for row in quick.suite["rows"]}
    assert list(rows) == ["base", "linear probe", *(case.name for case in quality.cases_of("digits"))]
    for row in rows.values():
        assert [run["task"] for run in row["runs"]] == ["rotated", "negative"]
        assert all(len(run["test"]) == 64 for run in row["runs"])
    text = (quick.folder / "results/quality.md").read_text()
    assert all(f"| {name} | " in text for name in rows)


def test_methods_are_as_large_as_what_they_stand_beside(quick: SimpleNamespace) -> None:
    sizes = {name: result.parameters for name, result in quality_report.results_of(quick.suite).items()}
    for case in quality.cases_of("digits"):
        if case.beside and case.name != "Compacter (default)":
            assert sizes[case.name] == pytest.approx(sizes[case.beside], rel=0.04)
    assert sizes["Compacter (default)"] < sizes["LoRA r=1"]


def test_the_chart_shows_something(quick: SimpleNamespace) -> None:
    assert imread(quick.folder / "results/quality.png")[..., :3].std() > 0.05


def test_what_is_finished_is_not_trained_again(quick: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = quick.folder / "digits.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(lines[:-1]) + lines[-1][:40])  # interrupted while writing
    trained = []
    carry_out = quality.carry_out
    monkeypatch.setattr(quality, "carry_out", lambda job: trained.append(job.case) or carry_out(job))
    assert [without_seconds(row) for row in measure(quick.folder)["rows"]] == [
        without_seconds(row) for row in quick.suite["rows"]
    ]
    assert trained == [quality.CASES[-1].name]


def without_seconds(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "runs": [{name: run[name] for name in run if name != "seconds"} for run in row["runs"]]}


@pytest.mark.parametrize(
    ("peak", "start", "tries"),
    [
        (1e-2, 1e-2, [1e-2, 3e-2, 3e-3]),  # a peak, once both sides are known
        (1e-1, 1e-2, [1e-2, 3e-2, 1e-1, 3e-1]),  # upwards
        (1e-3, 1e-2, [1e-2, 3e-2, 3e-3, 1e-3, 3e-4]),  # downwards
        (1.0, 1.0, [1.0, 3e-1]),  # at the end of the ladder
    ],
)
def test_rates_are_sought_towards_what_is_better(peak: float, start: float, tries: list[float]) -> None:
    tried: dict[float, float] = {}
    while (rate := quality.next_rate(tried, start)) is not None:
        tried[rate] = -abs(math.log(rate / peak))
    assert list(tried) == tries


def result(name: str, *seeds: str) -> quality_report.Result:
    runs = [
        {"task": task, "seed": seed, "parameters": 7, "seconds": 1.0, "test": bits}
        for seed, both in enumerate(seeds)
        for task, bits in zip("ab", both.split(), strict=True)
    ]
    return quality_report.Result(name, name, None, 0.1, runs)


def test_the_error_of_a_difference_is_that_of_seeds_or_of_rows() -> None:
    one, other = result("one", "1110 11", "1100 10"), result("other", "1000 11", "1000 00")
    found = quality_report.difference(one, other)
    assert one.accuracy == {"a": 0.625, "b": 0.75}
    assert one.per_seed == [0.875, 0.5]
    gaps = [0.25, 0.375]  # of a seed: (2/4 + 0) / 2, (1/4 + 1/2) / 2
    assert found.mean == pytest.approx(sum(gaps) / 2)
    assert found.over_seeds == pytest.approx((gaps[1] - gaps[0]) / 2)
    # of rows, over seeds: a: 0, 1, 0.5, 0 with variance 0.2292; b: 0.5, 0 with variance 0.125
    assert found.over_rows == pytest.approx(math.sqrt((0.6875 / 3) / 4 + 0.125 / 2) / 2)
    assert found.error == found.over_rows
    assert not found.clear


def test_the_front_holds_what_nothing_smaller_beats() -> None:
    def of(name: str, parameters: int, bits: str) -> quality_report.Result:
        made = result(name, f"{bits} {bits}")
        return quality_report.Result(name, name, None, 0.1, [{**run, "parameters": parameters} for run in made.runs])

    several = [of("large", 9, "1110"), of("small", 2, "1100"), of("worse", 5, "1000"), of("equal", 2, "1000")]
    assert [r.case for r in quality_report.pareto(several)] == ["small", "large"]


def test_the_published_tables_are_those_of_the_raw_results() -> None:
    suites = json.loads((RESULTS / "quality.json").read_text())["suites"]
    page = (RESULTS.parent / "RESULTS.md").read_text()
    assert set(suites) == set(quality.SUITES)
    for suite in suites.values():
        assert quality_report.table(suite) in page
