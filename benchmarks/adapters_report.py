"""What `adapters.py` has measured, as JSON, a table and a chart."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

OURS, OTHERS, LINE = "#d1495b", "#8d99ae", "#2b2d42"


def write(results: dict[str, Any], columns: Sequence[str], ours: Collection[str], folder: Path) -> str:
    """Write `adapters.json`, `adapters.md` and `adapters.png`, and give the tables."""
    folder.mkdir(exist_ok=True, parents=True)
    rows, phm = results["rows"], results["phm"]
    tables = [table(rows, columns), *([phm_table(phm)] if phm else [])]
    (folder / "adapters.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / "adapters.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    if rows:
        chart(rows, ours, folder / "adapters.png")
    return "\n\n".join(tables)


def table(rows: list[dict[str, Any]], columns: Sequence[str]) -> str:
    return markdown(["model", "method", "trainable", *columns], [cells(row, columns) for row in rows])


def cells(row: dict[str, Any], columns: Sequence[str]) -> list[str]:
    ratios = [f"{row[key]:.2f}" if key in row else "-" for key in columns]
    return [row["model"], row["method"], f"{row['trainable']:,}", *ratios]


def phm_table(phm: dict[str, dict[str, float]]) -> str:
    head = ["PHM 768 to 24, 12,800 tokens, ms", *next(iter(phm.values()))]
    return markdown(head, [[way, *map(str, times.values())] for way, times in phm.items()])


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def chart(rows: list[dict[str, Any]], ours: Collection[str], path: Path) -> None:
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(4 * len(models), 4.5), layout="constrained")
    axes = figure.subplots(1, len(models), squeeze=False)[0]
    for axis, model in zip(axes, models, strict=True):
        drawn = sorted((row for row in rows if row["model"] == model), key=lambda row: row["step"])
        colours = [OURS if row["method"] in ours else OTHERS for row in drawn]
        axis.barh([row["method"] for row in drawn], [row["step"] for row in drawn], color=colours)
        axis.axvline(1.0, color=LINE, linewidth=1)
        axis.set(title=model, xlabel="training step, LoRA is 1 (red: hf_modular)")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=80)
