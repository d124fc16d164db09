"""How good tasks are that are stored in common by RMM, beside merges of them into one and the adapters themselves.

    OMP_NUM_THREADS=1 python benchmarks/rmm_quality.py             # about ten CPU minutes
    OMP_NUM_THREADS=1 python benchmarks/rmm_quality.py --quick     # to see that it works; the figures mean nothing

Eight views of handwritten digits, one LoRA adapter of rank 16 for each, three seeds. Merges "on deltas" merge the
weights of the whole models, those "on factors" the matrices A and the matrices B apart. Their scale is chosen by the
mean validation accuracy with the first seed; RMM has nothing to choose. Test images play no part in any choice. The
adapters are kept in `--cache`. Results: `results/rmm_quality.json`, `.md` and `.png`.
"""

import argparse
import json
import os
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tasks import Classifier, Suite, digits
from torch import Tensor
from transformers.utils import logging

from hf_modular import merge_adapter_files
from hf_modular.demo.training import calm, train
from hf_modular.merging import DAREConfig, MergeMethod, TaskArithmeticConfig, TIESConfig, merge_state_dicts

HERE = Path(__file__).resolve().parent
RANK, RATE = 16, 1e-2
SCALES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
SLOT = ".default"
State = dict[str, Tensor]
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
    views: tuple[str, ...] = tuple(digits.VIEWS)
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: float = 5
    scales: tuple[float, ...] = SCALES
    base_epochs: int = digits.BASE_EPOCHS


@dataclass(frozen=True, eq=False)
class Bench:
    """The adapters of one seed, and what can be made of them."""

    plan: Plan
    suite: Suite
    seed: int

    @cached_property
    def folders(self) -> dict[str, Path]:
        return {task: self._trained(task) for task in self.suite.tasks}

    def _trained(self, task: str) -> Path:
        name = f"{task.replace(' ', '-')}-r{RANK}-{self.plan.epochs:g}-{self.seed}"
        folder = self.plan.cache / f"rmm-{self.suite.base_sha256[:8]}" / name
        if not (folder / "adapter_model.safetensors").is_file():
            model = self.suite.model(task)
            torch.manual_seed(self.seed + zlib.crc32(task.encode()))  # nobody agrees on where the matrices begin
            model.encoder = get_peft_model(model.encoder, LoraConfig(r=RANK, target_modules="all-linear"))
            options = {"rate": RATE, "epochs": self.plan.epochs, "seed": self.seed, "remove_unused_columns": False}
            with calm(), tempfile.TemporaryDirectory() as work:
                seconds = train(model, self.suite.tasks[task].train.rows(), Path(work), **options)
            model.encoder.save_pretrained(folder)
            print(task, self.seed, f"{seconds:.0f} s", file=sys.stderr, flush=True)
        return folder

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
        encoder.load_state_dict(merge_state_dicts(encoder.state_dict(), self.whole, method, seed=self.seed))
        return self._accuracies(encoder, split)

    def on_factors(self, method: MergeMethod, split: str) -> Accuracies:
        """One adapter for all tasks, merged from their matrices."""
        start = {name: torch.zeros_like(tensor) for name, tensor in self.factors[0].items()}
        model = self._loaded(next(iter(self.suite.tasks)))
        model.load_state_dict(merge_state_dicts(start, self.factors, method, seed=self.seed), strict=False)
        return self._accuracies(model, split)

    @cached_property
    def whole(self) -> list[State]:
        return [self._loaded(task).merge_and_unload().state_dict() for task in self.suite.tasks]

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
        return float(model.correct(found.splits[split]).float().mean())


def run(plan: Plan) -> dict[str, Any]:
    suite = digits.suite(plan.cache, plan.views, plan.base_epochs)
    benches = [Bench(plan, suite, seed) for seed in plan.seeds]
    with calm():
        rows = [
            row("base", [benches[0].base()], {"storage": 0.0}),
            row("an adapter for each task", [bench.alone() for bench in benches], {"storage": 1.0}),
            *merged(benches, plan.scales),
            *reversible(benches),
        ]
    return {"tasks": [*suite.tasks], "rank": RANK, "seeds": [*plan.seeds], "epochs": plan.epochs, "rows": rows}


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


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Mean accuracy against what is stored."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {found["name"]: found for found in results["rows"]}
    means = {name: 100 * fmean(fmean(run.values()) for run in found["runs"]) for name, found in rows.items()}
    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    lines = {"RMM": [f"RMM p={p}" for p in (1, 2, 4, 7)], "RMM on balanced factors (ours)": [*REVERSIBLE][4:7]}
    for label, names in lines.items():
        axes.plot([rows[name]["storage"] for name in names], [means[name] for name in names], "o-", label=label)
    axes.plot(1, means["an adapter for each task"], "k*", markersize=10, label="an adapter for each task")
    best = max((name for name in rows if " on " in name and "RMM" not in name), key=lambda name: means[name])
    axes.axhline(means[best], linestyle="--", color="tab:red", label=f"the best merge into one: {best}")
    axes.axhline(means["base"], linestyle=":", color="gray", label="base")
    axes.set(xlabel="numbers stored, over those of the adapters", ylabel="mean accuracy, %", xlim=(0, 1.5))
    axes.legend(loc="center right", fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()  # the encoder has no use for the head in its file
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="a few steps; the figures mean nothing")
    parser.add_argument("--cache", type=Path, default=HERE.parent / ".peers" / "quality", help="finished trainings")
    parser.add_argument("--output", type=Path, help="a folder; benchmarks/results, or the cache with --quick")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    few = {
        "views": ("rotated", "negative", "noisy"),
        "seeds": (0, 1),
        "epochs": 0.3,
        "scales": (0.5,),
        "base_epochs": 2,
    }
    results = run(Plan(options.cache, **(few if options.quick else {})))
    output = options.output or (options.cache if options.quick else HERE / "results")
    (output / "rmm_quality.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (output / "rmm_quality.md").write_text(table(results) + "\n", encoding="utf-8")
    draw(results, output / "rmm_quality.png")
    print(table(results))


if __name__ == "__main__":
    main()
