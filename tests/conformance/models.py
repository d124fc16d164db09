"""Tiny random models under the names that PEFT's tests load from the Hub, laid out as a Hub cache.

The tests then load them as they would load the real ones, offline. The weights are larger than transformers' usual
start, so that the sides of a comparison differ by more than the tolerances of the tests.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    ConvNextImageProcessorPil,
    DebertaConfig,
    DebertaModel,
    DebertaV2Config,
    DebertaV2Model,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    ResNetConfig,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

COMMIT = "0" * 40
WORDS = {"vocab_size": 128}
ENDS = {"bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 4}  # PEFT's beam search test strips eos as padding
BERT = {
    **WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
LLAMA = {**BERT, **ENDS, "num_key_value_heads": 2, "head_dim": 8}
# DeBERTa's attention reads positions from a table that it shares between the layers
DEBERTA = {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
T5_SIZES = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, "initializer_factor": 3.0}
BART_SIZES = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 4,
    "decoder_ffn_dim": 4,
    "max_position_embeddings": 64,
    "init_std": 0.3,
}


def _opt() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 4, "num_hidden_layers": 2, "init_std": 0.3}
    return OPTForCausalLM(OPTConfig(**WORDS, **ENDS, **sizes, num_attention_heads=4, max_position_embeddings=64))


def _gpt(config: type[GPT2Config | GPTJConfig], model: type[PreTrainedModel], **sizes: int) -> PreTrainedModel:
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
    return model(config(**WORDS, **ENDS, **shape, **sizes))


def _gemma() -> PreTrainedModel:
    return Gemma3ForCausalLM(Gemma3TextConfig(**LLAMA, sliding_window=16, query_pre_attn_scalar=8))


def _bart() -> PreTrainedModel:
    tokens = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "decoder_start_token_id": 2}
    return BartForConditionalGeneration(BartConfig(**WORDS, **tokens, **BART_SIZES, forced_eos_token_id=None))


def _t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(T5Config(**WORDS, **T5_SIZES, decoder_start_token_id=0))


def _classifier(config: Any) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_config(config)


def _resnet() -> PreTrainedModel:
    sizes = {"embedding_size": 10, "hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 2, 1], "num_labels": 3}
    return AutoModelForImageClassification.from_config(ResNetConfig(**sizes, layer_type="basic"))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": _opt,
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": lambda: _gpt(GPT2Config, GPT2LMHeadModel),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": lambda: _gpt(GPTJConfig, GPTJForCausalLM, rotary_dim=4),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "peft-internal-testing/tiny-dummy-qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA)),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": _gemma,
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": _t5,
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": _bart,
    "peft-internal-testing/tiny-random-BertModel": lambda: BertModel(BertConfig(**BERT)),
    "peft-internal-testing/tiny-random-RobertaModel": lambda: RobertaModel(RobertaConfig(**BERT)),
    "peft-internal-testing/tiny-random-DebertaModel": lambda: DebertaModel(DebertaConfig(**DEBERTA)),
    "peft-internal-testing/tiny-random-DebertaV2Model": lambda: DebertaV2Model(DebertaV2Config(**DEBERTA)),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": lambda: _classifier(BertConfig(**BERT)),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": lambda: _classifier(RobertaConfig(**BERT)),
    "bert-base-uncased": lambda: _classifier(BertConfig(**BERT)),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": lambda: LlamaForSequenceClassification(
        LlamaConfig(**LLAMA, num_labels=1)
    ),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": _resnet,
}
LORA_ADAPTER = ("peft-internal-testing/tiny-opt-lora-revision", "test")  # read by the tests of the configs


def make_hub_cache(cache: Path) -> None:
    """Fill `cache` with the models, unless it holds them as this file and the installed transformers make them."""
    digest = hashlib.sha256(Path(__file__).read_bytes() + transformers.__version__.encode()).hexdigest()
    stamp = cache / "made-from"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == digest:
        return
    shutil.rmtree(cache, ignore_errors=True)
    for name, make in MODELS.items():
        torch.manual_seed(0)
        make().save_pretrained(_snapshot(cache, name, "main"))
    resnet = "peft-internal-testing/tiny-random-ResNetForImageClassification"
    ConvNextImageProcessorPil(size={"shortest_edge": 64}).save_pretrained(_snapshot(cache, resnet, "main"))
    adapter = {
        "peft_type": "LORA",
        "base_model_name_or_path": next(iter(MODELS)),
        "r": 8,
        "target_modules": ["q_proj"],
    }
    path = _snapshot(cache, *LORA_ADAPTER) / "adapter_config.json"
    path.write_text(json.dumps(adapter), encoding="utf-8")
    stamp.write_text(digest, encoding="utf-8")


def _snapshot(cache: Path, name: str, revision: str) -> Path:
    """The folder of a repository's files in a Hub cache, with the reference that leads to it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / revision
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(COMMIT, encoding="utf-8")
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True, exist_ok=True)
    return snapshot
