"""What it takes to hold many adapters at once: MoS, whose layers share their parameters, beside LoRA.

    OMP_NUM_THREADS=1 python benchmarks/many_adapters.py [--adapters 100] [--hidden 1024] [--layers 8]

Each setting is measured in a process of its own, on a random Llama with all seven kinds of linear layers adapted.
`tensors` counts the bytes of the distinct storages that the adapters hold, parameters and indices; `memory` is what
the resident memory of the process rose by, with everything that Python and PEFT keep beside the tensors. The paper of
MoS reports the quality of LoRA at rank 64 for MoS at a budget of 8, and with a budget of 2 a quality between those of
LoRA at ranks 2 and 16: LoRA at ranks 8 and 16 stands beside a budget of 2 here, and LoRA at rank 64 beside one of 8.
"""

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = ["lora r=8", "lora r=16", "mos budget=2", "lora r=64", "mos budget=8"]
COMPARED = [("mos budget=2", "lora r=8"), ("mos budget=2", "lora r=16"), ("mos budget=8", "lora r=64")]
MB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of many adapters that are held at once.")
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--setting", choices=SETTINGS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.setting:
        print(json.dumps(measured(options)))
        return
    found = {setting: _in_a_process(setting, options) for setting in SETTINGS}
    write(found, options)
    print(report(found, options.adapters))


def write(found: dict[str, dict[str, int]], options: argparse.Namespace) -> None:
    """`many_adapters.json` and `many_adapters.md`."""
    settings = {name: getattr(options, name) for name in ("adapters", "hidden", "layers")}
    versions = {name: version(name) for name in ("torch", "peft", "transformers")}
    options.output.mkdir(exist_ok=True, parents=True)
    text = json.dumps({"settings": settings | versions, "bytes": found}, indent=1)
    (options.output / "many_adapters.json").write_text(text + "\n", encoding="utf-8")
    (options.output / "many_adapters.md").write_text(report(found, options.adapters) + "\n", encoding="utf-8")


def _in_a_process(setting: str, options: argparse.Namespace) -> dict[str, int]:
    sizes = [f"--{name}={getattr(options, name)}" for name in ("adapters", "hidden", "layers")]
    command = [sys.executable, __file__, *sizes, "--setting", setting]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured(options: argparse.Namespace) -> dict[str, int]:
    import torch
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": options.hidden, "intermediate_size": 8 * options.hidden // 3 // 64 * 64}
    config = LlamaConfig(**sizes, num_hidden_layers=options.layers, num_attention_heads=8, vocab_size=1000)
    torch.manual_seed(0)
    model, make = LlamaForCausalLM(config).requires_grad_(False), _config(options.setting)
    model = get_peft_model(model, make(), "adapter_0")  # and what is imported and made for all of them
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    before = _resident()
    for i in range(1, options.adapters + 1):
        model.add_adapter(f"adapter_{i}", make())
    memory = _resident() - before
    model.delete_adapter("adapter_0")
    return {"trained": trained, "tensors": _tensors(model), "memory": memory}


def _config(setting: str) -> Callable[[], Any]:
    from peft import LoraConfig

    from hf_modular import MoSConfig

    name, _, size = setting.partition(" ")
    number = int(size.partition("=")[2])
    if name == "lora":
        return lambda: LoraConfig(r=number, target_modules=TARGETS)
    return lambda: MoSConfig(budget_r=number, r=4 * number, target_modules=TARGETS)


def _resident() -> int:
    """The resident memory of this process, in bytes."""
    gc.collect()
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def _tensors(model: Any) -> int:
    """The bytes of what the adapters hold; what several of their layers share counts once."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    storages = [tensor.untyped_storage() for name, tensor in named if "lora_" in name or "hfm_" in name]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def report(found: dict[str, dict[str, int]], count: int) -> str:
    lines = [f"| {count} adapters | parameters of each | tensors MB | memory MB |", "| --- | ---: | ---: | ---: |"]
    for setting, numbers in found.items():
        tensors, memory = (f"{numbers[key] / MB:,.0f}" for key in ("tensors", "memory"))
        lines.append(f"| {setting} | {numbers['trained']:,} | {tensors} | {memory} |")
    lines += ["", "| | tensors | memory |", "| --- | ---: | ---: |"]
    for ours, theirs in COMPARED:
        ratios = (f"{found[ours][key] / found[theirs][key]:.3f}" for key in ("tensors", "memory"))
        lines.append(f"| {ours} over {theirs} | {' | '.join(ratios)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
