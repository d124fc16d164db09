"""The benchmark of RMM's quality: what it trains and merges is what its rows say."""

import json
from pathlib import Path

import pytest
import rmm_quality

from hf_modular.merging import LinearConfig

RESULTS = Path(rmm_quality.__file__).parent / "results"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Adapters of two views, hardly trained."""
    folder = tmp_path_factory.mktemp("rmm-quality")
    plan = rmm_quality.Plan(folder, "digits", ("rotated", "negative"), (0,), 0.1, (0.5,), 1)
    suite = plan.load()
    suite.tasks.update({name: task.first(64, 50) for name, task in suite.tasks.items()})
    return rmm_quality.Bench(plan, suite, 0)


def test_at_full_directions_each_task_is_as_its_adapter(bench):
    found, facts = bench.reversible({"p": 1})
    assert found == bench.alone()
    assert facts["error"] < 1e-5
    assert facts["storage"] == pytest.approx((1 * (16 + 2) + 16) / (16 * 2))


def test_merging_one_adapter_alone_is_that_adapter(bench):
    one = rmm_quality.Bench(bench.plan, bench.suite, bench.seed)
    for kept in ("whole", "factors"):
        one.__dict__[kept] = getattr(bench, kept)[:1]
    wanted = bench.alone()["rotated"]
    assert one.on_deltas(LinearConfig(), "test")["rotated"] == wanted
    assert one.on_factors(LinearConfig(), "test")["rotated"] == wanted


def test_the_published_tables_are_those_of_the_raw_results():
    suites = json.loads((RESULTS / "rmm_quality.json").read_text())["suites"]
    shown, page = (RESULTS / "rmm_quality.md").read_text(), (RESULTS.parent / "RESULTS.md").read_text()
    assert set(suites) == set(rmm_quality.TRAININGS)
    for results in suites.values():
        assert rmm_quality.table(results) in shown
        assert rmm_quality.table(results) in page
