"""Small stand-ins for the public models that examples/recipes names, for our tests and for mergekit alike."""

import json
from pathlib import Path
from zlib import crc32

import torch
from safetensors.torch import save_file

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
BASE = "mistralai/Mistral-7B-v0.1"
WORDS = ["<unk>", "<s>", "</s>", *"abcdefgh", "ab", "cd"]
NEW_TOKENS = {"teknium/OpenHermes-2.5-Mistral-7B": ["<|im_end|>", "<|im_start|>"]}
NAMES = [
    BASE,
    "HuggingFaceH4/zephyr-7b-beta",
    "mistralai/Mistral-7B-Instruct-v0.1",
    "teknium/OpenHermes-2.5-Mistral-7B",
]
WIDTH, INNER, LAYERS = 4, 6, 32


def shapes(rows):
    of_layer = {f"self_attn.{part}_proj": (WIDTH, WIDTH) for part in "qkvo"} | {
        "mlp.gate_proj": (INNER, WIDTH),
        "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
        "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
    }
    yield from {"model.embed_tokens": (rows, WIDTH), "lm_head": (rows, WIDTH), "model.norm": (WIDTH,)}.items()
    for i in range(LAYERS):
        yield from ((f"model.layers.{i}.{part}", shape) for part, shape in of_layer.items())


def drawn(name, rows):
    generator = torch.Generator().manual_seed(crc32(name.encode()))
    return {f"{part}.weight": torch.randn(shape, generator=generator) for part, shape in shapes(rows)}


def weights(name):
    """The base's weights, and small changes to them."""
    words = [*WORDS, *NEW_TOKENS.get(name, [])]
    base, own = drawn(BASE, len(WORDS)), drawn(name, len(words))
    if name == BASE:
        return base
    for key, tensor in own.items():
        tensor *= 0.1
        tensor[: len(base[key])] += base[key]
    return own


def tokenizer(name):
    special = [*WORDS[:3], *NEW_TOKENS.get(name, [])]
    words = [*WORDS, *NEW_TOKENS.get(name, [])]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": words.index(token), "content": token, **flags} for token in special],
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "vocab": {word: i for i, word in enumerate(WORDS)},
            "merges": [["a", "b"], ["c", "d"]],
        },
    }


def tokenizer_files(name):
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>"}
    return {"tokenizer.json": tokenizer(name), "tokenizer_config.json": settings | {"eos_token": "</s>"}}


def write(name, folder):
    """A checkpoint that transformers loads."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = weights(name)
    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": len(tensors["lm_head.weight"]),
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    generation = {"bos_token_id": 1, "eos_token_id": 2}
    held = {"config.json": config, "generation_config.json": generation, **tokenizer_files(name)}
    for file, content in held.items():
        (folder / file).write_text(json.dumps(content))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def flat(tensors, vocabulary):
    """A result as one vector: the tensors by their names, the embeddings by their tokens."""
    rows = torch.tensor([row for _, row in sorted(vocabulary.items())])
    wide = {"model.embed_tokens.weight", "lm_head.weight", "shared.weight"}
    ordered = (tensor[rows] if name in wide else tensor for name, tensor in sorted(tensors.items()))
    return torch.cat([tensor.flatten().float() for tensor in ordered])
