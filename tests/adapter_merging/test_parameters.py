"""space="parameters": adapters of one type, parameter by parameter."""

import copy

import pytest
import torch
from adapters import tiny
from peft import C3AConfig, FourierFTConfig, IA3Config, LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close

from hf_modular import (
    CompacterConfig,
    FLoRAConfig,
    HUTConfig,
    MoSConfig,
    SSFConfig,
    merge_adapter_files,
    merge_adapters,
)
from hf_modular.merging import LinearConfig, TaskArithmeticConfig, TIESConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),  # PEFT's LN tuning, of every norm
]

TARGETS = ["q_proj", "down_proj"]
# (config, where a parameter begins; None: at random)
TYPES = {
    "ia3": (IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]), 1.0),
    "ssf": (SSFConfig(target_modules=TARGETS), 1.0),
    "hut": (HUTConfig(r=3, target_modules=TARGETS), 1.0),
    "row-column": (HUTConfig(r=3, form="row_column", target_modules=TARGETS), 1.0),
    "compacter": (CompacterConfig(reduction_factor=4), None),
    "mos": (MoSConfig(shards=2, target_modules=TARGETS), None),
    "c3a": (C3AConfig(block_size=16, target_modules=TARGETS), 0.0),
    "fourierft": (FourierFTConfig(n_frequency=20, target_modules=TARGETS), 0.0),
    "ln": (LNTuningConfig(target_modules=["input_layernorm"]), None),
}


def two(config, **second):
    """A model with two adapters that are apart."""
    torch.manual_seed(3)
    model = get_peft_model(tiny.model("llama"), copy.deepcopy(config), "one")
    other = copy.deepcopy(config)
    for name, value in second.items():
        setattr(other, name, value)
    model.add_adapter("two", other)
    for seed, name in enumerate(("one", "two")):
        model.set_adapter(name)
        tiny.move(model, seed, 0.2)
    return model.eval()


def parameters(model, adapter):
    state = {name: t for name, t in model.state_dict().items() if adapter in name.split(".")}
    return {name.replace(f".{adapter}", ""): t for name, t in state.items() if t.is_floating_point()}


@pytest.mark.parametrize("name", TYPES)
def test_a_weighted_mean_is_that_of_each_parameter(name):
    config, _ = TYPES[name]
    model = two(config)
    report = merge_adapters(model, ["one", "two"], LinearConfig(), weights=[3, 1], space="parameters")
    one, two_, merged = (parameters(model, adapter) for adapter in ("one", "two", "merged"))
    assert merged
    assert not any(torch.equal(one[key], two_[key]) for key in one)
    for key, value in merged.items():
        assert_close(value, (3 * one[key] + two_[key]) / 4)
    assert report.peft_type == model.peft_config["one"].peft_type.value
    assert report.layers == {}


@pytest.mark.parametrize("name", TYPES)
def test_task_vectors_begin_where_the_parameters_do(name):
    config, start = TYPES[name]
    model = two(config)
    method = TaskArithmeticConfig(scale=0.5)
    if start is None:
        with pytest.raises(ValueError, match="needs to know where the parameters began"):
            merge_adapters(model, ["one", "two"], method, space="parameters")
        assert [*model.peft_config] == ["one", "two"]
        return
    merge_adapters(model, ["one", "two"], method, weights=[1, -1], space="parameters")
    one, two_, merged = (parameters(model, adapter) for adapter in ("one", "two", "merged"))
    for key, value in merged.items():
        assert_close(value, (0.0 if key.endswith("shift") else start) + 0.5 * (one[key] - two_[key]), msg=key)


@pytest.mark.parametrize("name", ["c3a", "fourierft"])
def test_where_parameters_are_coefficients_both_spaces_agree(name):
    model = two(TYPES[name][0])
    merge_adapters(model, ["one", "two"], TaskArithmeticConfig(), weights=[1, -0.5], space="parameters")
    weights = {}
    for adapter in ("one", "two", "merged"):
        copied = copy.deepcopy(model)
        copied.set_adapter(adapter)
        weights[adapter] = copied.merge_and_unload().state_dict()
    for key, base in tiny.model("llama").state_dict().items():
        wanted = base + (weights["one"][key] - base) - 0.5 * (weights["two"][key] - base)
        assert_close(weights["merged"][key], wanted, rtol=1e-4, atol=1e-5)


def test_other_methods_too():
    model = two(TYPES["ssf"][0])
    merge_adapters(model, ["one", "two"], TIESConfig(density=1.0), space="parameters")
    one, two_, merged = (parameters(model, adapter) for adapter in ("one", "two", "merged"))
    for key, value in merged.items():
        deltas = torch.stack([one[key] - 1, two_[key] - 1])
        agree = deltas.sign() == deltas.sum(0).sign()
        assert_close(value, 1 + (deltas * agree).sum(0) / agree.sum(0).clamp_min(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["compacter", "hut", "mos", "ia3"])
def test_folders_give_the_same(name, tmp_path):
    model = two(TYPES[name][0])
    merge_adapters(model, ["one", "two"], LinearConfig(), weights=[3, 1], space="parameters")
    model.save_pretrained(tmp_path, selected_adapters=["one", "two"])
    models = [{"model": str(tmp_path / a), "parameters": {"weight": w}} for a, w in (("one", 3), ("two", 1))]
    recipe = {"merge_method": "linear", "models": models, "space": "parameters", "base_model": str(tmp_path / "one")}
    merge_adapter_files(recipe, tmp_path / "out")  # of the base model nothing is read
    loaded = PeftModel.from_pretrained(tiny.model("llama"), tmp_path / "out").eval()
    model.set_adapter("merged")
    assert_close(tiny.run(loaded), tiny.run(model))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=TARGETS),
        FLoRAConfig(r=2, target_modules=TARGETS),
        HUTConfig(form="low_rank", r=2, target_modules=TARGETS),
    ],
    ids=["lora", "flora", "hut-low-rank"],
)
def test_parameters_that_mean_nothing_alone_are_refused(config):
    with pytest.raises(ValueError, match=r"mean something only together.* Use space='weights'"):
        merge_adapters(two(config), ["one", "two"], LinearConfig(), space="parameters")


@pytest.mark.parametrize(
    ("name", "second", "words"),
    [
        ("hut", {"r": 2}, r"their settings differ: .*'r': 3.*'r': 2"),
        ("mos", {"alpha": 3}, "their settings differ"),
        ("compacter", {"non_linearity": "relu"}, "their settings differ"),
        ("mos", {"seed": 1}, "their settings differ"),
    ],
)
def test_adapters_of_another_kind_are_refused(name, second, words):
    with pytest.raises(ValueError, match=words):
        merge_adapters(two(TYPES[name][0], **second), ["one", "two"], LinearConfig(), space="parameters")


def test_shards_of_another_routing_are_refused():
    model = two(TYPES["mos"][0])
    layer = next(module for module in model.modules() if hasattr(module, "adapters"))
    layer.adapters["two"].index_A.copy_(layer.adapters["two"].index_A.flip(0))
    with pytest.raises(ValueError, match=r"index_A .*must be the same in all adapters"):
        merge_adapters(model, ["one", "two"], LinearConfig(), space="parameters")
