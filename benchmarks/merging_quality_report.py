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
PULLED = "AdamR"  # in the names of sections that are rows of one table


def write(made: Mapping[str, Any], folder: Path) -> str:
    """All three files, with the sections of the JSON file that were not made this time; returns the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{NAME}.json"
    known = json.loads(file.read_text("utf-8"))["sections"] if file.is_file() else {}
    sections = dict(sorted({**known, **made}.items()))
    text = "\n".join(f"{title}:\n\n{table}" for title, table in tables(sections).items())
    file.write_text(json.dumps({"sections": sections}, indent=1) + "\n", "utf-8")
    (folder / f"{NAME}.md").write_text(text, "utf-8")
    draw({name: section for name, section in sections.items() if PULLED not in name}, folder / f"{NAME}.png")
    return text


def tables(sections: Mapping[str, Any]) -> dict[str, str]:
    """Title -> Markdown."""
    whole = {name: section for name, section in sections.items() if PULLED not in name}
    merged = {f"Merged: {name}": merged_table(section) for name, section in whole.items()}
    thinned = {f"Thinned: {name}": thinned_table(section) for name, section in whole.items()}
    pulled = {name: section for name, section in sections.items() if PULLED in name}
    return merged | thinned | ({"With AdamR": pulled_table(pulled)} if pulled else {})


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
    columns = [
        (count, how)
        for count in counts_of(results)
        for how in ("default", "tuned")
        if how == "default" or any(row["space"] for row in results["merges"] if row["tasks"] == count)
    ]
    head = ["method", *(f"{count} tasks, {how}" for count, how in columns), "CPU s"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], _base_line(results, columns)]
    for name in dict.fromkeys(row["method"] for row in results["merges"]):
        rows = {row["tasks"]: row for row in results["merges"] if row["method"] == name}
        cells = [_cell(results, rows.get(count), how) for count, how in columns]
        seconds = fmean(run["seconds"] for run in rows[max(rows)]["runs"])
        lines.append([name, *cells, f"{seconds:.2f}"])
    return _markdown(lines)


def _base_line(results: Mapping[str, Any], columns: Sequence[tuple[int, str]]) -> list[str]:
    base, cells = results["base"], []
    for count, how in columns:
        tasks = list(next(row for row in results["merges"] if row["tasks"] == count)["runs"][0]["default"])
        text = f"{_base_share(results, tasks):.1%} ({min(base[task] for task in tasks):.1%})"
        cells.append(text if how == "default" else "")
    return ["the base, not fine-tuned", *cells, ""]


def _base_share(results: Mapping[str, Any], tasks: Sequence[str]) -> float:
    return fmean(results["base"][task] / own[task] for own in results["individual"] for task in tasks)


def _cell(results: Mapping[str, Any], row: Mapping[str, Any] | None, how: str) -> str:
    if row is None or (how == "tuned" and not row["space"]):
        return ""
    values = normalised(results, row, how)
    return f"{fmean(values):.1%} ± {_deviation(values):.1%} ({worst(row, how):.1%})"


def _deviation(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


KINDS = (
    "DARE",
    "DARE, norm",
    "DAREx-q, closed form",
    "DAREx-q, closed form on data",
    "DAREx-q, least change",
    "DAREx-q, validation",
    "columns",
    "largest",
    "largest, norm",
)


def thinned_table(results: Mapping[str, Any]) -> str:
    """Markdown: what is left of a single model's accuracy when most of its task vector is dropped."""
    drops = [row["drop"] for row in results["thinned"]]
    lines = [["thinned, a single model", *(f"p = {drop}" for drop in drops)], ["---", *["---:"] * len(drops)]]
    for kind in (kind for kind in KINDS if kind in results["thinned"][0]["runs"][0]):
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


def pulled_table(sections: Mapping[str, Any]) -> str:
    """Markdown: accuracies in percent, the mean over tasks and seeds, by how strongly AdamR pulls to the base."""
    merges = {"average": "default", "TIES": "default", "task arithmetic": "tuned", "DARE, p=0.9": "tuned"}
    first = next(iter(sections.values()))
    drops = [row["drop"] for row in first["thinned"]]
    head = ["fine-tunes", "length", "own", *(f"DARE {drop}" for drop in drops)]
    head += [f"merged: {name}" + (", tuned" if how == "tuned" else "") for name, how in merges.items()]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, section in sections.items():
        tasks = list(section["base"])
        own = [fmean(found[task] for task in tasks) for found in section["individual"]]
        length = fmean(fmean(found.values()) for found in section["length"])
        thin = [[fmean(values) for values in _by_seed(section, row, "DARE")] for row in section["thinned"]]
        rows = {row["method"]: row for row in section["merges"]}
        merged = [[fmean(run[how].values()) for run in rows[m]["runs"]] for m, how in merges.items()]
        shown = name if section["training"]["pull"] else f"{section['suite']}, AdamW"
        lines.append([shown, f"{length:.3f}", *(_percent(values) for values in (own, *thin, *merged))])
    return _markdown(lines)


def _by_seed(section: Mapping[str, Any], row: Mapping[str, Any], kind: str) -> list[list[float]]:
    return [[run[kind] for run in row["runs"] if run["seed"] == seed] for seed in section["seeds"]]


def _percent(values: Sequence[float]) -> str:
    return f"{100 * fmean(values):.1f} ± {100 * _deviation(values):.1f}"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def draw(sections: Mapping[str, Any], file: Path) -> None:
    """A row of panels for each section, a panel for each number of tasks: every method at its default and tuned."""
    widest = max(len(counts_of(section)) for section in sections.values())
    names = list(dict.fromkeys(row["method"] for section in sections.values() for row in section["merges"]))
    with mpl.rc_context(STYLE):
        size = (4.2 * widest + 1.6, (0.3 * len(names) + 1.9) * len(sections))
        figure = Figure(figsize=size, dpi=100, layout="constrained")
        panels = figure.subplots(len(sections), widest, sharey=True, squeeze=False)
        for row, (title, section) in zip(panels, sections.items(), strict=True):
            for axes in row[len(counts_of(section)) :]:
                axes.set_visible(False)
            for axes, count in zip(row, counts_of(section), strict=False):
                _draw_panel(axes, section, names, count)
                axes.set_title(f"{title}: {count} tasks", pad=24)
        panels[0][0].set_yticks(range(len(names)), names)
        panels[0][0].set_ylim(len(names) - 0.5, -0.7)
        panels[0][0].legend(loc="upper left", bbox_to_anchor=(0, 1.13), ncols=3, frameon=False, handletextpad=0.2)
        figure.savefig(file)


def _draw_panel(axes: Axes, results: Mapping[str, Any], names: Sequence[str], count: int) -> None:
    rows = {row["method"]: row for row in results["merges"] if row["tasks"] == count}
    for how, colour in (("default", GREY), ("tuned", TUNED)):
        shown = {name: normalised(results, row, how) for name, row in rows.items() if how == "default" or row["space"]}
        for name, values in shown.items():
            axes.plot([min(values), max(values)], [names.index(name)] * 2, color=colour, linewidth=2, alpha=0.4)
        means = [fmean(values) for values in shown.values()]
        axes.scatter(means, [names.index(name) for name in shown], s=34, color=colour, label=how, zorder=3)
    tasks = list(next(iter(rows.values()))["runs"][0]["default"])
    axes.axvline(_base_share(results, tasks), color=INK, linewidth=1, linestyle=(0, (3, 3)), label="the base")
    axes.axvline(1.0, color=FAINT, linewidth=1)
    axes.set_xlabel("accuracy, own models = 100 %")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="x")
