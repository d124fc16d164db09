"""Adapters of every method, saved beside the tiny model that they were made on."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from adapters import tiny
from hf_modular.testing import AdapterCase

TASKS = {"llama": "CAUSAL_LM", "classifier": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}

# Layers of each kind that a family has: linear ones of every shape, convolutions, embeddings; and its norms.
LAYERS = {
    "llama": (["q_proj", "o_proj", "gate_proj", "down_proj"], ["input_layernorm", "norm"]),
    "gemma": (["k_proj", "down_proj"], ["post_attention_layernorm", "norm"]),
    "bert": (["query", "position_embeddings", "intermediate.dense", "pooler.dense"], ["output.LayerNorm"]),
    "gpt2": (["c_attn", "c_proj", "wpe"], ["ln_1", "ln_f"]),
    "t5": (["q", "wi", "wo"], ["layer_norm"]),
    "vit": (["projection", "v_proj", "fc1", "o_proj"], ["layernorm_before"]),
}


def targets(case: AdapterCase, kind: str) -> list[str]:
    """The layers of a family that a method can adapt."""
    matrices, norms = LAYERS[kind]
    return [*matrices, *norms] if "LayerNorm" in case.layers else matrices


def adapted(case: AdapterCase, kind: str, **choices: object) -> PeftModel:
    """A tiny model with an adapter that does something."""
    torch.manual_seed(3)
    model = get_peft_model(tiny.model(kind), case.config(**choices))
    return tiny.move(model).eval()


@dataclass(frozen=True)
class Saved:
    """A base model and an adapter as folders, and what they give."""

    kind: str
    base: Path
    adapter: Path
    output: Tensor
    base_output: Tensor

    def model(self) -> nn.Module:
        return tiny.model(self.kind)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[AdapterCase, str], Saved]:
    @cache
    def base(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        tiny.model(kind).save_pretrained(folder)
        words().save_pretrained(folder)
        return folder

    @cache
    def make(case: AdapterCase, kind: str) -> Saved:
        folder = tmp_path_factory.mktemp(f"adapter_{kind}")
        model = adapted(case, kind, task_type=TASKS[kind])
        model.peft_config["default"].base_model_name_or_path = str(base(kind))
        model.save_pretrained(folder)
        return Saved(kind, base(kind), folder, tiny.run(model), tiny.run(tiny.model(kind)))

    return make


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of fifty words."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<end>", *(f"word{i}" for i in range(2, 50))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<pad>", pad_token="<pad>", eos_token="<end>")
