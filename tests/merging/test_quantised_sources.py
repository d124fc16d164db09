"""Quantised checkpoints as sources: refused, or dequantised where that is asked for."""

import json
import shutil
import warnings

import pytest
import torch
import transformers as tf
from adapters import tiny
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from hf_modular.merging import merge
from hf_modular.merging.sources._sources import open_source

bitsandbytes = pytest.importorskip("bitsandbytes")

SETTINGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A model whose rows are as long as bitsandbytes' blocks."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("original")
    tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=50, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=SETTINGS)
def quantised(request, original, tmp_path_factory):
    """The model in memory, its folder, and what the codes of a layer stand for."""
    settings = tf.BitsAndBytesConfig(**SETTINGS[request.param])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tf.AutoModelForCausalLM.from_pretrained(original, quantization_config=settings, device_map="cpu")
        folder = tmp_path_factory.mktemp(request.param)
        model.save_pretrained(folder)
    return model, folder, by_bitsandbytes(model.get_submodule(QUERY))  # now: to run it packs its weights anew


def by_bitsandbytes(layer):
    weight = layer.weight
    if hasattr(weight, "quant_state") and weight.quant_state is not None:
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    return weight.data.float() * weight.SCB[:, None] / 127


def result(model, out, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merge({"merge_method": "passthrough", "models": [{"model": str(model)}], **more}, out, progress=False)
    return load_file(out / "model.safetensors")


def test_a_quantised_model_is_refused_unless_it_may_be_dequantised(quantised, tmp_path):
    words = r"is quantised \(bitsandbytes\): give the model that it was made from.*`base_precision: dequantized`"
    for more in ({}, {"base_precision": "original"}):
        with pytest.raises(ValueError, match=words):
            result(quantised[1], tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()


def test_what_the_codes_stand_for_is_merged(quantised, original, tmp_path):
    model, folder, query = quantised
    found = result(folder, tmp_path / "out", base_precision="dequantized")
    assert found.keys() == load_file(original / "model.safetensors").keys()
    torch.testing.assert_close(found[f"{QUERY}.weight"], query, rtol=1e-6, atol=1e-7)
    loaded, info = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert getattr(loaded.config, "quantization_config", None) is None
    torch.testing.assert_close(tiny.run(loaded), tiny.run(model), rtol=0.05, atol=0.02)  # int8 rounds what comes in


def test_an_adapter_is_merged_into_either(quantised, original, tmp_path):
    _, folder, query = quantised
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = tf.AutoModelForCausalLM.from_pretrained(original)
        adapted = tiny.move(get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"])), 1, 0.1)
        adapted.peft_config["default"].base_model_name_or_path = None
        adapted.save_pretrained(tmp_path / "adapter")
    layer = adapted.get_submodule(f"base_model.model.{QUERY}")
    delta = layer.get_delta_weight("default").detach()
    onto_codes = result(
        f"{folder}+{tmp_path / 'adapter'}", tmp_path / "codes", base_precision="dequantized", adapter_base="any"
    )
    onto_original = result(f"{original}+{tmp_path / 'adapter'}", tmp_path / "original", base_precision="original")
    name = f"{QUERY}.weight"
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(onto_codes[name], query + delta, **close)
    torch.testing.assert_close(onto_original[name], load_file(original / "model.safetensors")[name] + delta, **close)


def test_the_result_answers_as_the_quantised_model_with_the_adapter(quantised, original, tmp_path):
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = tf.AutoModelForCausalLM.from_pretrained(original)
        adapted = tiny.move(get_peft_model(plain, LoraConfig(r=2, target_modules=["down_proj"])), 1, 0.1)
        adapted.peft_config["default"].base_model_name_or_path = str(quantised[1])
        adapted.save_pretrained(tmp_path / "adapter")
        models = [{"model": str(quantised[1]), "adapter": str(tmp_path / "adapter")}]
        recipe = {"merge_method": "linear", "models": models, "base_precision": "dequantized"}
        found = merge(recipe, tmp_path / "out", progress=False, verify=True).verification["adapter"]
    assert found["largest_difference"] < 0.1 * found["adapter_effect"]


def test_the_precision_is_in_the_report(quantised, tmp_path):
    recipe = {"merge_method": "linear", "models": [{"model": str(quantised[1])}], "base_precision": "dequantized"}
    with pytest.warns(UserWarning, match="was dequantised; the result is not quantised again"):
        report = merge(recipe, tmp_path / "out", progress=False)
    assert report.recipe["base_precision"] == "dequantized"
    assert report.inputs[0]["precision"] == "dequantized"


def test_other_ways_of_quantising_are_named(original, tmp_path):

    shutil.copytree(original, tmp_path / "gptq")
    path = tmp_path / "gptq" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="quantised by gptq, and only bitsandbytes' 4 and 8 bits"):
        open_source(str(tmp_path / "gptq"), "dequantized")
