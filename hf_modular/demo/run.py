"""The whole demo, from the scans to the chart."""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoModelForImageClassification

from hf_modular.demo.chart import draw
from hf_modular.demo.digits import TASKS, Part, load, one_of_each
from hf_modular.demo.merging import PLANS, Bench
from hf_modular.demo.report import Row, notes, table
from hf_modular.demo.training import (
    BASE_EPOCHS,
    EPOCHS,
    METHODS,
    Job,
    Method,
    Outcome,
    calm,
    fine_tune,
    is_correct,
    ready,
    share,
    train_base,
)
from hf_modular.demo.writing import write_adapter_cards, write_merged_card, write_results

CHART, RESULTS = "chart.png", "results.json"
OWN = {"adapters", "models", "merged", CHART, RESULTS}


@dataclass(frozen=True)
class Scale:
    """How much is done."""

    tasks: tuple[str, ...] = TASKS
    base_epochs: int = BASE_EPOCHS
    epochs: float = EPOCHS
    masks: int = 5  # seeds of a random merge
    workers: int = 2


QUICK = Scale(tasks=("rotated", "negative"), base_epochs=6, epochs=0.25, masks=2, workers=1)


def run(
    output: str | Path, *, seed: int = 0, quick: bool = False, say: Callable[[str], None] = lambda text: None
) -> str:
    """Train, merge, compare and write it all to a folder.

    Args:
        output: A new or empty folder, or that of an earlier run, which is replaced.
        seed: Of training, and the first one of random merges. The data are split the same way for every seed.
        quick: A few steps on two tasks, to see that everything works; the figures mean nothing.
        say: Is told what is going on.

    Returns:
        The table, and below it what it says.
    """
    demo = Demo(make_room(Path(output)), QUICK if quick else Scale(), seed, say)
    rows = demo.rows()
    draw(rows, one_of_each(load()["test"]), demo.folder / CHART)
    by_name = {row.name: row for row in rows}
    for method in METHODS:
        write_adapter_cards(demo.jobs(method), by_name[method.name])
    for plan in PLANS:
        write_merged_card(demo.folder / "merged" / plan.folder, by_name[plan.name])
    write_results(demo.folder / RESULTS, rows, {"seed": seed, **asdict(demo.scale)})
    return "\n".join([table(rows), "", *(f"- {note}" for note in notes(rows))])


def make_room(folder: Path) -> Path:
    """Remove what an earlier run wrote; refuse to write among anything else."""
    found = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if found and not {RESULTS} <= found <= OWN:
        raise ValueError(
            f"the output must be a new or empty folder, or that of an earlier demo, but {folder} holds {sorted(found)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS).write_text("{}\n")  # a run that is broken off leaves a folder that the next one may replace
    for name in found - {RESULTS}:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


@contextmanager
def worker_map(workers: int, start: Callable[[], object] = ready) -> Iterator[Callable[..., Iterator[Any]]]:
    """`map` over processes, which begin with `start` while the caller goes on; over this process if it is one."""
    if workers == 1:
        yield map
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for _ in range(workers):
            pool.submit(start)
        yield pool.map


@dataclass(frozen=True)
class Demo:
    """One run."""

    folder: Path
    scale: Scale
    seed: int
    say: Callable[[str], None]

    @property
    def base(self) -> Path:
        return self.folder / "models/base"

    def parts(self, name: str) -> dict[str, Part]:
        """One part of the data as every task sees it."""
        return {task: load()[name].seen_as(task) for task in self.scale.tasks}

    def jobs(self, method: Method) -> list[Job]:
        return [
            Job(method.name, task, self.base, self.folder, self.scale.epochs, self.seed) for task in self.scale.tasks
        ]

    def rows(self) -> list[Row]:
        """Do the work: the base, every method on every task, and the merges."""
        with worker_map(self.scale.workers) as over:
            self.say("Training the base model on a few hundred images, shown in every way")
            seconds = train_base(self.base, epochs=self.scale.base_epochs, seed=self.seed)
            outcomes = over(fine_tune, [job for method in METHODS for job in self.jobs(method)])
            rows = [self._base_row(seconds), *(self._trained_row(method, outcomes) for method in METHODS)]
        return [*rows, *self._merged_rows()]

    @calm()
    def _base_row(self, seconds: float) -> Row:
        model = AutoModelForImageClassification.from_pretrained(self.base)
        right = {task: is_correct(model, part) for task, part in self.parts("test").items()}
        val = fmean(share(is_correct(model, part)) for part in self.parts("val").values())
        return Row("base", 0, [right], seconds, val, {"epochs": self.scale.base_epochs}, one_model=True)

    def _trained_row(self, method: Method, outcomes: Iterator[Outcome]) -> Row:
        self.say(f"Fine-tuning: {method.name}")
        mine = {task: next(outcomes) for task in self.scale.tasks}
        right = {task: torch.tensor(outcome.correct) for task, outcome in mine.items()}
        seconds = sum(outcome.seconds for outcome in mine.values())
        val = fmean(outcome.val for outcome in mine.values())
        settings = {"learning_rate": method.rate, "epochs": self.scale.epochs}
        return Row(method.name, mine[self.scale.tasks[0]].parameters, [right], seconds, val, settings)

    def _merged_rows(self) -> Iterator[Row]:
        models = [job.folder for job in self.jobs(METHODS[-1])]
        bench = Bench(self.base, models, self.parts("val"), self.parts("test"))
        for plan in PLANS:
            self.say(f"Merging the fully fine-tuned models: {plan.name.removeprefix('merge: ')}")
            seeds = range(self.seed, self.seed + self.scale.masks)
            merged = bench.carry_out(plan, self.folder / "merged" / plan.folder, seeds)
            settings = merged.chosen.to_dict() | {"validation": merged.tried}
            yield Row(plan.name, 0, merged.correct, merged.seconds, max(merged.tried), settings, one_model=True)
