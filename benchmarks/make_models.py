"""Write a Llama of about 0.55 billion parameters in bf16 and fine-tunes of it, to measure merges on.

    python benchmarks/make_models.py FOLDER               # base, three models and their Fisher files of 1.1 GB each
    python benchmarks/make_models.py FOLDER --layers 4    # a smaller one

The weights are random: base N(0, 0.02), each fine-tune moved by N(0, 0.001), which is what a merge sees of a real one.
Fisher information is the square of a normal variable.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

SHARD = 400 * 10**6  # bytes


def shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, in the order of its layers."""
    h, m = config.hidden_size, config.intermediate_size
    block = {f"self_attn.{name}_proj.weight": (h, h) for name in "qkvo"}
    block |= {"mlp.gate_proj.weight": (m, h), "mlp.up_proj.weight": (m, h), "mlp.down_proj.weight": (h, m)}
    block |= {"input_layernorm.weight": (h,), "post_attention_layernorm.weight": (h,)}
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, h)}
    for layer in range(config.num_hidden_layers):
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return found | {"model.norm.weight": (h,), "lm_head.weight": (config.vocab_size, h)}


def tensor(index: int, shape: tuple[int, ...], model: int) -> torch.Tensor:
    """The base's tensor for model 0, else that of a fine-tune; the same in every run."""
    base = torch.randn(shape, generator=torch.Generator().manual_seed(index)) * 0.02
    if model:
        base += torch.randn(shape, generator=torch.Generator().manual_seed(index + 10_000 * model)) * 0.001
    return base.to(torch.bfloat16)


def fisher(index: int, shape: tuple[int, ...], model: int) -> torch.Tensor:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(index + 20_000 * model)) * 0.01
    return gradient.square_().to(torch.bfloat16)


def write_model(folder: Path, config: LlamaConfig, tensor: Callable[[int, tuple[int, ...]], torch.Tensor]) -> None:
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    shards, size = [{}], 0
    for index, (name, shape) in enumerate(shapes(config).items()):
        value = tensor(index, shape)
        if size + value.nbytes > SHARD:
            shards, size = [*shards, {}], 0
        shards[-1][name] = value
        size += value.nbytes
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, folder / file, metadata={"format": "pt"})
    where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    total = sum(value.nbytes for shard in shards for value in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--models", type=int, default=3)
    options = parser.parse_args()
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=options.layers,
        num_attention_heads=12,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    for model in range(options.models + 1):
        write_model(options.folder / ("base" if model == 0 else f"model{model}"), config, partial(tensor, model=model))
    for model in range(1, options.models + 1):
        write_model(options.folder / f"fisher{model}", config, partial(fisher, model=model))


if __name__ == "__main__":
    main()
