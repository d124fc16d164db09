"""What a search has found: the best recipe, a table and a chart of the trials."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_modular.merging import MergeRecipe
from hf_modular.searching._space import Space
from hf_modular.searching._trials import Trial, best_of

RECIPE = "best_recipe.yaml"


@dataclass(frozen=True)
class SearchReport:
    """The trials of a search in their order; the first is the recipe as it was."""

    space: Space
    trials: Sequence[Trial]
    maximize: bool

    @property
    def best(self) -> Trial:
        return best_of(self.trials, self.maximize)

    @property
    def recipe(self) -> MergeRecipe:
        """The best one."""
        return self.space.with_settings(self.best.settings)

    def summary(self) -> str:
        best, first = self.best, self.trials[0]
        was = "could not be merged" if first.score is None else f"had {first.score:.6g}"
        return (
            f"Trial {best.number} of {len(self.trials)} is the best with {best.score:.6g}; the recipe as it was {was}"
        )

    def table(self) -> str:
        """All trials in Markdown, the best in bold."""
        names = [dimension.name for dimension in self.space.dimensions]
        best = self.best.number
        head = [_row(["trial", "score", *names, "seconds"]), _row(["---"] * (len(names) + 3))]
        return "\n".join([*head, *(_row(_cells(trial, names, trial.number == best)) for trial in self.trials)]) + "\n"

    def chart(self, file: str | Path) -> None:
        """Draw the scores and what was varied, trial by trial."""
        from hf_modular.searching._chart import draw

        draw(self, Path(file))

    def save(self, folder: Path) -> None:
        (folder / RECIPE).write_text(self.recipe.to_yaml(), "utf-8")
        (folder / "trials.md").write_text(self.table(), "utf-8")
        if importlib.util.find_spec("matplotlib"):
            self.chart(folder / "trials.png")


def _cells(trial: Trial, names: Sequence[str], best: bool) -> list[str]:
    score = "refused" if trial.score is None else f"{trial.score:.6g}"
    values = [_written(trial.settings[name]) for name in names]
    return [f"**{trial.number}**" if best else str(trial.number), score, *values, f"{trial.seconds:.1f}"]


def _written(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
