"""What a checkpoint or an adapter holds."""

import json
import warnings

import pytest
import torch
import transformers as tf
from adapters import tiny
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import hf_modular
from hf_modular.inspection import inspect

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


@pytest.fixture
def adapter(tmp_path):
    model = tiny.move(get_peft_model(tiny.model("llama"), LoraConfig(r=3, target_modules=["q_proj", "v_proj"])))
    model.peft_config["default"].base_model_name_or_path = "org/base"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def changed(adapter, change):
    weights = change(load_file(adapter / "adapter_model.safetensors"))
    save_file(weights, adapter / "adapter_model.safetensors")
    return inspect(adapter).problems


def test_a_model(tmp_path):
    model = tiny.model("gpt2").bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    found = inspect(tmp_path)
    stored = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}
    assert (found.kind, found.tensors, found.problems) == ("model", len(stored), [])
    assert found.parameters == sum(t.numel() for t in stored.values())
    assert found.bytes == 2 * found.parameters
    assert found.dtypes == {"bfloat16": found.parameters}
    assert found.files == {path.name: path.stat().st_size for path in tmp_path.glob("*.safetensors")}
    assert len(found.files) > 1
    assert found.tied == {"lm_head.weight": "transformer.wte.weight"}
    assert found.settings["architectures"] == ["GPT2LMHeadModel"]
    assert "tied: lm_head.weight to transformer.wte.weight" in found.summary()
    assert json.loads(found.to_json())["tensors"] == len(stored)


def test_a_model_that_is_not_the_one_of_its_config(tmp_path):
    tiny.model("bert").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 60}))
    [problem] = inspect(tmp_path).problems
    assert problem == "embeddings.word_embeddings.weight must have the shape (60, 32) by the config, but has (50, 32)"
    path.unlink()
    assert inspect(tmp_path).problems == ["there is no config.json"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_is_not_there(tied, tmp_path):
    """It is one with the embeddings, or transformers would make one up."""
    settings = {"hidden_size": 8, "intermediate_size": 6, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = tf.LlamaConfig(vocab_size=24, tie_word_embeddings=tied, **settings)
    tf.LlamaForCausalLM(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("lm_head.weight", None)
    save_file(weights, tmp_path / "model.safetensors")
    wanted = [] if tied else ["transformers would draw at random what is not there: lm_head.weight"]
    assert inspect(tmp_path).problems == wanted


def test_experts_under_other_names_are_no_problem(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    tf.MixtralForCausalLM(
        tf.MixtralConfig(vocab_size=50, intermediate_size=48, num_local_experts=4, **sizes)
    ).save_pretrained(tmp_path)
    assert inspect(tmp_path).problems == []


def test_an_adapter(adapter):
    found = inspect(adapter)
    assert (found.kind, found.problems) == ("adapter", [])
    assert found.settings == {
        "type": "LORA",
        "base_model_name_or_path": "org/base",
        "r": 3,
        "lora_alpha": 8,
        "target_modules": found.settings["target_modules"],
    }
    weights = load_file(adapter / "adapter_model.safetensors")
    layer = "model.layers.1.self_attn.v_proj"
    parts = [weights[f"base_model.model.{layer}.lora_{side}.weight"].norm() for side in "AB"]
    assert found.layers[layer] == pytest.approx(float(torch.stack(parts).norm()))
    assert len(found.layers) == 6
    assert "layers: 6, with norms from" in found.summary()


def test_an_adapter_of_ours(tmp_path):
    model = get_peft_model(tiny.model("llama"), hf_modular.HUTConfig(r=2, target_modules=["q_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    assert inspect(tmp_path).settings["type"] == "HFM_HUT"


def one_side(weights, side):
    return {name: t for name, t in weights.items() if not ("layers.0" in name and f"lora_{side}" in name)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: {n: t * 0 if "lora_B" in n else t for n, t in w.items()}, "all values are zero in 6 tensors"),
        (
            lambda w: {n: t + torch.inf if "layers.2" in n else t for n, t in w.items()},
            "NaN or infinite values are in",
        ),
        (lambda w: {n: t[:0] if "lora_A" in n else t for n, t in w.items()}, "there is nothing in"),
        (lambda w: {n: t[:2].clone() if "lora_A" in n else t for n, t in w.items()}, "must have r=3 rows, but has 2"),
        (lambda w: one_side(w, "B"), "one of lora_A and lora_B is missing for base_model.model.model.layers.0"),
    ],
)
def test_what_is_wrong_with_an_adapter_is_seen(change, words, adapter):
    assert any(problem.startswith(words) or words in problem for problem in changed(adapter, change))


def test_a_folder_with_neither_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="must hold model"):
        inspect(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match="is no safetensors file"):
        inspect(tmp_path)
