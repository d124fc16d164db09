"""What a training step of each adapter costs, beside PEFT's own methods on the same targets.

    python benchmarks/adapters.py                 # all cases, about twenty minutes on one core
    python benchmarks/adapters.py --models llama --rounds 3 --only lora,hut_tile

Every case runs in a process of its own on one pinned core; the cases are interleaved over several rounds, and a
method's figure is the median over the rounds of its ratio to LoRA's in the same round. A step is forward, backward
and AdamW. `saved` counts the bytes of distinct storages that autograd keeps for backward; `peak` is what the
process's resident memory rose by. `decode` is one token of generation at batch 1 with the adapter active and
`merged` the same after merging. On a GPU (`--device cuda`) peak is the allocator's and nothing is pinned.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BERT_TARGETS = ["query", "key", "value", "dense"]
CONV_TARGETS = r".*(dwconv|pwconv1|pwconv2|layernorm|patch_embeddings|downsampling_layer\.\d)"
LINEAR_CASES = [
    "lora",
    "hut_tile",
    "hut_row_column",
    "hut_low_rank",
    "ssf",
    "mos",
    "flora",
    "compacter",
    "hira",
    "vera",
    "vblora",
    "ia3",
    "oft",
    "hra",
    "miss",
    "road",
    "dora",
    "full",
]
CASES = {"llama": LINEAR_CASES, "bert": LINEAR_CASES, "convnext": ["lora", "ssf", "flora", "hut_tile", "loha", "full"]}


def make_config(case: str, targets):
    """The config of a case; PEFT's methods at the settings of their documentation, rank 8 where there is one."""
    import peft

    import hf_modular

    t = {"target_modules": targets}
    makers = {
        "lora": lambda: peft.LoraConfig(r=8, lora_alpha=16, **t),
        "dora": lambda: peft.LoraConfig(r=8, lora_alpha=16, use_dora=True, **t),
        "hira": lambda: peft.HiraConfig(r=8, **t),
        "vera": lambda: peft.VeraConfig(r=256, **t),
        "vblora": lambda: peft.VBLoRAConfig(r=4, num_vectors=256, vector_length=128, **t),
        "ia3": lambda: peft.IA3Config(feedforward_modules=[], **t),
        "oft": lambda: peft.OFTConfig(oft_block_size=32, **t),
        "hra": lambda: peft.HRAConfig(r=8, **t),
        "miss": lambda: peft.MissConfig(r=64, **t),
        "road": lambda: peft.RoadConfig(**t),
        "loha": lambda: peft.LoHaConfig(r=8, **t),
        "hut_tile": lambda: hf_modular.HUTConfig(r=8, form="tile", **t),
        "hut_row_column": lambda: hf_modular.HUTConfig(r=8, form="row_column", **t),
        "hut_low_rank": lambda: hf_modular.HUTConfig(r=8, form="low_rank", **t),
        "ssf": lambda: hf_modular.SSFConfig(**t),
        "mos": lambda: hf_modular.MoSConfig(budget_r=2, r=8, **t),
        "flora": lambda: hf_modular.FLoRAConfig(r=8, **t),
        "compacter": lambda: hf_modular.CompacterConfig(reduction_factor=32, **t),
    }
    return makers[case]()


def make_model(name: str):
    """(model, batch, targets) of about 25 million parameters and a realistic number of tokens."""
    import torch
    import transformers as tf

    torch.manual_seed(0)
    if name == "llama":
        config = tf.LlamaConfig(
            vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=6
        )
        ids = torch.randint(0, 4096, (4, 128))
        return tf.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}, LLAMA_TARGETS
    if name == "bert":
        config = tf.BertConfig(
            vocab_size=8192, hidden_size=448, intermediate_size=1792, num_hidden_layers=9, num_attention_heads=7
        )
        batch = {"input_ids": torch.randint(0, 8192, (8, 64)), "labels": torch.randint(0, 2, (8,))}
        return tf.BertForSequenceClassification(config), batch, BERT_TARGETS
    config = tf.ConvNextConfig(hidden_sizes=[80, 160, 320, 640], depths=[3, 3, 9, 3], image_size=64, num_labels=10)
    batch = {"pixel_values": torch.randn(8, 3, 64, 64), "labels": torch.randint(0, 10, (8,))}
    return tf.ConvNextForImageClassification(config), batch, CONV_TARGETS


def adapted(case: str, model, targets):
    if case == "full":
        return model
    from peft import get_peft_model

    return get_peft_model(model, make_config(case, targets))


def measure(name: str, case: str, device: str, steps: int) -> dict[str, float]:
    """One case, in this process."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    model, batch, targets = make_model(name)
    model = adapted(case, model.to(device), targets).train()
    batch = {key: value.to(device) for key, value in batch.items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    saved = saved_bytes(model, batch)
    before = resident() if device == "cpu" else 0
    times = []
    for _ in range(steps):
        start = now(device)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(now(device) - start)
    peak = (resident(peak=True) - before) if device == "cpu" else torch.cuda.max_memory_allocated()
    figures = {
        "step": min(times[1:]),
        "saved": saved,
        "peak": peak,
        "trainable": sum(p.numel() for p in trained),
    }
    return figures | (decoding(model, batch, case, device) if name == "llama" and case != "full" else {})


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


def saved_bytes(model, batch) -> int:
    """The bytes of distinct storages that autograd keeps for backward, parameters left out."""
    import torch

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    del loss
    return sum(kept.values())


def decoding(model, batch, case: str, device: str) -> dict[str, float]:
    import torch

    def one_token() -> float:
        with torch.no_grad():
            cache = model(input_ids=batch["input_ids"][:1, :16], use_cache=True).past_key_values
            times = []
            for _ in range(12):
                start = now(device)
                model(input_ids=batch["input_ids"][:1, :1], past_key_values=cache, use_cache=True)
                times.append(now(device) - start)
        return min(times)

    model.eval()
    figures = {"decode": one_token()}
    try:
        model.merge_adapter()
    except (ValueError, AttributeError, NotImplementedError):
        return figures  # a method that cannot be merged
    return figures | {"merged": one_token()}


def run_case(name: str, case: str, options: argparse.Namespace) -> dict[str, float] | None:
    command = [sys.executable, __file__, "--one", f"{name}:{case}", "--device", options.device]
    command += ["--steps", str(options.steps)]
    if options.device == "cpu" and options.cpu is not None:
        command = ["taskset", "-c", str(options.cpu), *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        print(f"{name} {case}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def run(options: argparse.Namespace) -> list[dict]:
    rows = []
    for name in options.models:
        cases = [c for c in CASES[name] if not options.only or c in options.only or c == "lora"]
        rounds = {case: [] for case in cases}
        for _ in range(options.rounds):  # interleaved: a slow minute of the machine hits every case
            for case in cases:
                rounds[case].append(run_case(name, case, options))
        rows += [row for case in cases if (row := summary(name, case, rounds[case], rounds["lora"]))]
    return rows


def summary(name: str, case: str, figures: list, lora: list) -> dict | None:
    pairs = [(f, base) for f, base in zip(figures, lora, strict=True) if f and base]
    if not pairs:
        return None
    row = {"model": name, "method": case, "trainable": pairs[0][0]["trainable"]}
    for key in ("step", "saved", "peak", "decode", "merged"):
        ratios = [f[key] / base[key] for f, base in pairs if key in f and base.get(key)]
        if ratios:
            row[key] = statistics.median(ratios)
            row[f"{key}_range"] = [min(ratios), max(ratios)]
    return row


def table(rows: list[dict]) -> str:
    head = "| model | method | trainable | step | saved | peak | decode | merged |\n|---|---|---|---|---|---|---|---|"
    lines = [
        f"| {r['model']} | {r['method']} | {r['trainable']:,} | "
        + " | ".join(f"{r[k]:.2f}" if k in r else "-" for k in ("step", "saved", "peak", "decode", "merged"))
        + " |"
        for r in rows
    ]
    return "\n".join([head, *lines])


def chart(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ours = {"hut_tile", "hut_row_column", "hut_low_rank", "ssf", "mos", "flora", "compacter"}
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(5 * len(models), 5), squeeze=False, layout="constrained")
    for axis, model in zip(axes[0], models, strict=True):
        mine = sorted((r for r in rows if r["model"] == model), key=lambda r: r["step"])
        colours = ["#d1495b" if r["method"] in ours else "#8d99ae" for r in mine]
        axis.barh([r["method"] for r in mine], [r["step"] for r in mine], color=colours)
        axis.axvline(1.0, color="#2b2d42", linewidth=1)
        axis.set(title=model, xlabel="training step, LoRA r=8 is 1 (red: this library)")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=lambda s: s.split(","), default=list(CASES))
    parser.add_argument("--only", type=lambda s: s.split(","), default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu", type=int, default=None, help="pin every process to this core")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, case = options.one.split(":")
        print(json.dumps(measure(name, case, options.device, options.steps)))
        return
    rows = run(options)
    options.output.mkdir(exist_ok=True, parents=True)
    (options.output / "adapters.json").write_text(json.dumps(rows, indent=1) + "\n")
    (options.output / "adapters.md").write_text(table(rows) + "\n")
    chart(rows, options.output / "adapters.png")
    print(table(rows))


if __name__ == "__main__":
    main()
