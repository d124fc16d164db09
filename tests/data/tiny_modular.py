"""Small models of several modules, such as an encoder and a decoder, for our tests and for mergekit alike."""

import json
from pathlib import Path
from zlib import crc32

import tiny_mistrals
import torch
import transformers
from safetensors.torch import load_file, save_file

TEXT = {"hidden_size": 8, "intermediate_size": 6, "num_attention_heads": 2, "num_hidden_layers": 3}
VISION = {"hidden_size": 8, "intermediate_size": 6, "patch_size": 4}
T5 = {
    "d_model": 4,
    "d_kv": 4,
    "d_ff": 6,
    "num_heads": 1,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
}
T5 |= {"num_layers": 12, "num_decoder_layers": 12, "tie_word_embeddings": False, "eos_token_id": 2}
WIDE = {
    f"{side}_{key}": value
    for side in ("encoder", "decoder")
    for key, value in (("attention_heads", 2), ("ffn_dim", 6))
}
BART = {"d_model": 8, "encoder_layers": 2, "decoder_layers": 3, "max_position_embeddings": 16, **WIDE}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
QWEN = {
    "text_config": {**TEXT, "num_key_value_heads": 1, "head_dim": 8, "rope_parameters": ROPE},
    "vision_config": {
        **VISION,
        "depth": 4,
        "num_heads": 2,
        "out_hidden_size": 8,
        "deepstack_visual_indexes": [0, 1, 2],
        "num_position_embeddings": 16,
    },
}
CLIP = {
    "text_config": TEXT,
    "vision_config": {**VISION, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 8},
    "projection_dim": 4,
}
KINDS = {
    "T5ForConditionalGeneration": T5,
    "BartForConditionalGeneration": BART,
    "Qwen3VLForConditionalGeneration": QWEN,
    "CLIPModel": CLIP,
}
NAMES = {
    "google/flan-t5-base": "T5ForConditionalGeneration",
    "philschmid/flan-t5-base-samsum": "T5ForConditionalGeneration",
    "facebook/bart-base": "BartForConditionalGeneration",
    "me/bart-base-law": "BartForConditionalGeneration",
    "Qwen/Qwen3-VL-2B-Instruct": "Qwen3VLForConditionalGeneration",
    "me/qwen3-vl-law": "Qwen3VLForConditionalGeneration",
}


def layers(model, first, end):
    return {"sources": [{"model": model, "layer_range": [first, end]}]}


def weighted(**models):
    return {"models": [{"model": name, "parameters": {"weight": weight}} for name, weight in models.items()]}


BARTS, QWENS = ([name for name, kind in NAMES.items() if kind.startswith(start)] for start in ("Bart", "Qwen"))
CASES = {  # what mergekit is asked beside examples/recipes
    "bart": {
        "model.encoder.layers": {"slices": [layers(BARTS[0], 0, 2), layers(BARTS[1], 1, 2)]},
        "model.decoder.layers": weighted(**{BARTS[0]: 0.25, BARTS[1]: 0.75}),
        "default": weighted(**{BARTS[1]: 1, BARTS[0]: 3}),
    },
    "qwen3_vl": {
        "text_decoder": {"slices": [layers(QWENS[0], 0, 2), layers(QWENS[1], 1, 3)]},
        "vision_tower": {"slices": [layers(QWENS[1], 0, 4), layers(QWENS[0], 3, 4)]},
        "multi_modal_projector": weighted(**{QWENS[0]: 0.5, QWENS[1]: 0.5}),
    },
}


def recipe(modules):
    return {"merge_method": "linear", "modules": modules, "parameters": {"weight": 1}, "dtype": "float32"}


def write(name, folder, kind=None, **settings):
    """A checkpoint that transformers loads, with numbers that depend on names alone."""
    kind = getattr(transformers, kind or NAMES[name])
    rows = {"vocab_size": len(tiny_mistrals.WORDS), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    content = {**KINDS[kind.__name__], **settings}
    nested = "text_config" in content
    content = content | ({"text_config": {**content["text_config"], **rows}} if nested else rows)
    kind(kind.config_class(**content)).save_pretrained(folder)
    tensors = load_file(Path(folder) / "model.safetensors")
    generator = torch.Generator()
    for key, tensor in tensors.items():
        tensor.copy_(torch.randn(tensor.shape, generator=generator.manual_seed(crc32(f"{name}/{key}".encode()))) / 4)
    save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    for file, held in tiny_mistrals.tokenizer_files(name).items():
        (Path(folder) / file).write_text(json.dumps(held))
