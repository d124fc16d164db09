"""The picture of a search: the scores of the trials with the best so far, and each number that was varied."""

from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from hf_modular.searching._report import SearchReport

INK, GREY, BEST = "#22223b", "#9a9bb0", "#c8324b"
STYLE = {"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
_SHOWN = 12  # what was varied beyond that is in the table only


def draw(report: "SearchReport", file: Path) -> None:
    """Write the chart as a PNG."""
    shown = [dimension for dimension in report.space.dimensions if not dimension.choices][:_SHOWN]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 2.6 + 1.1 * len(shown)), dpi=120, facecolor="white", layout="constrained")
        top, *rest = figure.subplots(
            1 + len(shown), 1, sharex=True, squeeze=False, height_ratios=[2] + [1] * len(shown)
        )[:, 0]
        _draw_scores(top, report)
        for axes, dimension in zip(rest, shown, strict=True):
            _draw_values(axes, report, dimension.name)
        (rest or [top])[-1].set_xlabel("trial")
        figure.savefig(file)


def _draw_scores(axes: Any, report: "SearchReport") -> None:
    scored = [trial for trial in report.trials if trial.score is not None]
    numbers, scores = [trial.number for trial in scored], [trial.score or 0.0 for trial in scored]
    axes.scatter(numbers, scores, s=14, color=GREY)
    axes.step(numbers, [*accumulate(scores, max if report.maximize else min)], where="post", color=INK)
    axes.scatter(report.best.number, report.best.score, s=46, color=BEST, zorder=3)
    axes.set_title("Score of each trial, and the best so far")


def _draw_values(axes: Any, report: "SearchReport", name: str) -> None:
    axes.scatter([t.number for t in report.trials], [t.settings[name] for t in report.trials], s=10, color=GREY)
    axes.scatter(report.best.number, report.best.settings[name], s=36, color=BEST, zorder=3)
    axes.set_title(name, fontsize=9.5)
