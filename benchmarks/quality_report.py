"""What `quality.py` has measured, as JSON, a table and a chart."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from hf_modular.demo.chart import FAINT, GREY, INK, STYLE

COLOURS = {
    "HUT": "#c8324b",
    "SSF": "#f2a03d",
    "MoS": "#2a9d8f",
    "FLoRA": "#4361ee",
    "Compacter": "#9b5de5",
    "LoRA": INK,
    "full": GREY,
}
TITLES = {"digits": "Handwritten digits, a ViT of 0.3 M parameters", "text": "Docstrings, MiniLM (22.6 M parameters)"}


@dataclass(frozen=True)
class Result:
    """One row of the table: a case on every task, with every seed."""

    case: str
    method: str
    beside: str | None
    rate: float | None
    runs: Sequence[Mapping[str, Any]]

    @property
    def parameters(self) -> int:
        """Trained for one task, in the mean over tasks: heads differ in size."""
        return round(fmean(run["parameters"] for run in self.runs))

    @property
    def seconds(self) -> float:
        return fmean(run["seconds"] for run in self.runs)

    @cached_property
    def right(self) -> dict[str, dict[int, list[int]]]:
        """task -> seed -> for each test row, whether it is answered rightly."""
        found: dict[str, dict[int, list[int]]] = {}
        for run in self.runs:
            found.setdefault(run["task"], {})[run["seed"]] = [int(bit) for bit in run["test"]]
        return found

    @property
    def accuracy(self) -> dict[str, float]:
        return {task: fmean(map(fmean, seeds.values())) for task, seeds in self.right.items()}

    @property
    def per_seed(self) -> list[float]:
        """Mean over the tasks, for each seed."""
        seeds = next(iter(self.right.values()))
        return [fmean(fmean(by_seed[seed]) for by_seed in self.right.values()) for seed in seeds]

    @property
    def mean(self) -> float:
        return fmean(self.per_seed)

    @property
    def error(self) -> float:
        """Standard error of the mean, over seeds."""
        return _standard_error(self.per_seed)


def _standard_error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Difference:
    """Of one case to another on the same test rows with the same seeds, as mean accuracies."""

    mean: float
    over_seeds: float  # standard errors
    over_rows: float

    @property
    def error(self) -> float:
        """The larger one: three seeds may agree by chance, and test rows do not know of seeds."""
        return max(self.over_seeds, self.over_rows)

    @property
    def clear(self) -> bool:
        return abs(self.mean) > 2 * self.error


def difference(one: Result, other: Result) -> Difference:
    seeds = [a - b for a, b in zip(one.per_seed, other.per_seed, strict=True)]
    variances = []
    for task, by_seed in one.right.items():
        pairs = [zip(by_seed[seed], other.right[task][seed], strict=True) for seed in by_seed]
        rows = [fmean(gaps) for gaps in zip(*([a - b for a, b in pair] for pair in pairs), strict=True)]
        variances.append(_standard_error(rows) ** 2)
    return Difference(fmean(seeds), _standard_error(seeds), math.sqrt(sum(variances)) / len(variances))


def results_of(suite: Mapping[str, Any]) -> dict[str, Result]:
    names = ("case", "method", "beside", "rate", "runs")
    return {row["case"]: Result(**{name: row[name] for name in names}) for row in suite["rows"]}


def table(suite: Mapping[str, Any]) -> str:
    """Markdown; accuracies in percent."""
    results = results_of(suite)
    tasks = list(suite["tasks"])
    head = ["method", "trained", "rate", *tasks, "mean ± SE", "against LoRA", "CPU s"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for result in results.values():
        accuracies = [f"{100 * result.accuracy[task]:.1f}" for task in tasks]
        mean = f"{100 * result.mean:.1f}" + (f" ± {100 * result.error:.1f}" if len(result.per_seed) > 1 else "")
        rate = "" if result.rate is None else f"{result.rate:g}"
        against = _against(result, results)
        seconds = f"{result.seconds:.0f}" if result.seconds else ""
        lines.append([result.case, f"{result.parameters:,}", rate, *accuracies, mean, against, seconds])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _against(result: Result, results: Mapping[str, Result]) -> str:
    if result.beside is None:
        return ""
    gap = difference(result, results[result.beside])
    points = f"{100 * gap.mean:+.1f} ± {100 * gap.error:.1f}"
    rank = result.beside.removeprefix("LoRA ").removesuffix(" (default)")
    return f"**{points}** ({rank})" if gap.clear else f"{points} ({rank})"


def write(suites: Mapping[str, Mapping[str, Any]], output: Path, versions: Mapping[str, str]) -> str:
    """Write `quality.json` (which keeps the suites that were not run this time), the tables and the chart."""
    output.mkdir(parents=True, exist_ok=True)
    file = output / "quality.json"
    known = json.loads(file.read_text(encoding="utf-8"))["suites"] if file.is_file() else {}
    made = {name: {**suite, "versions": dict(versions)} for name, suite in suites.items()}
    results = {name: suite for name in TITLES if (suite := made.get(name) or known.get(name))}
    file.write_text(json.dumps({"suites": results}, indent=1) + "\n", encoding="utf-8")
    text = "\n\n".join(f"{TITLES[name]}:\n\n{table(suite)}" for name, suite in results.items())
    (output / "quality.md").write_text(text + "\n", encoding="utf-8")
    draw(results, output / "quality.png")
    return text


def draw(suites: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Accuracy against trained parameters, a panel for each suite; a grey band is the Pareto front."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.6 * len(suites), 5.4), dpi=120, facecolor="white", layout="constrained")
        (panels,) = figure.subplots(1, len(suites), squeeze=False)
        for axes, (name, suite) in zip(panels, suites.items(), strict=True):
            _draw_suite(axes, results_of(suite))
            axes.set_title(TITLES[name])
        figure.savefig(path)


def _draw_suite(axes: Axes, results: Mapping[str, Result]) -> None:
    frozen = [result for result in results.values() if result.rate is None]
    trained = [result for result in results.values() if result.rate is not None]
    for result in frozen:
        axes.axhline(result.mean, color=GREY, linewidth=1, linestyle=(0, (3, 3)), zorder=0)
        axes.text(
            1, result.mean, result.case, transform=axes.get_yaxis_transform(), ha="right", va="bottom", color=GREY
        )
    best = pareto(trained)
    axes.step([r.parameters for r in best], [r.mean for r in best], where="post", color=FAINT, linewidth=7, zorder=0)
    for method, colour in COLOURS.items():
        mine = sorted((r for r in trained if r.method == method), key=lambda r: r.parameters)
        if mine:
            points = ([r.parameters for r in mine], [r.mean for r in mine], [r.error for r in mine])
            axes.errorbar(*points, color=colour, marker="o", linewidth=1, capsize=3, label=method)
    axes.set_xscale("log")
    axes.margins(x=0.1, y=0.12)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="y")
    axes.set_xlabel("trained parameters per task")
    axes.set_ylabel("test accuracy, mean of the tasks")
    axes.legend(
        frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=7, handletextpad=0.2, columnspacing=1
    )


def pareto(results: Sequence[Result]) -> list[Result]:
    """Those that no other one with at most as many parameters is better than, by size."""
    front: list[Result] = []
    for result in sorted(results, key=lambda r: (r.parameters, -r.mean)):
        if not front or result.mean > front[-1].mean:
            front.append(result)
    return front
