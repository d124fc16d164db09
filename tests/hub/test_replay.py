"""A merge of the Hub's models is made again from its recipe, or its report, bit for bit, whatever they are now."""

import json
import shutil

import pytest
import tokenizers
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from server import Blob
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from hf_modular.merging import MergeReport, merge

LLAMA = {"hidden_size": 8, "intermediate_size": 6, "num_attention_heads": 2, "num_key_value_heads": 1}
LLAMA |= {"num_hidden_layers": 3, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 8, "d_kv": 4, "d_ff": 6, "num_heads": 2, "num_layers": 2, "vocab_size": 12}
WORDS = ["<unk>", "<s>", "</s>", *"abcdefg"]
PAIR = [{"model": "them/one"}, {"model": "them/two"}]


def drawn(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / 4)
    return model


def tokenizer(words):
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), **special)
    found.chat_template = f"{{{{ messages }}}} {len(words)}"
    return found


@pytest.fixture
def publish_all(tmp_path, hub):
    """Models, an adapter and two encoders with decoders, which are others in each version."""

    def publish(folder, repo):
        files = {path.name: Blob(path.read_bytes(), lfs=path.suffix == ".safetensors") for path in folder.iterdir()}
        if repo in hub.repos:
            hub.repos[repo].commit("main", files, "another version")
        else:
            hub.add(repo, files)

    def publish_all(version):
        folder = tmp_path / f"version {version}"
        for i, (name, words) in enumerate({"base": WORDS, "one": WORDS, "two": [*WORDS, "h"]}.items()):
            model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **LLAMA))
            drawn(model, 10 * version + i).save_pretrained(folder / name)
            tokenizer(words).save_pretrained(folder / name)
            publish(folder / name, f"them/{name}")
        lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        adapter = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), lora)
        drawn(adapter.base_model, 10 * version + 5)
        adapter.peft_config["default"].base_model_name_or_path = "them/base"
        adapter.save_pretrained(folder / "lora")
        publish(folder / "lora", "them/lora")
        for i, name in enumerate(("t5", "u5")):
            drawn(T5ForConditionalGeneration(T5Config(**T5)), 10 * version + 7 + i).save_pretrained(folder / name)
            publish(folder / name, f"them/{name}")

    publish_all(0)
    return publish_all


RECIPES = {
    "random masks": {
        "merge_method": "dare",
        "base_model": "them/base",
        "models": [PAIR[0]],
        "parameters": {"drop": 0.5},
    },
    "a tokenizer, tokens and a template": {
        "merge_method": "linear",
        "models": PAIR,
        "chat_template": "them/two",
        "tokenizer": {
            "source": "union",
            "tokens": {
                "h": {"source": "them/two"},
                "x": {"source": {"kind": "model_token", "model": "them/two", "token": "h"}},
            },
        },
    },
    "a head": {"merge_method": "linear", "models": PAIR, "heads": "them/one", "vocab": "truncate"},
    "an adapter": {"merge_method": "linear", "models": [{"model": "them/base", "adapter": "them/lora"}, PAIR[0]]},
    "slices": {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": "them/base", "layer_range": r}]} for r in ([0, 2], [1, 3])],
        "dtype": "bfloat16",
    },
    "modules": {
        "merge_method": "linear",
        "modules": {
            "encoder": {"slices": [{"sources": [{"model": "them/t5", "layer_range": [0, 1]}]}]},
            "decoder": {"models": [{"model": "them/u5", "parameters": {"weight": [0.5, 1]}}, {"model": "them/t5"}]},
            "shared": {"models": [{"model": "them/t5"}], "parameters": {"normalize": False}},
        },
    },
}


def contents(folder):
    """All files but the report, which has the time."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "merge_report.json"}


@pytest.mark.filterwarnings("ignore:the chat template", "ignore:the difference between", "ignore:.* was trained on")
@pytest.mark.parametrize("title", RECIPES)
def test_a_merge_is_made_again_bit_for_bit(title, publish_all, tmp_path):
    report = merge(RECIPES[title], tmp_path / "out", seed=7, max_shard_size="2KB", progress=False)
    publish_all(1)
    shutil.rmtree(constants.HF_HUB_CACHE)
    saved = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    again = merge(tmp_path / "out" / "merge_recipe.yaml", tmp_path / "again", max_shard_size="2KB", progress=False)
    told = merge(saved["recipe"] | {"seed": saved["seed"]}, tmp_path / "told", max_shard_size="2KB", progress=False)
    assert contents(tmp_path / "again") == contents(tmp_path / "told") == contents(tmp_path / "out")
    assert again.outputs == told.outputs == report.outputs == MergeReport.load(tmp_path / "out").outputs
    other = merge(RECIPES[title], tmp_path / "other", seed=7, max_shard_size="2KB", progress=False)
    assert other.outputs.keys() == report.outputs.keys()
    assert other.outputs != report.outputs
