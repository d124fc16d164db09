"""The benchmark of adapters: every case can be made, and the figures are what the table says."""

import importlib.util
from pathlib import Path

import adapters_report
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "adapters.py"
spec = importlib.util.spec_from_file_location("adapter_speed", SCRIPT)  # `adapters` is a folder of tests too
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


@pytest.mark.parametrize("case", sorted({c for cases in bench.CASES.values() for c in cases} - {"full"}))
def test_every_case_has_a_config(case: str):
    assert bench.make_config(case, ["q_proj"]).target_modules == {"q_proj"}


def test_ratios_are_taken_within_a_round_and_then_their_median():
    lora = [{"step": s, "saved": 10, "peak": 4, "trainable": 1, "alone": 1.5} for s in (1.0, 2.0, 4.0)]
    ours = [{**base, "step": base["step"] * r, "trainable": 7} for base, r in zip(lora, (1.5, 0.5, 0.9), strict=True)]
    row = bench.summary("llama", "ssf", ours, lora)
    assert (row["step"], row["step_range"], row["saved"], row["trainable"]) == (0.9, [0.5, 1.5], 1.0, 7)
    assert row["alone"] == 1.5, "a ratio already, to the model without an adapter"
    assert "merged" not in row
    assert (
        adapters_report.table([row], bench.COLUMNS).splitlines()[-1]
        == "| llama | ssf | 7 | 0.90 | 1.00 | 1.00 | 1.50 | - |"
    )


def test_a_round_that_failed_is_left_out():
    figures = {"step": 2.0, "saved": 1, "peak": 1, "trainable": 1}
    assert bench.summary("bert", "oft", [None, figures], [figures, {**figures, "step": 4.0}])["step"] == 0.5
    assert bench.summary("bert", "oft", [None, figures], [figures, None]) is None
