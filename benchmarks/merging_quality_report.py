"""What `merging_quality.py` has measured, as JSON, tables and a chart."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from hf_modular.demo.chart import FAINT, GREY, INK, STYLE

TUNED = "#c8324b"
NAME = "merging_quality"


def write(results: Mapping[str, Any], folder: Path) -> str:
    """All three files; returns the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    text = f"{merged_table(results)}\n{thinned_table(results)}"
    (folder / f"{NAME}.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    (folder / f"{NAME}.md").write_text(text, "utf-8")
    draw(results, folder / f"{NAME}.png")
    return text


def normalised(results: Mapping[str, Any], row: Mapping[str, Any], how: str) -> list[float]:
    """For each seed: accuracy divided by that of the task's own model, in the mean over tasks."""
    pairs = zip(row["runs"], results["individual"], strict=True)
    return [fmean(accuracy / own[task] for task, accuracy in run[how].items()) for run, own in pairs]


def worst(row: Mapping[str, Any], how: str) -> float:
    """The accuracy on the task that comes off worst, in the mean over seeds."""
    return fmean(min(run[how].values()) for run in row["runs"])


def counts_of(results: Mapping[str, Any]) -> list[int]:
    return sorted({row["tasks"] for row in results["merges"]})


def merged_table(results: Mapping[str, Any]) -> str:
    """Markdown; in percent, mean over seeds and their standard deviation; the worst task in brackets."""
    counts = counts_of(results)
    head = ["method", *(f"{n} tasks, {how}" for n in counts for how in ("default", "tuned")), "CPU s"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    base = results["base"]
    for name in dict.fromkeys(row["method"] for row in results["merges"]):
        rows = {row["tasks"]: row for row in results["merges"] if row["method"] == name}
        cells = [_cell(results, rows.get(n), how) for n in counts for how in ("default", "tuned")]
        seconds = fmean(run["seconds"] for run in rows[max(rows)]["runs"])
        lines.append([name, *cells, f"{seconds:.2f}"])
    tasks = {n: list(next(r for r in results["merges"] if r["tasks"] == n)["runs"][0]["default"]) for n in counts}
    plain = [f"{_base_share(results, tasks[n]):.1%} ({min(base[t] for t in tasks[n]):.1%})" for n in counts]
    lines.insert(2, ["the base, not fine-tuned", *(cell for text in plain for cell in (text, "")), ""])
    return _markdown(lines)


def _base_share(results: Mapping[str, Any], tasks: Sequence[str]) -> float:
    return fmean(results["base"][task] / own[task] for own in results["individual"] for task in tasks)


def _cell(results: Mapping[str, Any], row: Mapping[str, Any] | None, how: str) -> str:
    if row is None or (how == "tuned" and not row["space"]):
        return ""
    values = normalised(results, row, how)
    return f"{fmean(values):.1%} ± {_deviation(values):.1%} ({worst(row, how):.1%})"


def _deviation(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def thinned_table(results: Mapping[str, Any]) -> str:
    """Markdown: what is left of a single model's accuracy when most of its task vector is dropped."""
    drops = [row["drop"] for row in results["thinned"]]
    kinds = [key for key in results["thinned"][0]["runs"][0] if key not in ("q", "task", "seed")]
    lines = [["thinned, a single model", *(f"p = {drop}" for drop in drops)], ["---", *["---:"] * len(drops)]]
    for kind in kinds:
        lines.append([kind, *(_thinned_cell(results, row, kind) for row in results["thinned"])])
    return _markdown(lines)


def _thinned_cell(results: Mapping[str, Any], row: Mapping[str, Any], kind: str) -> str:
    seeds = results["seeds"]
    own = dict(zip(seeds, results["individual"], strict=True))
    shares = {seed: [] for seed in seeds}
    for run in row["runs"]:
        shares[run["seed"]].append(run[kind] / own[run["seed"]][run["task"]])
    means = [fmean(found) for found in shares.values()]
    return f"{fmean(means):.1%} ± {_deviation(means):.1%}"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def draw(results: Mapping[str, Any], file: Path) -> None:
    """A panel for each number of tasks: every method at its default and tuned."""
    counts = counts_of(results)
    names = list(dict.fromkeys(row["method"] for row in results["merges"]))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(counts) + 1.6, 0.36 * len(names) + 1.9), dpi=120, layout="constrained")
        panels = figure.subplots(1, len(counts), sharey=True, squeeze=False)[0]
        for axes, count in zip(panels, counts, strict=True):
            _draw_panel(axes, results, names, count)
        panels[0].set_yticks(range(len(names)), names)
        panels[0].set_ylim(len(names) - 0.5, -0.7)
        panels[0].legend(loc="upper left", bbox_to_anchor=(0, 1.13), ncols=3, frameon=False, handletextpad=0.2)
        figure.savefig(file)


def _draw_panel(axes: Axes, results: Mapping[str, Any], names: Sequence[str], count: int) -> None:
    rows = {row["method"]: row for row in results["merges"] if row["tasks"] == count}
    for how, colour in (("default", GREY), ("tuned", TUNED)):
        shown = {name: normalised(results, rows[name], how) for name in names if name in rows}
        for name, values in shown.items():
            axes.plot([min(values), max(values)], [names.index(name)] * 2, color=colour, linewidth=2, alpha=0.4)
        means = [fmean(values) for values in shown.values()]
        axes.scatter(means, [names.index(name) for name in shown], s=34, color=colour, label=how, zorder=3)
    tasks = list(rows[names[0]]["runs"][0]["default"])
    axes.axvline(_base_share(results, tasks), color=INK, linewidth=1, linestyle=(0, (3, 3)), label="the base")
    axes.axvline(1.0, color=FAINT, linewidth=1)
    axes.set_title(f"{count} tasks", pad=24)
    axes.set_xlabel("accuracy, own models = 100 %")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="x")
