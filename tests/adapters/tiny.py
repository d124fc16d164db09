"""Small models in which layers of the same type repeat."""

from collections.abc import Callable
from functools import cache, partial

import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor, nn

REFERENCE = "tests/data/reference.safetensors"


class Blocks(nn.Module):
    """`layers` blocks, each with a linear layer `wide` and one back, `narrow`."""

    def __init__(self, layers: int = 3, narrow: int = 12, wide: int = 20) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"wide": nn.Linear(narrow, wide), "narrow": nn.Linear(wide, narrow)}) for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["narrow"](torch.tanh(block["wide"](x)))
        return x


def blocks(*args: int, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Blocks(*args).eval()


TOKENS = torch.arange(14).reshape(2, 7) * 3 % 50
_LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
_BERT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_T5 = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_kv": 16, "d_ff": 64, "decoder_start_token_id": 0}
_GEMMA = {**_LLAMA, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
_VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 1}
_MAKERS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=50, **_LLAMA)),
    "bert": lambda: tf.BertModel(tf.BertConfig(vocab_size=50, **_BERT)),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=50, **_T5)),
    "classifier": lambda: tf.BertForSequenceClassification(tf.BertConfig(vocab_size=50, num_labels=3, **_BERT)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(vocab_size=50, **_GEMMA)),
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(image_size=8, patch_size=4, num_labels=3, **_VIT)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=50, **_GPT2)),
}


def model(kind: str) -> nn.Module:
    """A transformer; always the same for a kind."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _MAKERS[kind]().eval()


@torch.no_grad()
def run(model: nn.Module, **kwargs: object) -> Tensor:
    """The model's first output on a few tokens."""
    return model(**inputs(model), **kwargs)[0]


def inputs(model: nn.Module) -> dict[str, Tensor]:
    if model.config.model_type == "vit":
        return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)}
    if model.config.is_encoder_decoder:
        return {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
    return {"input_ids": TOKENS}


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def move(model: nn.Module, seed: int = 1, by: float = 0.1) -> nn.Module:
    """Move everything that is trained away from where it starts."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=by)
    return model


@cache
def reference() -> dict[str, Tensor]:
    """Inputs and outputs of other implementations."""
    return load_file(REFERENCE)


on_meta = partial(torch.device, "meta")
