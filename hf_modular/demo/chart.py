"""The picture: what the tasks look like, how every method does on them, and what that costs."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from hf_modular.demo.digits import Part
from hf_modular.demo.report import Row

INK, GREY, FAINT = "#22223b", "#9a9bb0", "#e4e4ee"
TASK_COLOURS = ("#4361ee", "#e5397f", "#2a9d8f", "#f2a03d")
OURS = "#c8324b"
STYLE = {
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": GREY,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.major.size": 0,
}


def draw(rows: Sequence[Row], examples: Part, path: Path) -> None:
    """Write the chart as a PNG; `examples` are ten images."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(13, 8.6), dpi=120, facecolor="white")
        (upper,), (lower,) = figure.subfigures(2, 1, height_ratios=[1, 2.9], squeeze=False)
        colours = dict(zip(rows[0].accuracy, TASK_COLOURS, strict=False))
        _draw_tasks(upper, examples, colours)
        place = {"left": 0.145, "right": 0.97, "top": 0.9, "bottom": 0.1, "wspace": 0.18}
        left, right = lower.subplots(1, 2, gridspec_kw={"width_ratios": [1.35, 1], **place})
        _draw_accuracies(left, rows, colours)
        _draw_costs(right, rows)
        figure.savefig(path)


def _draw_tasks(figure: SubFigure, examples: Part, colours: dict[str, str]) -> None:
    """A small sheet of the same digits for every task."""
    figure.suptitle("The same handwritten digits, a task for each way to show them", x=0.03, ha="left", weight="bold")
    place = {"left": 0.03, "right": 0.97, "top": 0.84, "bottom": 0.04, "wspace": 0.08}
    sheets = {"as scanned": examples.images} | {task: examples.seen_as(task).images for task in colours}
    panels = figure.subplots(1, len(sheets), gridspec_kw=place)
    for panel, (title, images) in zip(panels, sheets.items(), strict=True):
        panel.imshow(_sheet(images).numpy(), cmap="gray_r", vmin=-1, vmax=1)
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
        panel.set_title(title, color=colours.get(title, INK), size=11)


def _sheet(images: Tensor) -> Tensor:  # (10, 1, 8, 8) -> (19, 49)
    """Two rows of five, with gaps that show nothing."""
    gap = (1, 1, 1, 1)
    framed = F.pad(images, gap, value=torch.nan)
    return framed.reshape(2, 5, 10, 10).transpose(1, 2).reshape(20, 50)[:-1, :-1]


def _draw_accuracies(axes: Axes, rows: Sequence[Row], colours: dict[str, str]) -> None:
    """A dot per task and the mean, for every method."""
    for y, row in enumerate(rows):
        values = row.accuracy
        axes.plot([min(values.values()), max(values.values())], [y, y], color=FAINT, linewidth=6, zorder=1)
        for task, value in values.items():
            axes.scatter(value, y, s=42, color=colours[task], zorder=2, label=task if y == 0 else None)
        axes.scatter(row.mean, y, s=260, marker="|", color=INK, linewidth=2.2, zorder=3, label=None if y else "mean")
        axes.text(1.0, y, f"{row.mean:.1%}", transform=axes.get_yaxis_transform(), ha="right", va="center")
    axes.axvline(rows[0].mean, color=GREY, linewidth=1, linestyle=(0, (3, 3)), zorder=0)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_color(_colour(row))
    axes.set_ylim(len(rows) - 0.5, -0.7)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.13 * (high - low))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="x")
    axes.set_title("Accuracy on test images, task by task", pad=28)
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=5, frameon=False, handletextpad=0.1, columnspacing=1
    )


def _draw_costs(axes: Axes, rows: Sequence[Row]) -> None:
    """Mean accuracy against what is trained for it."""
    trained = [row for row in rows if row.parameters]
    for row in trained:
        point, colour = (row.parameters, row.mean), _colour(row)
        axes.scatter(*point, s=70, color=colour, zorder=2)
        axes.annotate(row.name, point, (0, 9), textcoords="offset points", ha="center", color=colour)
    best = max((row for row in rows if row.one_model and row is not rows[0]), key=lambda row: row.val)
    for row in (rows[0], best):
        axes.axhline(row.mean, color=GREY, linewidth=1, linestyle=(0, (3, 3)), zorder=0)
        axes.text(1.0, row.mean, row.name, transform=axes.get_yaxis_transform(), ha="right", va="bottom", color=GREY)
    axes.set_xscale("log")
    axes.margins(x=0.13, y=0.12)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="y")
    axes.set_xlabel("trained parameters per task")
    axes.set_title("Mean accuracy against what is trained", pad=28)


def _colour(row: Row) -> str:
    return OURS if row.name.startswith(("HUT", "SSF")) else INK
