"""A search: merge, evaluate, learn from it, and again."""

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_modular.merging import MergeRecipe, merge
from hf_modular.searching._evolution import evolve
from hf_modular.searching._report import SearchReport
from hf_modular.searching._space import Space, Spaces
from hf_modular.searching._trials import TRIALS, Trial, Trials, best_of, costs_of

Evaluate = Callable[[Path], float]

_WEIGHTS: Spaces = {"weight": (0.0, 2.0)}
_MERGED = "merged"


def search(
    recipe: str | Path | Mapping[str, object] | MergeRecipe,
    evaluate: Evaluate,
    output_dir: str | Path,
    *,
    space: Spaces | None = None,
    budget: int = 50,
    seed: int = 0,
    maximize: bool = True,
    device: str = "cpu",
    workers: int | None = None,
    progress: bool = True,
) -> SearchReport:
    """Find the coefficients or settings with which a merge is best, by CMA-ES.

    The first trial is the recipe as it is (but for values that the space does not hold), so the result is not worse on
    what `evaluate` measures; measure on data that is not the test data. A search that was broken goes on from its last
    trial when it is called again with the same folder, and so does one that is given a larger budget.

    Args:
        recipe: A recipe file, or what it would hold.
        evaluate: Gives a number for the folder of a merged model, which is removed afterwards: a function of yours, a
            `Validation` on a data set, or a `Command`.
        output_dir: Gets `best_recipe.yaml`, `trials.jsonl`, the table `trials.md`, and, if matplotlib is there, the
            chart `trials.png`. While a model is evaluated it lies there too.
        space: What to vary: a setting, `models.0.density` for that of a model or `models.*.density` for those of all,
            each with a tuple of bounds or a list of choices. By default {"weight": (0, 2)}, which is each model's.
        budget: How many models are merged and evaluated.
        seed: Of the search. With the same one it goes the same way, if `evaluate` does.
        maximize: Whether greater numbers are better.
        device: Where models are merged.
        workers: How many threads merge.
        progress: Show a progress bar on a terminal.

    Returns:
        The best recipe and all trials.
    """
    if budget < 1:
        raise ValueError(f"`budget` must be at least 1, but got {budget=}")
    loaded = MergeRecipe.load(recipe)
    if loaded.state is not None:
        raise ValueError("a search merges the models many times: remove the key `state` from the recipe")
    varied = Space.of(loaded, _WEIGHTS if space is None else space)
    folder = Path(output_dir)
    run = {
        "recipe": loaded.model_dump(exclude_unset=True, mode="json"),
        "files": _glance(loaded),
        "space": varied.describe(),
        "seed": seed,
        "maximize": maximize,
    }
    trials = Trials.open(folder / TRIALS, run)
    options: dict[str, Any] = {"device": device, "workers": workers}
    _Search(varied, evaluate, folder, trials, budget, maximize, options).carry_out(seed, progress=progress)
    report = SearchReport(varied, trials.done[:budget], maximize)
    report.save(folder)
    return report


def _glance(recipe: MergeRecipe) -> list[list[Any]]:
    """Of the files of weights that are here, by which they are known again."""
    files = [file for name in recipe.references for file in sorted(Path(name).glob("*.safetensors"))]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


@dataclass
class _Search:
    """A search on its way."""

    space: Space
    evaluate: Evaluate
    folder: Path
    trials: Trials
    budget: int
    maximize: bool
    options: Mapping[str, Any]
    used: int = field(default=0, init=False)

    def carry_out(self, seed: int, *, progress: bool) -> None:
        from huggingface_hub.utils.tqdm import tqdm

        start = self.space.start()
        try:
            with tqdm(total=self.budget, desc="Search", unit="trial", disable=None if progress else True) as bar:
                self._costs([start], bar.update)
                evolve(start, lambda points: self._costs(points, bar.update), self.budget - 1, seed)
        finally:
            shutil.rmtree(self.folder / _MERGED, ignore_errors=True)

    def _costs(self, points: list[list[float]], tell: Callable[[int], object]) -> list[float]:
        found = []
        for point in points:
            found.append(self._trial(self.space.settings(point)))
            tell(1)
        if self.used > 1:
            best_of(self.trials.done, self.maximize)  # ends a search in which nothing can be merged
        return costs_of(found, self.maximize)

    def _trial(self, settings: Mapping[str, Any]) -> Trial:
        number, self.used = self.used, self.used + 1
        known = self.trials.known(number, settings)
        if known is None:
            trial = self._carried_out(number, settings)
        else:
            trial = Trial(number, settings, known.score, refused=known.refused)
        self.trials.add(trial)
        return trial

    def _carried_out(self, number: int, settings: Mapping[str, Any]) -> Trial:
        merged = self.folder / _MERGED
        started = time.perf_counter()
        try:
            recipe = self.space.with_settings(settings)
            merge(recipe, merged, progress=False, overwrite=True, hashes=False, **self.options)
        except ValueError as error:
            return Trial(number, settings, None, refused=str(error))
        score = float(self.evaluate(merged))
        if not math.isfinite(score):
            raise ValueError(f"an evaluation must give a finite number, but gave {score} for {json.dumps(settings)}")
        return Trial(number, settings, score, round(time.perf_counter() - started, 3))
