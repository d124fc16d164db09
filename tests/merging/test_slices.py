"""Slices: layers of models stacked or merged, renumbered, with the config that fits them."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hf_modular.checkpoints import Checkpoint
from hf_modular.merging import merge

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 4}
LLAMA = {"vocab_size": 32, "num_key_value_heads": 1, **SMALL}


def saved(folder, model, *names, seed=0):
    """Models of one kind with different numbers."""
    for i, name in enumerate(names):
        torch.manual_seed(seed + i)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) / 4)
        model.save_pretrained(folder / name)
    return [str(folder / name) for name in names]


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("llamas"), LlamaForCausalLM(LlamaConfig(**LLAMA)), "a", "b", "c")


def read(folder):
    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def stacked(*slices, **more):
    """A recipe that stacks (model, first, end)."""
    slices = [{"sources": [{"model": model, "layer_range": [first, end]}]} for model, first, end in slices]
    return {"merge_method": "passthrough", "slices": slices} | more


def layer(tensors, number):
    mark = f"model.layers.{number}."
    return {name.removeprefix(mark): tensor for name, tensor in tensors.items() if name.startswith(mark)}


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_layers_are_stacked_and_renumbered(llamas, tmp_path):
    a, b, _ = llamas
    report = merge(stacked((a, 0, 3), (b, 1, 4), dtype="float32"), tmp_path / "out")
    out, one, two = read(tmp_path / "out"), read(a), read(b)
    for i, (source, number) in enumerate([(one, 0), (one, 1), (one, 2), (two, 1), (two, 2), (two, 3)]):
        assert same(layer(out, i), layer(source, number))
    assert torch.equal(out["model.embed_tokens.weight"], one["model.embed_tokens.weight"])
    assert torch.equal(out["model.norm.weight"], two["model.norm.weight"])
    assert torch.equal(out["lm_head.weight"], two["lm_head.weight"])
    assert json.loads((tmp_path / "out/config.json").read_text())["num_hidden_layers"] == 6
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(model.model.layers) == 6
    assert same(dict(model.state_dict()), out)
    assert "Merged 2 models by passthrough" in report.summary()


def test_a_stack_computes_what_its_layers_do(llamas, tmp_path):
    merge(stacked((llamas[0], 0, 4), (llamas[0], 2, 4)), tmp_path / "out")
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    out, model = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out", llamas[0]))
    model.model.layers.extend([model.model.layers[2], model.model.layers[3]])
    model.config.num_hidden_layers = 6
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(out(ids, use_cache=False).logits, expected)


def test_slices_are_merged_with_their_own_settings(llamas, tmp_path):
    a, b, c = llamas
    slices = [
        {
            "sources": [
                {"model": a, "layer_range": [0, 2], "parameters": {"weight": 3}},
                {"model": b, "layer_range": [2, 4]},
            ]
        },
        {
            "sources": [
                {"model": b, "layer_range": [3, 4]},
                {"model": c, "layer_range": [0, 1]},
                {"model": a, "layer_range": [1, 2]},
            ],
            "parameters": {"weight": [{"filter": "mlp", "value": 0.5}]},
        },
    ]
    recipe = {"merge_method": "linear", "slices": slices, "parameters": {"weight": 1, "normalize": False}}
    merge(recipe, tmp_path / "out")
    out, a, b, c = map(read, (tmp_path / "out", a, b, c))
    for name, tensor in layer(out, 0).items():
        torch.testing.assert_close(tensor, 3 * layer(a, 0)[name] + layer(b, 2)[name])
    for name, tensor in layer(out, 2).items():
        scale = 0.5 if "mlp" in name else 1
        torch.testing.assert_close(tensor, scale * (layer(b, 3)[name] + layer(c, 0)[name] + layer(a, 1)[name]))
    embed = "model.embed_tokens.weight"
    torch.testing.assert_close(out[embed], 3 * a[embed] + b[embed])
    torch.testing.assert_close(out["lm_head.weight"], sum(m["lm_head.weight"] for m in (a, b, c)))


def test_filters_look_at_the_names_in_the_models(llamas, tmp_path):
    """As in mergekit, for settings that may differ between models: layers have other numbers in the result."""
    a, b, _ = llamas
    sources = [{"model": a, "layer_range": [2, 4]}, {"model": b, "layer_range": [1, 3]}]
    sources[0]["parameters"] = {"weight": [{"filter": "layers.2.", "value": 5}]}
    weight = [{"filter": "layers.1.", "value": 7}, {"value": 2}]
    recipe = {"merge_method": "linear", "slices": [{"sources": sources}]}
    merge(recipe | {"parameters": {"weight": weight, "normalize": False}}, tmp_path / "out")
    out, a, b = map(read, (tmp_path / "out", a, b))
    for name, tensor in layer(out, 0).items():
        torch.testing.assert_close(tensor, 5 * layer(a, 2)[name] + 7 * layer(b, 1)[name])
    for name, tensor in layer(out, 1).items():
        torch.testing.assert_close(tensor, 2 * layer(a, 3)[name] + 2 * layer(b, 2)[name])


def test_layers_of_one_model_are_merged_with_each_other(llamas, tmp_path):
    sources = [{"model": llamas[0], "layer_range": [first, first + 2]} for first in (0, 2)]
    merge({"merge_method": "linear", "slices": [{"sources": sources}]}, tmp_path / "out")
    out, own = read(tmp_path / "out"), read(llamas[0])
    for i in range(2):
        for name, tensor in layer(out, i).items():
            torch.testing.assert_close(tensor, (layer(own, i)[name] + layer(own, i + 2)[name]) / 2)
    assert torch.equal(out["lm_head.weight"], own["lm_head.weight"])


def test_a_gradient_runs_over_each_slice(llamas, tmp_path):
    a, b, _ = llamas
    sources = [{"model": a, "layer_range": [0, 3]}, {"model": b, "layer_range": [1, 4]}]
    one = [{"model": a, "layer_range": [2, 3]}, {"model": b, "layer_range": [2, 3]}]
    slices = [{"sources": sources}, {"sources": one, "parameters": {"t": [0, 0.25]}}]
    recipe = {"merge_method": "slerp", "base_model": a, "slices": slices, "parameters": {"t": [0, 0.5, 1]}}
    merge(recipe, tmp_path / "out")
    out, a, b = map(read, (tmp_path / "out", a, b))
    close = torch.testing.assert_close
    close(layer(out, 0), layer(a, 0))
    close(layer(out, 2), layer(b, 3))
    close(out["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert not torch.allclose(layer(out, 3)["mlp.up_proj.weight"], layer(a, 2)["mlp.up_proj.weight"], atol=1e-3)


def bert():
    return BertForMaskedLM(BertConfig(vocab_size=32, **SMALL))


def vit():
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, **SMALL))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=4, bos_token_id=0, eos_token_id=0))


def gemma2():
    return Gemma2ForCausalLM(Gemma2Config(head_dim=8, **LLAMA))


KINDS = {
    "bert": (bert, AutoModelForMaskedLM, {"input_ids": torch.tensor([[3, 1, 4]])}),
    "vit": (vit, AutoModelForImageClassification, {"pixel_values": torch.rand(2, 1, 8, 8)}),
    "gpt2": (gpt2, AutoModelForCausalLM, {"input_ids": torch.tensor([[3, 1, 4]])}),
    "gemma2": (gemma2, AutoModelForCausalLM, {"input_ids": torch.tensor([[3, 1, 4]])}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_models(kind, tmp_path):
    """All layers of a model in two slices are the model; other layers are another one, which loads."""
    make, auto, example = KINDS[kind]
    [path] = saved(tmp_path, make(), "a")
    merge(stacked((path, 0, 1), (path, 1, 4)), tmp_path / "all")
    merge(stacked((path, 1, 4), (path, 1, 2)), tmp_path / "other")
    whole, model, other = (auto.from_pretrained(p).eval() for p in (tmp_path / "all", path, tmp_path / "other"))
    with torch.no_grad():
        assert torch.equal(whole(**example).logits, model(**example).logits)
        assert not torch.allclose(other(**example).logits, model(**example).logits)
    assert other.config.num_hidden_layers == 4
    assert read(tmp_path / "all").keys() == read(path).keys()


def test_lists_of_layers_follow(tmp_path):
    [path] = saved(tmp_path, gemma2(), "a")
    config = tmp_path / "a" / "config.json"
    kinds = json.loads(config.read_text())["layer_types"]
    merge(stacked((path, 1, 4), (path, 0, 2)), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["layer_types"] == [*kinds[1:4], *kinds[0:2]]
    old = {key: value for key, value in json.loads(config.read_text()).items() if key != "layer_types"}
    config.write_text(json.dumps(old))
    merge(stacked((path, 1, 4), (path, 0, 2)), tmp_path / "old")
    assert json.loads((tmp_path / "old/config.json").read_text())["layer_types"] == [*kinds[1:4], *kinds[0:2]]


def test_a_tied_first_model_and_an_untied_last_one(llamas, tmp_path):
    [tied] = saved(tmp_path, LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **LLAMA)), "tied", seed=9)
    merge(stacked((tied, 0, 2), (llamas[0], 2, 4)), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, read(llamas[0])["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight, read(tied)["model.embed_tokens.weight"])


def test_threads_and_shards_change_no_bit(llamas, tmp_path):
    recipe = stacked((llamas[0], 0, 3), (llamas[1], 1, 4))
    merge(recipe, tmp_path / "one", workers=1)
    merge(recipe, tmp_path / "many", workers=3, max_shard_size="9KB")
    assert same(read(tmp_path / "many"), read(tmp_path / "one"))
    merge(tmp_path / "one" / "merge_recipe.yaml", tmp_path / "again")
    assert same(read(tmp_path / "again"), read(tmp_path / "one"))


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer"])
def test_an_architecture_that_transformers_has_not(llamas, tmp_path, key):
    for path in Path(llamas[0]).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "architectures": ["Mine"], key: 4}))
    merge(stacked((str(tmp_path), 1, 3), (str(tmp_path), 0, 4)), tmp_path / "out")
    merge(stacked((llamas[0], 1, 3), (llamas[0], 0, 4)), tmp_path / "known")
    assert same(read(tmp_path / "out"), read(tmp_path / "known"))
    assert json.loads((tmp_path / "out/config.json").read_text())[key] == 6


def test_a_config_that_does_not_count_layers(llamas, tmp_path):
    for path in Path(llamas[0]).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "depth": 4}))
    assert "must say how many layers there are" in refusal(stacked((str(tmp_path), 0, 4)), tmp_path)


def test_a_base_that_gives_only_its_config(llamas, tmp_path):
    a, b, c = llamas
    (tmp_path / "base").mkdir()
    for path in Path(c).iterdir():
        (tmp_path / "base" / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "base/config.json").read_text()) | {"rope_theta_of_the_base": 7}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    merge(stacked((a, 0, 4), (b, 0, 1), base_model=str(tmp_path / "base")), tmp_path / "out")
    out = json.loads((tmp_path / "out/config.json").read_text())
    assert (out["rope_theta_of_the_base"], out["num_hidden_layers"]) == (7, 5)
    assert same(layer(read(tmp_path / "out"), 4), layer(read(b), 0))


# --- what is refused -------------------------------------------------------------------------------------------------


def refusal(recipe, folder):
    with pytest.raises(ValueError, match=r"merge cannot begin|cannot be used") as error:
        merge(recipe, folder / "out")
    assert not (folder / "out").exists()
    return str(error.value)


def test_layers_that_a_model_has_not(llamas, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "merge_method: passthrough\nslices:\n  - sources:\n"
        f"      - model: {llamas[0]}\n        layer_range: [0, 9]\n"
        f"  - sources:\n      - model: {llamas[1]}\n        layer_range: [4, 5]\n"
    )
    message = refusal(tmp_path / "recipe.yaml", tmp_path)
    assert f"line 5, slices[0].sources[0].layer_range: {llamas[0]} has the layers [0, 4], but got [0, 9]" in message
    assert f"line 8, slices[1].sources[0].layer_range: {llamas[1]} has the layers [0, 4], but got [4, 5]" in message


def test_two_stacks_of_layers(tmp_path):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 2}
    [path] = saved(tmp_path, T5ForConditionalGeneration(T5Config(vocab_size=32, **sizes)), "t5")
    message = refusal(stacked((path, 0, 2)), tmp_path)
    assert f"slices need a model with one stack of layers, but {path} has 'encoder' (2 layers)" in message


def test_layers_of_another_width(llamas, tmp_path):
    wide = LlamaForCausalLM(LlamaConfig(**LLAMA | {"intermediate_size": 20}))
    [path] = saved(tmp_path, wide, "wide")
    message = refusal(stacked((llamas[0], 0, 2), (path, 0, 2)), tmp_path)
    assert "model.layers.2.mlp.up_proj.weight" in message
    assert "(20, 16)" in message


def test_a_method_that_looks_at_the_whole_model(llamas, tmp_path):
    slices = [
        {"sources": [{"model": model, "layer_range": layers} for model in llamas]} for layers in ([0, 2], [2, 4])
    ]
    message = refusal({"merge_method": "pcb", "base_model": llamas[0], "slices": slices}, tmp_path)
    assert "'pcb' looks at the whole model" in message
