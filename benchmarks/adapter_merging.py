"""Merging LoRA adapters by the SVD beside PEFT, and serving many tasks from one RMM adapter beside many LoRA adapters.

    OMP_NUM_THREADS=1 python benchmarks/adapter_merging.py            # all, about three minutes
    OMP_NUM_THREADS=1 python benchmarks/adapter_merging.py --sizes 1024 --tasks 8

CPU seconds of one thread. The two sides of a row take turns, and a ratio is the median of those of the turns; the SVD
of a large matrix, which takes PEFT a minute, is run once. `off` is the relative distance of a result from the best of
its rank, which is found in double precision. Tables and figures go to `benchmarks/results/adapter_merging.*`.
"""

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from hf_modular import TaskArithmeticConfig, merge_adapters
from hf_modular.adapters import RMM, RMMAdapterConfig

RESULTS = Path(__file__).resolve().parent / "results" / "adapter_merging.json"
ADAPTERS, RANK = 4, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTH = 32  # tokens of a sample
WEIGHTS = [0.4, 0.3, 0.2, 0.1]
P = (1, 2, 4)


def seconds(function: Callable[[], object]) -> float:
    start = time.thread_time()
    function()
    return time.thread_time() - start


def turns(ours: Callable[[], object], theirs: Callable[[], object], times: int) -> dict[str, float]:
    """The medians of both, and of the ratio of theirs to ours."""
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(times)]
    return {
        "ours": statistics.median(a for a, _ in pairs),
        "peft": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
    }


# -- merging by the SVD --------------------------------------------------------------------------------------------


def merging(size: int, times: int) -> dict[str, float]:
    """Four LoRA adapters of one square layer into one of their rank."""
    model = one_layer(size)
    names, counter = [*model.peft_config], iter(range(1000))

    def ours() -> str:
        name = f"ours{next(counter)}"
        merge_adapters(
            model, names, TaskArithmeticConfig(), weights=WEIGHTS, rank=RANK, adapter_name=name, warn_above=9
        )
        return name

    def theirs() -> str:
        name = f"peft{next(counter)}"
        model.add_weighted_adapter(names, WEIGHTS, name, combination_type="svd", svd_rank=RANK)
        return name

    ours()  # the first call of anything is slow
    figures = turns(ours, theirs, times)
    last = max(int(name[4:]) for name in model.peft_config if name.startswith("peft"))
    best = best_distance(model, names)
    for side, name in {"ours": f"ours{last - 1}", "peft": f"peft{last}"}.items():
        figures[f"{side} off"] = distance(model, names, name) - best
    return {"size": size, **figures}


def one_layer(size: int) -> PeftModel:
    torch.manual_seed(0)
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(size, size, bias=False))
    base = base.to_empty(device="cpu")
    model = get_peft_model(base, lora(["0"]), "0")
    for i in range(1, ADAPTERS):
        model.add_adapter(str(i), lora(["0"]))
    move(model)
    return model


def lora(targets: list[str]) -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)


def factors(model: PeftModel, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    layer = model.base_model.model[0]
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    return B.detach().double() * layer.scaling[name], A.detach().double()


def wanted(model: PeftModel, names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [factors(model, name) for name in names]
    return torch.cat([w * B for w, (B, _) in zip(WEIGHTS, pairs, strict=True)], 1), torch.cat([A for _, A in pairs])


def distance(model: PeftModel, names: list[str], merged: str) -> float:
    """‖merged - Σ wᵢ Bᵢ Aᵢ‖ / ‖Σ wᵢ Bᵢ Aᵢ‖."""
    (B, A), (up, down) = wanted(model, names), factors(model, merged)
    return norm(torch.cat([B, -up], 1), torch.cat([A, down])) / norm(B, A)


def best_distance(model: PeftModel, names: list[str]) -> float:
    B, A = wanted(model, names)
    S = torch.linalg.svdvals(torch.linalg.qr(B).R @ torch.linalg.qr(A.t()).R.t())
    return float((S[RANK:].square().sum() / S.square().sum()).sqrt())


def norm(B: torch.Tensor, A: torch.Tensor) -> float:
    return float((B.t() @ B * (A @ A.t())).sum().clamp_min(0).sqrt())


# -- serving tasks -------------------------------------------------------------------------------------------------


def serving(tasks: int, times: int) -> list[dict[str, float]]:
    """One RMM adapter of many tasks, beside as many LoRA adapters in PEFT."""
    base, names = llama(), [f"task{i}" for i in range(tasks)]
    theirs = get_peft_model(copy.deepcopy(base), lora(TARGETS), names[0])
    for name in names[1:]:
        theirs.add_adapter(name, lora(TARGETS))
    move(theirs)
    theirs.eval()
    return [one_p(base, theirs, names, p, times) for p in P]


def one_p(base: nn.Module, theirs: PeftModel, names: list[str], p: int, times: int) -> dict[str, float]:
    config = RMMAdapterConfig(
        tasks=names, r=RANK, p=p, target_modules=TARGETS, init_weights=False, inference_mode=True
    )
    ours = get_peft_model(copy.deepcopy(base), config).eval()
    held = {"ours": numbers(ours, "hfm_rmm_") + kept(ours), "peft": numbers(theirs, "lora_")}
    row: dict[str, float] = {"tasks": len(names), "p": p}
    row |= {f"MB {side}": 4 * count / 1e6 for side, count in held.items()}
    row |= measured(
        "switch", turns(lambda: switch(partial(use, ours), names), lambda: switch(theirs.set_adapter, names), 3)
    )
    cases = {
        "one token": (samples(1, 1), None),
        "one sample": (samples(1), None),
        "batch of 8": (samples(8), None),
        "8 mixed": (samples(8), [names[i % len(names)] for i in range(8)]),
        "8 mixed tokens": (samples(8, 1), [names[i % len(names)] for i in range(8)]),
    }
    for case, (tokens, each) in cases.items():
        run = partial(forward, tokens=tokens, more={} if each is None else {"adapter_names": each})
        row |= measured(case, turns(partial(run, ours), partial(run, theirs), times))
    return row


def measured(what: str, figures: dict[str, float]) -> dict[str, float]:
    return {f"{what} {key}": value for key, value in figures.items()}


def use(model: PeftModel, task: str) -> None:
    model.set_task(task)
    kept(model)  # which else the first token would build


def switch(function: Callable[[str], object], names: list[str]) -> None:
    for name in names[:8]:
        function(name)


@torch.no_grad()
def forward(model: nn.Module, tokens: torch.Tensor, more: dict[str, list[str]]) -> None:
    model(input_ids=tokens, use_cache=False, **more)


def numbers(model: nn.Module, part: str) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if part in name)


def kept(model: nn.Module) -> int:
    """The numbers of the task in use, whose factors are there beside what all tasks have in common."""
    factors = [adapter.factors() for adapter in model.modules() if isinstance(adapter, RMM)]
    return sum(up.numel() + down.numel() for up, _, down in factors)


def samples(count: int, length: int = LENGTH) -> torch.Tensor:
    return torch.arange(count * length).reshape(count, length) % 4096


def llama() -> nn.Module:
    """About 25 million parameters."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 6}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=4096, **sizes)).eval()


# -- the tables ----------------------------------------------------------------------------------------------------


def merging_table(rows: list[dict[str, float]]) -> str:
    lines = [
        f"Four LoRA adapters of rank {RANK} on one square layer, merged into one of rank {RANK}.",
        "",
        "| size | CPU s | PEFT's CPU s | times faster | off | PEFT's off |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = [f"{row['ours']:.3f}", f"{row['peft']:.2f}", f"{row['ratio']:,.0f}"]
        lines.append(line([f"{row['size']:.0f}", *times, f"{row['ours off']:.0e}", f"{row['peft off']:.0e}"]))
    return "\n".join(lines)


def serving_table(rows: list[dict[str, float]]) -> str:
    cases = ["switch", "one token", "one sample", "batch of 8", "8 mixed", "8 mixed tokens"]
    lines = [
        f"One RMM adapter of rank {RANK} on all linear layers of a Llama of 25 million parameters, beside as many",
        f"LoRA adapters in PEFT; milliseconds of CPU time, RMM's / PEFT's. A sample has {LENGTH} tokens.",
        "In a mixed batch each sample, or token, is for another task. RMM's MB count the factors of the task in use,",
        "which a switch builds.",
        "",
        line(["tasks", "p", "MB", *(f"{case}" for case in cases)]),
        "|" + "---|" * (3 + len(cases)),
    ]
    for row in rows:
        sizes = f"{row['MB ours']:.1f} / {row['MB peft']:.1f}"
        scale = {"switch": 1e3 / 8}
        times = [" / ".join(f"{row[f'{c} {s}'] * scale.get(c, 1e3):.3g}" for s in ("ours", "peft")) for c in cases]
        lines.append(line([f"{row['tasks']:.0f}", f"{row['p']:.0f}", sizes, *times]))
    return "\n".join(lines)


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1024, 4096])
    parser.add_argument("--tasks", type=int, nargs="*", default=[8, 64])
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file; the table goes beside it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = {
        "merging": [merging(size, 1 if size > 2048 else 3) for size in options.sizes],
        "serving": [row for tasks in options.tasks for row in serving(tasks, 5)],
    }
    text = f"{merging_table(found['merging'])}\n\n{serving_table(found['serving'])}\n"
    print(text)
    options.output.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    options.output.with_suffix(".md").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
