"""How good merged models are: every method that merges several tasks, at its defaults and with tuned coefficients.

    python benchmarks/merging_quality.py                  # about twenty minutes on one core
    python benchmarks/merging_quality.py --quick          # to see that it works; the figures mean nothing

Two, four and eight views of handwritten digits; a small vision transformer is fine-tuned on each view, with three
seeds, and the encoders are merged. All of them share one frozen head. "Tuned" is what `hf_modular.search` does, CMA-ES
over the method's settings or the models' weights from the middle of their range on, by the mean accuracy on some
validation images, with the same number of trials for every method, of which the default is one. Test images play no
part in any choice. A second table thins single fine-tuned models by DARE and DAREx. What is finished is kept
in `--cache`, so an interrupted run goes on where it was. What comes out is `merging_quality.json`, `.md` and `.png` in
`benchmarks/results`.

Not among the methods: nearswap and arcee_fusion (one model and its base), passthrough (one model), rws and ssd (made
to patch and to forget), and those that merge exactly two models where there are more.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from hf_modular import dare_q, fisher_information
from hf_modular.demo.digits import VIEWS
from hf_modular.demo.training import calm, train
from hf_modular.merging import (
    BreadcrumbsConfig,
    DAREConfig,
    DELLAConfig,
    FisherConfig,
    GraftConfig,
    KarcherConfig,
    LinearConfig,
    MergeMethod,
    ModelStockConfig,
    MultiSLERPConfig,
    NuSLERPConfig,
    OPCMConfig,
    PCBConfig,
    SCEConfig,
    SLERPConfig,
    TaskArithmeticConfig,
    TIESConfig,
    merge_state_dicts,
)
from hf_modular.searching._evolution import evolve

HERE = Path(__file__).resolve().parent
State = dict[str, Tensor]
RATE, EPOCHS = 1e-3, 10  # of the fine-tunes, the demo's
FISHER_EXAMPLES = 128
VAL_ROWS = 100  # of each task, by which coefficients are tuned
CALIBRATION_ROWS = 32
WEIGHTS = (0.0, 2.0)  # between which the models' weights are tuned


@dataclass(frozen=True)
class Entry:
    """One row of the table."""

    name: str
    config: MergeMethod
    space: Mapping[str, tuple[float, float]]  # what is tuned; "weight" stands for one number of each model
    only_two: bool = False
    based: bool = True  # whether a base is given


SCALE = (0.05, 1.2)
ENTRIES = (
    Entry("average", LinearConfig(), {"weight": WEIGHTS}),
    Entry("task arithmetic", TaskArithmeticConfig(), {"scale": SCALE}),
    Entry("TIES", TIESConfig(), {"scale": (0.1, 2.0), "density": (0.05, 1.0)}),
    Entry("DARE, p=0.9", DAREConfig(), {"scale": SCALE}),
    Entry("DARE and TIES, p=0.9", DAREConfig(election="symmetric", normalize=True), {"scale": (0.1, 2.0)}),
    Entry("DAREx q closed, p=0.9", DAREConfig(rescale="q", q="closed_form"), {"scale": (0.05, 4.0)}),
    Entry("DELLA", DELLAConfig(), {"scale": (0.1, 2.0), "density": (0.2, 0.8)}),
    Entry("breadcrumbs", BreadcrumbsConfig(), {"scale": (0.05, 3.0), "density": (0.05, 0.98)}),
    Entry("SCE", SCEConfig(), {"select_topk": (0.05, 1.0)}),
    Entry("PCB", PCBConfig(), {"scale": (0.1, 2.0), "density": (0.02, 0.9)}),
    Entry("PCB, raw", PCBConfig(variant="raw"), {"scale": (0.1, 2.0), "density": (0.02, 0.9)}),
    Entry("Fisher", FisherConfig(), {"weight": WEIGHTS}, based=False),
    Entry("OPCM", OPCMConfig(), {"alpha": (0.0, 1.0)}),
    Entry("graft", GraftConfig(), {"density": (0.005, 0.9)}),
    Entry("model stock", ModelStockConfig(), {}),
    Entry("Karcher mean", KarcherConfig(), {"weight": WEIGHTS}, based=False),
    Entry("MultiSLERP", MultiSLERPConfig(), {"weight": WEIGHTS}, based=False),
    Entry("SLERP", SLERPConfig(), {"t": (0.0, 1.0)}, only_two=True, based=False),
    Entry("NuSLERP", NuSLERPConfig(), {"weight": WEIGHTS}, only_two=True, based=False),
)
DROPS = (0.9, 0.95, 0.99)
QS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)  # tried on validation, those that are at least 1 - p


@dataclass(frozen=True)
class Plan:
    """How much is done."""

    cache: Path
    seeds: tuple[int, ...] = (0, 1, 2)
    counts: tuple[int, ...] = (2, 4, 8)
    methods: tuple[str, ...] = tuple(entry.name for entry in ENTRIES)
    trials: int = 8
    epochs: float = EPOCHS
    base_epochs: int = 110
    rows: int | None = None  # for validation and test, if not all


@dataclass(frozen=True, eq=False)
class Bench:
    """The suite, its fine-tuned encoders, and a ledger of what is known."""

    plan: Plan

    @cached_property
    def suite(self) -> Any:
        from tasks import digits

        suite = digits.suite(self.plan.cache, tuple(VIEWS), self.plan.base_epochs)
        rows = self.plan.rows
        return replace(suite, tasks={n: t.first(rows, rows) for n, t in suite.tasks.items()}) if rows else suite

    @cached_property
    def tasks(self) -> list[str]:
        return list(self.suite.tasks)

    @cached_property
    def base(self) -> State:
        return self.suite.new_encoder().state_dict()

    @cached_property
    def identity(self) -> list[Any]:
        """What all figures depend on."""
        data = [self.suite.tasks[name].sha256 for name in self.tasks]
        return [self.suite.base_sha256, data, self.plan.epochs, RATE, torch.__version__]

    @cached_property
    def ledger(self) -> "Ledger":
        return Ledger(self.plan.cache / "merging_quality.jsonl", self.identity)

    @cached_property
    def classifiers(self) -> dict[str, Any]:
        return {name: self.suite.model(name) for name in self.tasks}

    def accuracies(self, state: State, tasks: Sequence[str], split: str) -> dict[str, float]:
        """How often an encoder is right, task by task."""
        found = {}
        for name in tasks:
            model = self.classifiers[name]
            model.encoder.load_state_dict(state)
            rows = getattr(self.suite.tasks[name], split)
            rows = rows.first(VAL_ROWS) if split == "val" else rows
            found[name] = float(model.correct(rows).float().mean())
        return found

    def tuned_encoder(self, task: str, seed: int) -> State:
        """Fine-tuned on a task, once."""
        file = self._file("model", task, seed)
        if not file.is_file():
            model = self.suite.model(task)
            rows = self.suite.tasks[task].train.rows()
            with tempfile.TemporaryDirectory() as folder:
                torch.manual_seed(seed)
                options: Any = {"rate": RATE, "epochs": self.plan.epochs, "seed": seed, "remove_unused_columns": False}
                seconds = train(model, rows, Path(folder), **options)
            _save(model.encoder.state_dict(), file)
            say("fine-tuned", task, seed, round(seconds, 1))
        return load_file(file)

    def fisher(self, task: str, seed: int) -> State:
        file = self._file("fisher", task, seed)
        if not file.is_file():
            model = self.suite.model(task)
            model.encoder.load_state_dict(self.tuned_encoder(task, seed))
            split = self.suite.tasks[task].train.first(FISHER_EXAMPLES)
            rows = [{"pixel_values": image} for image in split.inputs["pixel_values"]]
            found = fisher_information(_OfImages(model), rows, batch_size=16, progress=False)
            _save({name.removeprefix("model.encoder."): tensor for name, tensor in found.items()}, file)
        return load_file(file)

    def _file(self, kind: str, task: str, seed: int) -> Path:
        digest = hashlib.sha256(json.dumps([self.identity, FISHER_EXAMPLES, task, seed]).encode()).hexdigest()[:16]
        return self.plan.cache / f"{kind}-{digest}.safetensors"


class _OfImages(nn.Module):
    """A classifier whose forward says what it takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return self.model(pixel_values=pixel_values)


class Ledger:
    """The outcomes there are, one JSON object per line."""

    def __init__(self, path: Path, identity: Any) -> None:
        self.path, self.identity = path, identity
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
        self.known = {found["key"]: found["outcome"] for found in map(_parsed, lines) if found}

    def get(self, facts: Any, make: Callable[[], Any]) -> Any:
        """What is known of something, or is now made and noted."""
        key = hashlib.sha256(json.dumps([self.identity, facts], sort_keys=True).encode()).hexdigest()
        if key not in self.known:
            self.known[key] = make()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "outcome": self.known[key]}) + "\n")
        return self.known[key]


def _parsed(line: str) -> dict[str, Any] | None:
    """A line of the ledger; the last one may have been cut off."""
    try:
        return json.loads(line)
    except ValueError:
        return None


@dataclass(frozen=True, eq=False)
class Job:
    """One method on some tasks with one seed."""

    bench: Bench
    entry: Entry
    tasks: Sequence[str]
    seed: int

    @cached_property
    def models(self) -> list[State]:
        return [_model(self.bench, task, self.seed) for task in self.tasks]

    @cached_property
    def companions(self) -> dict[str, list[State]]:
        if not self.entry.config.needs:
            return {}
        return {"fisher": [_fisher(self.bench, task, self.seed) for task in self.tasks]}

    def merged(self, settings: Mapping[str, Any]) -> State:
        """With other settings than the default ones."""
        own = {key: value for key, value in settings.items() if not key.startswith("weight")}
        weights = [settings.get(f"weight {i}", 1.0) for i in range(len(self.tasks))]
        config = replace(self.entry.config, **own)
        base = self.bench.base if self.entry.based and config.base_model != "unused" else None
        return merge_state_dicts(
            base, self.models, config, weights=weights, seed=self.seed, companions=self.companions or None
        )

    def outcome(self) -> dict[str, Any]:
        facts = [self.entry.config.to_dict(), dict(self.entry.space), list(self.tasks), self.seed]
        return self.bench.ledger.get([*facts, self.bench.plan.trials, VAL_ROWS, "from the middle"], self._carried_out)

    def _carried_out(self) -> dict[str, Any]:
        _ = self.models, self.companions  # what has to be made or read first takes no part in the time of a merge
        start = time.process_time()
        default = self.merged({})
        seconds = time.process_time() - start
        settings, tried = self._tuned()
        results = {"default": default, "tuned": self.merged(settings) if settings else default}
        tests = {how: self.bench.accuracies(state, self.tasks, "test") for how, state in results.items()}
        say(self.entry.name, len(self.tasks), self.seed, *(round(fmean(t.values()), 3) for t in tests.values()))
        return {"seconds": seconds, "settings": settings, "tried": tried, **tests}

    def _tuned(self) -> tuple[dict[str, Any], list[float]]:
        """The best settings by validation, and what all trials came to; the first is the default."""
        names = [name for key in self.entry.space for name in self._names(key)]
        bounds = [self.entry.space[name.split()[0]] for name in names]
        tried: list[tuple[float, dict[str, Any]]] = []

        def cost(settings: Mapping[str, Any]) -> float:
            score = fmean(self.bench.accuracies(self.merged(settings), self.tasks, "val").values())
            tried.append((score, dict(settings)))
            return -score

        cost({})
        if names:

            def costs(points: list[list[float]]) -> list[float]:
                placed = [[placed_in(*each) for each in zip(names, p, bounds, strict=True)] for p in points]
                return [cost(dict(zip(names, point, strict=True))) for point in placed]

            evolve([0.5] * len(names), costs, self.bench.plan.trials - 1, self.seed)
        best = max(tried, key=lambda pair: pair[0])
        return best[1], [score for score, _ in tried]

    def _names(self, key: str) -> list[str]:
        return [f"weight {i}" for i in range(len(self.tasks))] if key == "weight" else [key]


def placed_in(name: str, x: float, bounds: tuple[float, float]) -> float:
    """What a number from 0 to 1 stands for; of scales it is the ratio that counts."""
    low, high = bounds
    return low * (high / low) ** x if name == "scale" else low + x * (high - low)


@cache
def _model(bench: Bench, task: str, seed: int) -> State:
    return bench.tuned_encoder(task, seed)


@cache
def _fisher(bench: Bench, task: str, seed: int) -> State:
    return bench.fisher(task, seed)


def thinned(bench: Bench, task: str, seed: int, drop: float) -> dict[str, float]:
    """One fine-tuned model with a part of its task vector dropped: accuracy on its own task, by rescaling."""

    def accuracy(split: str, **settings: Any) -> float:
        config = DAREConfig(drop=drop, **settings)
        state = merge_state_dicts(bench.base, [_model(bench, task, seed)], config, seed=seed)
        return bench.accuracies(state, [task], split)[task]

    def make() -> dict[str, float]:
        best = max((q for q in QS if q >= 1 - drop - 1e-9), key=lambda q: accuracy("val", rescale="q", q=q))
        return {
            "DARE": accuracy("test"),
            "DARE, norm": accuracy("test", rescale="norm"),
            "DAREx-q, closed form": accuracy("test", rescale="q", q="closed_form"),
            "DAREx-q, validation": accuracy("test", rescale="q", q=best),
            "largest": accuracy("test", rescale="none", mask="magnitude"),
            "largest, norm": accuracy("test", rescale="norm", mask="magnitude"),
            "columns": accuracy("test", mask="columns"),
            "q": best,
        }

    return bench.ledger.get(["thinned", task, seed, drop, QS, VAL_ROWS], make)


def calibrated(bench: Bench, task: str, seed: int, drop: float) -> dict[str, float]:
    """The same with a q that is found on unlabelled images by the model."""

    def make() -> dict[str, float]:
        base, model = bench.suite.new_encoder(), bench.suite.new_encoder()
        tuned = _model(bench, task, seed)
        model.load_state_dict(tuned)
        rows = bench.suite.tasks[task].val.first(CALIBRATION_ROWS).rows()
        found = {}
        for name, how in (("DAREx-q, closed form on images", "closed_form"), ("DAREx-q, least change", "search")):
            config = dare_q(base, model, DAREConfig(drop=drop), rows, how=how, seed=100 + seed).config
            state = merge_state_dicts(bench.base, [tuned], config, seed=seed)
            found[name] = bench.accuracies(state, [task], "test")[task]
        return found

    return bench.ledger.get(["calibrated", task, seed, drop, CALIBRATION_ROWS], make)


def run(plan: Plan) -> dict[str, Any]:
    """All results."""
    bench = Bench(plan)
    plan.cache.mkdir(parents=True, exist_ok=True)
    transformers_logging.set_verbosity_error()  # the base's head is no part of the encoder
    with calm():
        base = bench.accuracies(bench.base, bench.tasks, "test")
        return {
            "suite": "digits",
            "seeds": list(plan.seeds),
            "trials": plan.trials,
            "base": base,
            "individual": [_individual(bench, seed) for seed in plan.seeds],
            "thinned": [*_thinned(bench)],
            "merges": [*_merges(bench)],
            "identity": bench.identity,
        }


def _individual(bench: Bench, seed: int) -> dict[str, float]:
    def make() -> dict[str, float]:
        return {t: bench.accuracies(_model(bench, t, seed), [t], "test")[t] for t in bench.tasks}

    return bench.ledger.get(["individual", seed], make)


def _merges(bench: Bench) -> Iterator[dict[str, Any]]:
    for count in bench.plan.counts:
        for entry in ENTRIES:
            if entry.name in bench.plan.methods and (not entry.only_two or count == 2):
                runs = [Job(bench, entry, bench.tasks[:count], seed).outcome() for seed in bench.plan.seeds]
                yield {"method": entry.name, "tasks": count, "space": dict(entry.space), "runs": runs}


def _thinned(bench: Bench) -> Iterator[dict[str, Any]]:
    for drop in DROPS:
        pairs = [(task, seed) for task in bench.tasks[:4] for seed in bench.plan.seeds]
        about = [{"task": task, "seed": seed} for task, seed in pairs]
        runs = [thinned(bench, **one, drop=drop) | calibrated(bench, **one, drop=drop) | one for one in about]
        yield {"drop": drop, "runs": runs}


def _save(state: Mapping[str, Tensor], file: Path) -> None:
    part = file.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, part)
    part.replace(file)


def say(*words: object) -> None:
    print(*words, flush=True, file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=HERE.parent / ".peers" / "merging-quality")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--trials", type=int, default=Plan.trials)
    parser.add_argument("--seeds", type=int, nargs="+", default=Plan.seeds)
    parser.add_argument("--counts", type=int, nargs="+", default=Plan.counts, help="How many tasks are merged.")
    parser.add_argument("--methods", nargs="+", default=Plan.methods)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    chosen = (tuple(arguments.seeds), tuple(arguments.counts), tuple(arguments.methods), arguments.trials)
    plan = Plan(arguments.cache, *chosen)
    if arguments.quick:
        plan = replace(plan, cache=plan.cache / "quick", seeds=(0,), counts=(2,), trials=2, epochs=1, base_epochs=2)
        plan = replace(plan, rows=40)
    from merging_quality_report import write

    print(write(run(plan), arguments.output))


if __name__ == "__main__":
    main()
