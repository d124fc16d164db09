"""Which layers get an adapter, and what is trained beside them."""

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close

from adapters import tiny
from adapters.conftest import adapted
from adapters.table import MERGEABLE, METHODS
from hf_modular import FLoRAConfig, HUTConfig, MoSConfig
from hf_modular.adapters._layer import AdapterLayer
from hf_modular.testing import AdapterCase

all_methods = pytest.mark.parametrize("case", METHODS, ids=str)


def layers(model: nn.Module) -> set[str]:
    """The adapted layers, by their names in the base model."""
    found = {name for name, module in model.named_modules() if isinstance(module, AdapterLayer)}
    return {name.removeprefix("base_model.model.model.").removeprefix("base_model.model.") for name in found}


def llama_layers(*names: str, blocks: tuple[int, ...] = (0, 1, 2)) -> set[str]:
    return {f"layers.{block}.{name}" for block in blocks for name in names}


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEAR = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

CHOICES = {
    "suffixes": ({"target_modules": ["q_proj", "mlp.up_proj"]}, llama_layers("self_attn.q_proj", "mlp.up_proj")),
    "full name": ({"target_modules": ["model.layers.1.mlp.up_proj"]}, {"layers.1.mlp.up_proj"}),
    "all-linear": ({"target_modules": "all-linear"}, llama_layers(*LINEAR)),
    "regular expression": (
        {"target_modules": r".*layers\.[02]\..*\.(q|k)_proj"},
        llama_layers("self_attn.q_proj", "self_attn.k_proj", blocks=(0, 2)),
    ),
    "layers_to_transform": (
        {"target_modules": ["o_proj"], "layers_to_transform": [0, 2]},
        llama_layers("self_attn.o_proj", blocks=(0, 2)),
    ),
    "one layer": ({"target_modules": ["o_proj"], "layers_to_transform": 1}, {"layers.1.self_attn.o_proj"}),
    "layers_pattern": (
        {"target_modules": ["o_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"layers.1.self_attn.o_proj"},
    ),
    "exclude_modules": (
        {"target_modules": "all-linear", "exclude_modules": ["o_proj", "layers.1.mlp.up_proj"]},
        llama_layers(*LINEAR) - llama_layers("self_attn.o_proj") - {"layers.1.mlp.up_proj"},
    ),
    "excluded by expression": (
        {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0\..*"},
        llama_layers("self_attn.q_proj", blocks=(1, 2)),
    ),
}


@all_methods
@pytest.mark.parametrize(("choice", "expected"), CHOICES.values(), ids=CHOICES)
def test_targets(case: AdapterCase, choice: dict[str, object], expected: set[str], tmp_path: Path) -> None:
    model = adapted(case, "llama", **choice)
    assert layers(model) == expected
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.model("llama"), tmp_path)
    assert layers(loaded) == expected
    assert torch.equal(tiny.run(loaded), tiny.run(model))


@all_methods
@pytest.mark.parametrize("kind", ["llama", "gemma", "bert", "classifier", "gpt2", "t5", "vit"])
def test_every_architecture_has_a_default(case: AdapterCase, kind: str) -> None:
    assert layers(adapted(case, kind))


@all_methods
def test_all_linear_layers_for_a_second_adapter_too(case: AdapterCase) -> None:
    """PEFT then looks at the names of our classes."""
    model = adapted(case, "gpt2", target_modules="all-linear")
    expected = layers(model)
    assert len(expected) == 8
    model.add_adapter("second", case.config(target_modules="all-linear"))
    with_second = {n for n, m in model.named_modules() if isinstance(m, AdapterLayer) and "second" in m.adapters}
    assert len(with_second) == 8
    assert layers(model) == expected


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (HUTConfig(r=4, target_modules=["q_proj"], rank_pattern={"layers.1.self_attn.q_proj": 2}), {0: 4, 1: 2, 2: 4}),
        (HUTConfig(r=4, target_modules=["q_proj"], rank_pattern={r".*\.[12]\..*q_proj": 3}), {0: 4, 1: 3, 2: 3}),
        (
            FLoRAConfig(r=4, target_modules=["q_proj"], rank_pattern={"^model.layers.2.self_attn.q_proj": 6}),
            {2: 6, 0: 4},
        ),
        (MoSConfig(r=2, budget_r=3, target_modules=["q_proj"], rank_pattern={"layers.0.*": 5}), {0: 5, 1: 2}),
    ],
    ids=["a name", "an expression", "anchored", "assembled"],
)
def test_ranks_of_single_layers(config: HUTConfig | FLoRAConfig | MoSConfig, names: dict[int, int]) -> None:
    model = get_peft_model(tiny.model("llama"), config)
    for block, rank in names.items():
        adapter = model.base_model.model.model.layers[block].self_attn.q_proj.adapters["default"]
        found = {"HUT": lambda a: len(a.A), "FLoRA": lambda a: a.core.shape[0], "MoS": lambda a: a.rank}
        assert found[type(adapter).__name__](adapter) == rank


def test_a_rank_pattern_that_matches_nothing_is_said() -> None:
    with pytest.warns(RuntimeWarning, match=r"rank_pattern keys did not match any targeted module.*nowhere"):
        get_peft_model(tiny.model("llama"), HUTConfig(target_modules=["q_proj"], rank_pattern={"nowhere": 2}))


# -- what is trained beside -------------------------------------------------------------------------------------------


@all_methods
def test_modules_to_save(case: AdapterCase, tmp_path: Path) -> None:
    model = adapted(case, "vit", modules_to_save=["classifier"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "classifier" in name}
    assert trained == {f"base_model.model.classifier.modules_to_save.default.{n}" for n in ("weight", "bias")}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.model("vit"), tmp_path)
    assert torch.equal(tiny.run(loaded), tiny.run(model))
    head = loaded.base_model.model.classifier
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    with loaded.disable_adapter():
        assert torch.equal(tiny.run(loaded), tiny.run(tiny.model("vit")))


@pytest.mark.parametrize("case", MERGEABLE, ids=str)
def test_merging_keeps_what_was_trained_whole(case: AdapterCase) -> None:
    model = adapted(case, "vit", modules_to_save=["classifier"])
    expected, head = tiny.run(model), model.base_model.model.classifier.modules_to_save["default"]
    merged = model.merge_and_unload()
    assert merged.classifier is head
    assert_close(tiny.run(merged), expected, rtol=1e-4, atol=1e-5)


@all_methods
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_trainable_tokens(case: AdapterCase, kind: str, tmp_path: Path) -> None:
    embedding = {"llama": "embed_tokens", "bert": "word_embeddings"}[kind]
    model = adapted(case, kind, trainable_token_indices={embedding: [3, 9]})
    deltas = [name for name, p in model.named_parameters() if p.requires_grad and "trainable_tokens" in name]
    assert len(deltas) == 1
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.model(kind), tmp_path)
    assert torch.equal(tiny.run(loaded), tiny.run(model))
    rows = loaded.get_input_embeddings()
    merged = rows.token_adapter.get_merged_weights(["default"]) if hasattr(rows, "token_adapter") else rows.weight
    changed = (merged != tiny.model(kind).get_input_embeddings().weight).any(1).nonzero().flatten()
    assert changed.tolist() == [3, 9]


@all_methods
def test_biases_of_the_base_model(case: AdapterCase, tmp_path: Path) -> None:
    own = f"{case.config_class.type_name.lower()}_only"
    for choice, is_trained in {
        "all": lambda name: name.endswith("bias"),
        own: lambda name: name.endswith("base_layer.bias"),
    }.items():
        model = adapted(case, "bert", target_modules=["query", "value"], bias=choice)
        base = {n: p for n, p in model.named_parameters() if "hfm_" not in n}
        assert {n for n, p in base.items() if p.requires_grad} == {n for n in base if is_trained(n)} != set()
        model.save_pretrained(tmp_path / choice)
        loaded = PeftModel.from_pretrained(tiny.model("bert"), tmp_path / choice)
        assert torch.equal(tiny.run(loaded), tiny.run(model))


@all_methods
def test_what_is_targeted_is_named_in_the_summary(case: AdapterCase, capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted(case, "llama", target_modules=["q_proj"])
    assert model.targeted_module_names == [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    model.print_trainable_parameters()
    assert re.search(rf"trainable params: {tiny.trainable(model):,}", capsys.readouterr().out)
    status = model.get_model_status()
    assert (status.peft_types, status.num_adapter_layers) == ({"default": case.config_class.type_name}, 3)
