"""The results as one table, with what it says and does not say below it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from hf_modular.demo.training import share

# Pairs with the same number of trained parameters: ours, and what it has to stand beside.
MATCHED = (("SSF", "LoRA r=1"), ("HUT r=8", "LoRA r=9"))


@dataclass(frozen=True)
class Row:
    """One line of the table: a method on every task."""

    name: str
    parameters: int  # trained, per task
    correct: Sequence[Mapping[str, Tensor]]  # per seed: task -> (test images,), bool
    seconds: float
    val: float
    settings: Mapping[str, Any]
    one_model: bool = False  # for all tasks

    @property
    def accuracy(self) -> dict[str, float]:
        return {task: fmean(share(run[task]) for run in self.correct) for task in self.correct[0]}

    @property
    def first_accuracy(self) -> dict[str, float]:
        """That of the first seed, whose model is kept."""
        return {task: share(right) for task, right in self.correct[0].items()}

    @cached_property
    def mean(self) -> float:
        return fmean(self.means)

    @property
    def means(self) -> list[float]:
        """The mean over the tasks, for each seed."""
        return [fmean(map(share, run.values())) for run in self.correct]

    @property
    def spread(self) -> float | None:
        """Standard deviation of the mean over the seeds."""
        return stdev(self.means) if len(self.means) > 1 else None

    @property
    def per_image(self) -> Tensor:  # (test images,)
        """How often each image is right, over tasks and seeds."""
        return torch.stack([right.float() for run in self.correct for right in run.values()]).mean(0)

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.name,
            "trainable_parameters": self.parameters,
            "one_model_for_all_tasks": self.one_model,
            "accuracy": self.accuracy,
            "mean_accuracy": self.mean,
            "mean_accuracy_per_seed": self.means,
            "validation_accuracy": self.val,
            "cpu_seconds": self.seconds,
            "settings": dict(self.settings),
        }


def difference(row: Row, other: Row) -> tuple[float, float]:
    """By how much `row` is better, and half of the 95 % interval over test images."""
    paired = row.per_image - other.per_image
    return float(paired.mean()), 1.96 * float(paired.std()) / math.sqrt(len(paired))


def table(rows: Sequence[Row]) -> str:
    """One line per method; accuracies in percent."""
    tasks = list(rows[0].accuracy)
    lines = [["method", "trainable", *tasks, "mean", "CPU s"], *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def _cells(row: Row) -> list[str]:
    spread = "" if row.spread is None else f" ± {100 * row.spread:.1f}"
    accuracies = [f"{100 * value:.1f}" for value in row.accuracy.values()]
    return [row.name, f"{row.parameters:,}", *accuracies, f"{100 * row.mean:.1f}{spread}", f"{row.seconds:.1f}"]


def notes(rows: Sequence[Row]) -> list[str]:
    """What can be said of the table, each with its uncertainty."""
    by_name = {row.name: row for row in rows}
    return [
        *(_verdict(by_name[ours], by_name[theirs]) for ours, theirs in MATCHED),
        *_on_merges(rows, by_name["base"], by_name["full fine-tuning"]),
        "Trained: one run per task and method, with one model each; merged: one model for all tasks. The ± after a "
        "mean is the standard deviation over mask seeds, every other one a 95 % interval over the test images.",
        "These are models of 0.3 M parameters on 8 x 8 images: the order of the methods may differ elsewhere.",
    ]


def _verdict(ours: Row, theirs: Row) -> str:
    gap, margin = difference(ours, theirs)
    if abs(gap) <= margin:
        relation = f"{ours.name} and {theirs.name} cannot be told apart"
    else:
        relation = f"{ours.name} is {'better' if gap > 0 else 'worse'} than {theirs.name}"
    return f"{relation} at {ours.parameters:,} trained parameters each: {_points(gap, margin)}."


def _on_merges(rows: Sequence[Row], base: Row, own: Row) -> Iterator[str]:
    for row in rows:
        if row.one_model and row is not base:
            scale = f" (scale {row.settings['scale']}, chosen on validation images)" if "scale" in row.settings else ""
            gain, loss = (_points(*difference(row, other)) for other in (base, own))
            yield f"{row.name}{scale}: {gain} against the base, {loss} against one fine-tuned model per task."


def _points(gap: float, margin: float) -> str:
    return f"{100 * gap:+.1f} ± {100 * margin:.1f} points"
