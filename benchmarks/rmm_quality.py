"""How good tasks are that are stored in common by RMM, beside merges of them into one and the adapters themselves.

    OMP_NUM_THREADS=1 python benchmarks/rmm_quality.py                   # about ten CPU minutes
    OMP_NUM_THREADS=1 python benchmarks/rmm_quality.py --suite digits    # without MiniLM
    OMP_NUM_THREADS=1 python benchmarks/rmm_quality.py --quick           # to see that it works; figures mean nothing

Eight views of handwritten digits and eight tasks from docstrings, one LoRA adapter of rank 16 for each, three seeds.
Merges "on deltas" merge the weights of the whole models, those "on factors" the matrices A and the matrices B apart.
Their scale is chosen by the mean validation accuracy with the first seed; RMM has nothing to choose. Test rows play no
part in any choice. The adapters are kept in `--cache`. Results: `results/rmm_quality.json`
(which keeps the suite that was not run), `.md` and `.png`.
"""

import argparse
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from peft import PeftModel
from tasks import Classifier, Suite, digits, text
from tasks.tuned import FineTunes, State, Training, say
from transformers.utils import logging

from hf_modular import merge_adapter_files
from hf_modular.demo.training import calm
from hf_modular.merging import DAREConfig, MergeMethod, TaskArithmeticConfig, TIESConfig, merge_state_dicts

HERE = Path(__file__).resolve().parent
RANK = 16
TRAININGS = {"digits": Training(1e-2, 5, rank=RANK), "text": Training(3e-3, 3, rank=RANK)}
ROWS = {"digits": (200, 500), "text": (64, 256)}  # of each task, to choose a scale by and to test on
SCALES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
Accuracies = dict[str, float]  # by task

MERGES: dict[str, Callable[[float], MergeMethod]] = {
    "task arithmetic": lambda scale: TaskArithmeticConfig(scale=scale),
    "TIES": lambda scale: TIESConfig(density=0.2, scale=scale),
    "DARE": lambda scale: DAREConfig(drop=0.5, scale=scale),
}
REVERSIBLE: dict[str, dict[str, Any]] = {
    **{f"RMM p={p}": {"p": p} for p in (1, 2, 4, 7)},
    **{f"RMM p={p}, balanced (ours)": {"p": p, "canonicalize": True} for p in (1, 2, 4)},
    "RMM p=4, by tensor (ours)": {"p": 4, "granularity": "tensor"},
}


@dataclass(frozen=True)
class Plan:
    """How much is done."""

    cache: Path
    suite: str = "digits"
    tasks: tuple[str, ...] = ()  # all of them if empty
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: float | None = None  # as in TRAININGS
    scales: tuple[float, ...] = SCALES
    base_epochs: int = digits.BASE_EPOCHS

    def load(self) -> Suite:
        if self.suite == "digits":
            return digits.suite(self.cache, self.tasks or tuple(digits.VIEWS), self.base_epochs)
        return text.suite(self.cache, self.tasks or tuple(text.docstrings.RECIPES))

    @property
    def training(self) -> Training:
        whole = TRAININGS[self.suite]
        return whole if self.epochs is None else replace(whole, epochs=self.epochs)


@dataclass(frozen=True, eq=False)
class Bench:
    """The adapters of one seed, and what can be made of them."""

    plan: Plan
    suite: Suite
    seed: int

    @cached_property
    def fine_tunes(self) -> FineTunes:
        return FineTunes(self.suite, self.plan.training, self.plan.cache)

    @cached_property
    def folders(self) -> dict[str, Path]:
        return {task: self.fine_tunes.adapter(task, self.seed) for task in self.suite.tasks}

    def alone(self) -> Accuracies:
        """Each adapter on its task."""
        return {task: self._accuracy(task, self._loaded(task)) for task in self.suite.tasks}

    def base(self) -> Accuracies:
        return {task: self._accuracy(task, self.suite.new_encoder()) for task in self.suite.tasks}

    def reversible(self, settings: Mapping[str, Any]) -> tuple[Accuracies, dict[str, float]]:
        """Each task of an RMM adapter; its storage and its relative error."""
        models = [{"model": str(folder), "task": task} for task, folder in self.folders.items()]
        recipe = {"merge_method": "rmm", "models": models, "parameters": dict(settings), "warn_above": 9}
        with tempfile.TemporaryDirectory() as folder:
            report = merge_adapter_files(recipe, Path(folder) / "rmm")
            model = PeftModel.from_pretrained(self.suite.new_encoder(), Path(folder) / "rmm")
        found = {}
        for task in self.suite.tasks:
            model.set_task(task)
            found[task] = self._accuracy(task, model)
        return found, {"storage": report.settings["storage"], "error": report.error}

    def on_deltas(self, method: MergeMethod, split: str) -> Accuracies:
        """One encoder for all tasks, merged from the whole encoders."""
        encoder = self.suite.new_encoder()
        base = {name: tensor for name, tensor in encoder.state_dict().items() if name in self.whole[0]}
        encoder.load_state_dict(merge_state_dicts(base, self.whole, method, seed=self.seed), strict=False)
        return self._accuracies(encoder, split)

    def on_factors(self, method: MergeMethod, split: str) -> Accuracies:
        """One adapter for all tasks, merged from their matrices."""
        start = {name: torch.zeros_like(tensor) for name, tensor in self.factors[0].items()}
        model = self._loaded(next(iter(self.suite.tasks)))
        model.load_state_dict(merge_state_dicts(start, self.factors, method, seed=self.seed), strict=False)
        return self._accuracies(model, split)

    @cached_property
    def whole(self) -> list[State]:
        """The weights that have an adapter, with it merged into them."""
        return [self.fine_tunes.state(task, self.seed) for task in self.suite.tasks]

    @cached_property
    def factors(self) -> list[State]:
        states = [self._loaded(task).state_dict() for task in self.suite.tasks]
        return [{name: tensor for name, tensor in state.items() if "lora_" in name} for state in states]

    def _loaded(self, task: str) -> PeftModel:
        return PeftModel.from_pretrained(self.suite.new_encoder(), self.folders[task])

    def _accuracies(self, encoder: Any, split: str) -> Accuracies:
        return {task: self._accuracy(task, encoder, split) for task in self.suite.tasks}

    def _accuracy(self, task: str, encoder: Any, split: str = "test") -> float:
        found = self.suite.tasks[task]
        model = Classifier(encoder, self.suite.pool, found.head)
        rows = found.splits[split].first(ROWS[self.suite.name][split == "test"])
        with self.suite.precision():
            return float(model.correct(rows).float().mean())


def run(plan: Plan) -> dict[str, Any]:
    with calm():
        suite = plan.load()
        benches = [Bench(plan, suite, seed) for seed in plan.seeds]
        rows = [
            row("base", [benches[0].base()], {"storage": 0.0}),
            row("an adapter for each task", [bench.alone() for bench in benches], {"storage": 1.0}),
            *reversible(benches),
            *merged(benches, plan.scales),
        ]
    return {
        "tasks": [*suite.tasks],
        "sha256": {name: task.sha256 for name, task in suite.tasks.items()},
        "base_sha256": suite.base_sha256,
        "training": asdict(plan.training),
        "seeds": [*plan.seeds],
        "rows": rows,
    }


def merged(benches: Sequence[Bench], scales: Sequence[float]) -> Iterator[dict[str, Any]]:
    for where in ("deltas", "factors"):
        for name, method in MERGES.items():
            runs = [getattr(bench, f"on_{where}") for bench in benches]
            scores = {scale: fmean(runs[0](method(scale), "val").values()) for scale in scales}
            best = max(scores, key=lambda scale: scores[scale])
            found = [run(method(best), "test") for run in runs]
            size = {} if where == "deltas" else {"storage": 1 / len(found[0])}  # else that of the model
            yield row(f"{name} on {where}", found, {"scale": best, **size})


def reversible(benches: Sequence[Bench]) -> Iterator[dict[str, Any]]:
    for name, settings in REVERSIBLE.items():
        settings = {**settings, "p": min(settings["p"], len(benches[0].folders) - 1)}
        runs = [bench.reversible(settings) for bench in benches]
        facts = {key: fmean(facts[key] for _, facts in runs) for key in runs[0][1]}
        yield row(name, [accuracies for accuracies, _ in runs], facts)


def row(name: str, runs: Sequence[Accuracies], facts: Mapping[str, float]) -> dict[str, Any]:
    say(name, *(f"{fmean(run.values()):.3f}" for run in runs), dict(facts))
    return {"name": name, "runs": list(runs), **facts}


def table(results: Mapping[str, Any]) -> str:
    """Markdown; accuracies in percent."""
    tasks = results["tasks"]
    lines = [["stored", "numbers", "error", *tasks, "mean ± SE"]]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for found in results["rows"]:
        runs, scale = found["runs"], f", scale {found['scale']:g}" if "scale" in found else ""
        accuracies = [f"{100 * fmean(run[task] for run in runs):.1f}" for task in tasks]
        facts = [f"{found[key]:.2f}" if key in found else "" for key in ("storage", "error")]
        lines.append([f"{found['name']}{scale}", *facts, *accuracies, _mean(runs)])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _mean(runs: Sequence[Accuracies]) -> str:
    """Over tasks and seeds, and the standard error of the seeds."""
    means = [100 * fmean(run.values()) for run in runs]
    spread = f" ± {stdev(means) / len(means) ** 0.5:.1f}" if len(means) > 1 else ""
    return f"{fmean(means):.1f}{spread}"


def write(made: Mapping[str, Any], folder: Path) -> str:
    """The three files, with the suite that was not run this time; returns the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "rmm_quality.json"
    known = json.loads(file.read_text("utf-8"))["suites"] if file.is_file() else {}
    suites = {name: found for name in TRAININGS if (found := made.get(name) or known.get(name))}
    shown = "\n\n".join(f"{name}:\n\n{table(found)}" for name, found in suites.items())
    file.write_text(json.dumps({"suites": suites}, indent=1) + "\n", "utf-8")
    (folder / "rmm_quality.md").write_text(f"{shown}\n", "utf-8")
    draw(suites, folder / "rmm_quality.png")
    return shown


def draw(suites: Mapping[str, Any], path: Path) -> None:
    """Mean accuracy against what is stored, a panel for each suite."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(suites), figsize=(6.4 * len(suites), 4), layout="constrained", squeeze=False
    )
    for axes, (name, results) in zip(panels[0], suites.items(), strict=True):
        axes.set_title(name)
        _draw_suite(axes, {found["name"]: found for found in results["rows"]})
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_suite(axes: Any, rows: Mapping[str, Any]) -> None:
    means = {name: 100 * fmean(fmean(run.values()) for run in found["runs"]) for name, found in rows.items()}
    lines = {"RMM": [f"RMM p={p}" for p in (1, 2, 4, 7)], "RMM on balanced factors (ours)": [*REVERSIBLE][4:7]}
    for label, names in lines.items():
        axes.plot([rows[name]["storage"] for name in names], [means[name] for name in names], "o-", label=label)
    axes.plot(1, means["an adapter for each task"], "k*", markersize=10, label="an adapter for each task")
    best = max((name for name in rows if " on " in name and "RMM" not in name), key=lambda name: means[name])
    axes.axhline(means[best], linestyle="--", color="tab:red", label=f"the best merge into one: {best}")
    axes.axhline(means["base"], linestyle=":", color="gray", label="base")
    axes.set(xlabel="numbers stored, over those of the adapters", ylabel="mean accuracy, %", xlim=(0, 1.5))
    axes.legend(loc="center right", fontsize=8)


QUICK: dict[str, Any] = {"seeds": (0, 1), "epochs": 0.3, "scales": (0.5,), "base_epochs": 2}


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()  # the encoder has no use for the head in its file
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--suite", choices=TRAININGS, help="only this one")
    parser.add_argument("--quick", action="store_true", help="a few steps on three tasks; the figures mean nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=Plan.seeds)
    parser.add_argument("--cache", type=Path, default=HERE.parent / ".peers" / "quality", help="finished trainings")
    parser.add_argument("--output", type=Path, help="a folder; benchmarks/results, or the cache with --quick")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    few = {"digits": ("rotated", "negative", "noisy"), "text": ("verb", "exception", "method")}
    plans = {name: Plan(options.cache, name, seeds=tuple(options.seeds)) for name in TRAININGS}
    if options.quick:
        plans = {name: replace(plan, tasks=few[name], **QUICK) for name, plan in plans.items()}
    results = {name: run(plans[name]) for name in ([options.suite] if options.suite else TRAININGS)}
    print(write(results, options.output or (options.cache if options.quick else HERE / "results")))


if __name__ == "__main__":
    main()
