"""What each adapter costs, beside PEFT's own methods on the same targets.

    python benchmarks/adapters.py              # as many rounds as twenty minutes of one core allow
    python benchmarks/adapters.py --quick      # one round
    python benchmarks/adapters.py --models llama --only hut_tile,hira

Every case runs in a process of its own, on one thread of a pinned core; the cases are interleaved over several
rounds, and a figure is the median over the rounds of its ratio within the same round. Each finished measurement is
kept in `--journal`, so that a run that was cut, or that `--minutes` has ended, goes on where it was, as long as the
settings, the versions and the code of the adapters are the same; `--fresh` starts anew. With LoRA of rank 8 as 1:

- `step`: forward, backward and AdamW (processor time; on a GPU, elapsed time);
- `saved`: the bytes of distinct storages that autograd keeps for backward, parameters left out;
- `peak`: what the process's memory rose by in training (on a GPU, the allocator's peak).

With the same model without an adapter as 1: `alone`, inference at batch 1 with the adapter active (for the decoder,
one token of generation), and `merged`, the same after merging. The layer of Compacter is measured by itself too. A
GPU is used if there is one.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OURS = ["hut_tile", "hut_row_column", "hut_low_rank", "ssf", "mos", "flora", "compacter"]
PEERS = ["hira", "vera", "vblora", "ia3", "oft", "full"]
CASES = {
    "llama": ["lora", *OURS, *PEERS, "miss", "road", "dora", "loha", "hra"],
    "bert": ["lora", *OURS, *PEERS],
    "convnext": ["lora", "ssf", "flora", "hut_tile", "hira", "loha", "full"],
}
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "bert": ["query", "key", "value", "dense"],
    "convnext": r".*(pwconv\d|downsampling_layer\.1|patch_embeddings)",
}
PRELOADED = ["torch", "peft", "hf_modular", *(f"transformers.models.{m}.modeling_{m}" for m in CASES)]
RATIOS = ["step", "saved", "peak"]  # to LoRA
COLUMNS = [*RATIOS, "alone", "merged"]
Step = tuple[str, str, int]  # a model, a case and a round
Figures = dict[Step, dict[str, Any]]
PHM = ("layer", "phm")  # the model and the case that are Compacter's layer alone


def make_config(case: str, targets: Any) -> Any:
    """The config of a case; PEFT's methods at the settings of their documentation, rank 8 where there is one."""
    import peft

    import hf_modular

    makers: dict[str, Callable[..., Any]] = {
        "lora": partial(peft.LoraConfig, r=8, lora_alpha=16),
        "dora": partial(peft.LoraConfig, r=8, lora_alpha=16, use_dora=True),
        "hira": partial(peft.HiraConfig, r=8),
        "vera": partial(peft.VeraConfig, r=256),
        "vblora": partial(peft.VBLoRAConfig, r=4, num_vectors=256, vector_length=128),
        "ia3": partial(peft.IA3Config, feedforward_modules=[]),
        "oft": partial(peft.OFTConfig, oft_block_size=32),
        "hra": partial(peft.HRAConfig, r=8),
        "miss": partial(peft.MissConfig, r=64),
        "road": peft.RoadConfig,
        "loha": partial(peft.LoHaConfig, r=8),
        **{f"hut_{form}": partial(hf_modular.HUTConfig, form=form) for form in ("tile", "row_column", "low_rank")},
        "ssf": hf_modular.SSFConfig,
        "mos": partial(hf_modular.MoSConfig, r=8),
        "flora": hf_modular.FLoRAConfig,
        "compacter": hf_modular.CompacterConfig,
    }
    return makers[case](target_modules=targets)


def make_model(name: str) -> tuple[Any, dict[str, Any]]:
    """A model of 20 to 25 million parameters, and a batch with a realistic number of tokens."""
    import torch
    import transformers as tf

    torch.manual_seed(0)
    if name == "llama":
        sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 6}
        ids = torch.randint(0, 4096, (4, 128))
        return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=4096, **sizes)), {"input_ids": ids, "labels": ids}
    if name == "bert":
        sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 7, "num_attention_heads": 8}
        batch = {"input_ids": torch.randint(0, 8192, (8, 64)), "labels": torch.randint(0, 2, (8,))}
        return tf.BertForSequenceClassification(tf.BertConfig(vocab_size=8192, **sizes)), batch
    config = tf.ConvNextConfig(hidden_sizes=[80, 160, 320, 640], depths=[3, 3, 9, 3], image_size=64, num_labels=10)
    batch = {"pixel_values": torch.randn(8, 3, 64, 64), "labels": torch.randint(0, 10, (8,))}
    return tf.ConvNextForImageClassification(config), batch


# -- in the process of a case ----------------------------------------------------------------------------------------


def measure(name: str, case: str, options: argparse.Namespace) -> dict[str, float]:
    """The figures of one method on one model."""
    prepare(options)
    model, batch = make_model(name)
    model = model.to(options.device)
    batch = {key: value.to(options.device) for key, value in batch.items()}
    if case == "full":
        return training(model.train(), batch, options)
    bare = alone(model, batch, options.device)
    from peft import get_peft_model

    model = get_peft_model(model, make_config(case, TARGETS[name]))
    figures = training(model.train(), batch, options)
    figures["alone"] = alone(model, batch, options.device) / bare
    try:
        model.merge_adapter()
    except (ValueError, AttributeError, NotImplementedError):
        return figures  # it cannot be merged
    return figures | {"merged": alone(model, batch, options.device) / bare}


def prepare(options: argparse.Namespace) -> None:
    """One thread, on the core that was asked for, and no messages."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    if options.cpu is not None:
        os.sched_setaffinity(0, {options.cpu})


def training(model: Any, batch: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    saved, before = saved_bytes(model, batch), resident()
    times = [elapsed(step, options.device) for _ in range(options.steps + 1)]
    on_cpu = options.device == "cpu"
    peak = resident(peak=True) - before if on_cpu else torch.cuda.max_memory_allocated()
    return {"step": min(times[1:]), "saved": saved, "peak": peak, "trainable": sum(p.numel() for p in trained)}


def alone(model: Any, batch: dict[str, Any], device: str) -> float:
    """The time of inference at batch 1; of a decoder, of one more token."""
    import torch

    key, inputs = next(iter(batch.items()))
    given = {key: inputs[:1]}
    model.eval()
    with torch.no_grad():
        if model.config.model_type == "llama":
            cache = model(**given, use_cache=True).past_key_values
            given = {key: inputs[:1, :1], "past_key_values": cache, "use_cache": True}
        times = [elapsed(lambda: model(**given), device)]
        while len(times) < 20 and sum(times) < 3:
            times.append(elapsed(lambda: model(**given), device))
        return min(times)


def elapsed(action: Callable[[], object], device: str) -> float:
    """Seconds: of the processor, or on a GPU of the clock."""
    start = now(device)
    action()
    return now(device) - start


def now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def resident(*, peak: bool = False) -> int:
    """Resident memory in bytes, from Linux's own accounting."""
    key = "VmHWM" if peak else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def saved_bytes(model: Any, batch: dict[str, Any]) -> int:
    import torch

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    del loss
    return sum(kept.values())


def measure_phm(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Milliseconds of a PHM layer, 768 to 24 on 12,800 tokens, by the ways there are to compute it."""
    prepare(options)
    import torch

    from hf_modular import CompacterConfig
    from hf_modular.adapters.compacter import PHM

    fast, dense = (PHM(CompacterConfig(fast=fast), 768, 24).to(options.device) for fast in (True, False))
    rule = torch.randn(4, 4, 4, device=options.device, requires_grad=True)
    x = torch.randn(12_800, 768, device=options.device, requires_grad=True)

    def product_by_product() -> Any:
        """Each Kronecker product at full size, then their sum, as reference code does it."""
        W = dense.S @ dense.T
        return x @ torch.stack([torch.kron(A, B) for A, B in zip(rule, W, strict=True)]).sum(0) + dense.bias

    ways = {"factors": lambda: fast(x, rule), "one matrix": lambda: dense(x, rule), "products": product_by_product}
    g = torch.randn(12_800, 24, device=options.device)
    given = {way: [x, rule, *(fast if way == "factors" else dense).parameters()] for way in ways}
    figures: dict[str, dict[str, float]] = {way: {} for way in ways}
    for part in ("forward", "forward and backward"):
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(15):
            for way, run in ways.items():
                action = (
                    run if part == "forward" else lambda way=way, run=run: torch.autograd.grad(run(), given[way], g)
                )
                times[way].append(elapsed(action, options.device))
        for way in ways:
            figures[way][part] = round(1e3 * min(times[way]), 2)
    return figures


# -- in the process that starts them ---------------------------------------------------------------------------------


def apart(action: Callable[..., Any], *arguments: Any) -> Any:
    """What the action gives in a new process, which starts with the libraries loaded and nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as process:
        return process.submit(action, *arguments).result()


def attempt(model: str, case: str, options: argparse.Namespace) -> dict[str, Any] | None:
    load, start = os.getloadavg()[0], time.monotonic()
    try:
        figures = apart(measure_phm, options) if (model, case) == PHM else apart(measure, model, case, options)
    except Exception as error:  # a peer that fails is named, and the others go on
        print(f"{model} {case}: {type(error).__name__}: {error}", file=sys.stderr)
        return None
    return {**figures, "load": round(load, 2), "seconds": round(time.monotonic() - start, 1)}


class Journal:
    """What has been measured, one line of JSON each, so that a run that is cut loses no more than one measurement."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.path: Path = options.journal
        self.settings = settings_of(options)
        if options.fresh:
            self.path.unlink(missing_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        known = [line for line in map(parsed, lines) if line and line["settings"] == self.settings]
        self.figures: Figures = {(k["model"], k["case"], k["round"]): k["figures"] for k in known}

    def add(self, model: str, case: str, number: int, figures: Any) -> None:
        self.figures[model, case, number] = figures
        line = {"model": model, "case": case, "round": number, "settings": self.settings, "figures": figures}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def parsed(line: str) -> Any:
    """A line of the journal; the last one may have been cut off."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What a figure depends on, but for the noise."""
    import hf_modular

    code = [Path(__file__), *sorted((Path(hf_modular.__file__).parent / "adapters").glob("*.py"))]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in code)).hexdigest()
    about = {"steps": options.steps, "device": device_name(options.device), "code": digest[:16]}
    return about | {name: version(name) for name in ("torch", "peft", "transformers")}


def planned(options: argparse.Namespace) -> list[Step]:
    """All measurements in their order. Interleaved: a slow minute of the machine hits every case."""
    cases = [(model, c) for model in options.models for c in CASES[model] if in_use(c, options)]
    return [(*case, number) for number in range(options.rounds) for case in [*cases, PHM]]


def in_use(case: str, options: argparse.Namespace) -> bool:
    return not options.only or case in options.only or case == "lora"


def carry_out(plan: list[Step], journal: Journal, options: argparse.Namespace) -> None:
    """Measure what is not in the journal yet, until the time is over."""
    end = time.monotonic() + 60 * options.minutes
    left = [step for step in plan if step not in journal.figures]
    for done, (model, case, number) in enumerate(left):
        if time.monotonic() > end:
            print(f"{len(left) - done} of {len(plan)} measurements are left; run again to go on.", file=sys.stderr)
            return
        if figures := attempt(model, case, options):
            journal.add(model, case, number, figures)
            print(f"{done + 1}/{len(left)} {model} {case}: {figures['seconds']} s", file=sys.stderr)


def rows_of(model: str, figures: Figures, options: argparse.Namespace) -> list[dict[str, Any]]:
    def rounds(case: str) -> list[Any]:
        return [figures.get((model, case, number)) for number in range(options.rounds)]

    rows = [summary(model, case, rounds(case), rounds("lora")) for case in CASES[model] if in_use(case, options)]
    return [row for row in rows if row]


def summary(name: str, case: str, figures: list[Any], lora: list[Any]) -> dict[str, Any] | None:
    pairs = [(f, base) for f, base in zip(figures, lora, strict=True) if f and base]
    if not pairs:
        return None
    row: dict[str, Any] = {"model": name, "method": case, "trainable": pairs[0][0]["trainable"], "rounds": len(pairs)}
    for key in COLUMNS:
        ratios = [f[key] / (base[key] if key in RATIOS else 1) for f, base in pairs if key in f]
        if ratios:
            row[key] = round(statistics.median(ratios), 3)
            row[f"{key}_range"] = [round(bound(ratios), 3) for bound in (min, max)]
    return row


def phm_of(figures: Figures, options: argparse.Namespace) -> dict[str, Any]:
    """The medians over the rounds of what `measure_phm` gives."""
    found = [figures[(*PHM, number)] for number in range(options.rounds) if (*PHM, number) in figures]
    ways = {way: parts for way, parts in (found or [{}])[0].items() if isinstance(parts, dict)}
    return {way: {part: statistics.median(f[way][part] for f in found) for part in ways[way]} for way in ways}


def device_name(device: str) -> str:
    import torch

    if device != "cpu":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def results(journal: Journal, options: argparse.Namespace) -> dict[str, Any]:
    figures = journal.figures
    taken = [figures[step] for step in planned(options) if step in figures]
    about = {
        "cores": os.cpu_count(),
        "threads": 1,
        "highest load average": max((f["load"] for f in taken), default=None),
        "minutes measured": round(sum(f["seconds"] for f in taken) / 60, 1),
    }
    rows = [row for model in options.models for row in rows_of(model, figures, options)]
    settings = {"rounds": options.rounds, **journal.settings}
    return {"machine": about, "settings": settings, "rows": rows, "phm": phm_of(figures, options)}


def parse() -> argparse.Namespace:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=lambda s: s.split(","), default=list(CASES))
    parser.add_argument("--only", type=lambda s: s.split(","), default=None, help="these methods, and LoRA")
    parser.add_argument("--quick", action="store_true", help="one round of fewer steps; the figures are rough")
    parser.add_argument("--rounds", type=int, default=None, help="3, or 1 if quick")
    parser.add_argument("--steps", type=int, default=None, help="timed steps of a case: 4, or 2 if quick")
    parser.add_argument("--minutes", type=float, default=20, help="after these, nothing new is begun")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cpu", type=int, default=None, help="the core to run on; the last one if not given")
    parser.add_argument("--journal", type=Path, default=HERE.parent / ".peers" / "adapters.jsonl", help="what is done")
    parser.add_argument("--fresh", action="store_true", help="measure anew what the journal has")
    parser.add_argument("--output", type=Path, help="a folder; benchmarks/results, or the journal's if quick")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.steps = options.steps or (2 if options.quick else 4)
    options.output = options.output or (options.journal.parent if options.quick else HERE / "results")
    if options.cpu is None and hasattr(os, "sched_getaffinity"):
        options.cpu = max(os.sched_getaffinity(0))
    return options


def main() -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    options = parse()
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    journal = Journal(options)
    carry_out(planned(options), journal, options)
    from adapters_report import write

    print(write(results(journal, options), COLUMNS, OURS, options.output))


if __name__ == "__main__":
    main()
