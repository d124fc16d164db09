"""Modules of a model, such as an encoder and a decoder, merged apart: each from its own models and layers."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_modular.cards import save_card
from hf_modular.checkpoints import Checkpoint
from hf_modular.merging import MergeReport, merge

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TEXT = {"hidden_size": 8, "intermediate_size": 6, "num_attention_heads": 2, "num_hidden_layers": 3, **SPECIAL}
SEEN = {"hidden_size": 8, "intermediate_size": 6, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 8}
SIDES = ("encoder", "decoder")
WIDE = {f"{side}_{key}": n for side in SIDES for key, n in (("attention_heads", 2), ("ffn_dim", 6))}
WORDS = {"vocab_size": 24, "d_model": 8, "encoder_layers": 2, "decoder_layers": 3, **WIDE, **SPECIAL}
T5 = {"vocab_size": 24, "d_model": 8, "d_kv": 4, "d_ff": 6, "num_heads": 2, "num_layers": 3, "num_decoder_layers": 2}
LLAMA = {"vocab_size": 24, "num_key_value_heads": 1, **TEXT}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}


def t5(**more):
    return T5ForConditionalGeneration(T5Config(**T5 | more))


def bart(**more):
    return BartForConditionalGeneration(BartConfig(max_position_embeddings=16, **WORDS | more))


def whisper():
    limits = {"max_source_positions": 16, "max_target_positions": 16, "num_mel_bins": 4}
    return WhisperForConditionalGeneration(WhisperConfig(**WORDS, **limits))


def llava(kind=LlavaForConditionalGeneration):
    vision = transformers.CLIPVisionConfig(patch_size=4, **SEEN)
    return kind(LlavaConfig(text_config=LlamaConfig(**LLAMA), vision_config=vision))


def gemma3():
    text = {**LLAMA, "head_dim": 8, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
    settings = {"text_config": text, "vision_config": {"patch_size": 4, **SEEN}, "mm_tokens_per_image": 4}
    return Gemma3ForConditionalGeneration(Gemma3Config(**settings))


def qwen():
    text = {**LLAMA, "head_dim": 8, "rope_parameters": ROPE}
    vision = {"depth": 4, "hidden_size": 8, "intermediate_size": 6, "num_heads": 2, "patch_size": 4}
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config={**vision, "out_hidden_size": 8, "fullatt_block_indexes": [1, 3]}
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def clip():
    text = {"vocab_size": 24, **TEXT}
    return CLIPModel(CLIPConfig(text_config=text, vision_config={"patch_size": 4, **SEEN}, projection_dim=4))


def llama():
    return LlamaForCausalLM(LlamaConfig(**LLAMA))


def saved(folder, model, *names):
    """Models of one kind with different numbers."""
    for i, name in enumerate(names):
        torch.manual_seed(i)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) / 4)
        model.save_pretrained(folder / name)
    return [str(folder / name) for name in names]


def read(folder):
    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def all_of(*models):
    return {"models": [{"model": model} for model in models]}


def layers(*ranges):
    return {"slices": [{"sources": [{"model": model, "layer_range": [first, end]}]} for model, first, end in ranges]}


def recipe(method="passthrough", **modules):
    return {"merge_method": method, "modules": modules}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def two_berts():
    small = {"vocab_size": 24, **TEXT}
    of_each = (
        BertConfig(**small | {"num_hidden_layers": 2}),
        BertConfig(is_decoder=True, add_cross_attention=True, **small),
    )
    return EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(*of_each))


KINDS = {
    "two berts": (two_berts, ["encoder", "decoder"]),
    "t5": (t5, ["encoder", "decoder", "shared"]),
    "bart": (bart, ["encoder", "decoder", "shared"]),
    "bart by names": (bart, ["model.encoder.layers", "model.decoder.layers", "default"]),
    "whisper": (whisper, ["encoder", "decoder"]),
    "llava": (llava, ["text_decoder", "vision_tower", "multi_modal_projector"]),
    "gemma3": (gemma3, ["text_decoder", "vision_tower", "multi_modal_projector"]),
    "qwen2.5-vl": (qwen, ["text_decoder", "vision_tower", "multi_modal_projector"]),
    "clip": (clip, ["text_model", "vision_model", "shared"]),
    "llama": (llama, ["default"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_modules_of_a_model_are_the_model(kind, tmp_path):
    make, names = KINDS[kind]
    [path] = saved(tmp_path, make(), "a")
    merge(recipe(**dict.fromkeys(names, all_of(path))), tmp_path / "out", verify=True)
    assert same(read(tmp_path / "out"), read(path))
    assert config_of(tmp_path / "out") == config_of(Path(path))


WHOSE = {  # the tensors of one module each, by what their names begin with
    "t5": (t5, {"encoder": ["encoder."], "decoder": ["decoder."], "shared": ["shared."]}),
    "bart": (
        bart,
        {"encoder": ["model.encoder."], "decoder": ["model.decoder."], "shared": ["model.shared", "final"]},
    ),
    "llava": (
        llava,
        {
            "language_model": ["language_model."],  # the head is one of its
            "vision_tower": ["vision_tower."],
            "multi_modal_projector": ["multi_modal_projector."],
        },
    ),
    "qwen2.5-vl": (
        qwen,
        {
            "text_decoder": ["model.", "lm_head"],
            "vision_tower": ["visual.blocks", "visual.patch"],
            "multi_modal_projector": ["visual.merger"],
        },
    ),
}


@pytest.mark.parametrize("kind", WHOSE)
def test_each_tensor_comes_from_the_models_of_its_module(kind, tmp_path):
    make, whose = WHOSE[kind]
    paths = saved(tmp_path, make(), "a", "b", "c")
    merge(recipe(**{name: all_of(path) for name, path in zip(whose, paths, strict=True)}), tmp_path / "out")
    out, found = read(tmp_path / "out"), 0
    for path, starts in zip(paths, whose.values(), strict=True):
        own = {name: tensor for name, tensor in read(path).items() if name.startswith(tuple(starts))}
        found += len(own)
        assert same({name: out[name] for name in own}, own)
    assert found == len(out)


def test_layers_of_an_encoder_and_of_a_decoder(tmp_path):
    a, b = saved(tmp_path, t5(), "a", "b")
    modules = {"encoder": layers((a, 0, 3), (b, 1, 3)), "decoder": layers((b, 0, 2), (a, 1, 2)), "shared": all_of(a)}
    merge(recipe(**modules), tmp_path / "out", verify=True)
    out, one, two = map(read, (tmp_path / "out", a, b))
    key = "layer.0.SelfAttention.q.weight"
    wanted = [one[f"encoder.block.{i}.{key}"] for i in range(3)] + [two[f"encoder.block.{i}.{key}"] for i in (1, 2)]
    assert all(torch.equal(out[f"encoder.block.{i}.{key}"], tensor) for i, tensor in enumerate(wanted))
    assert torch.equal(out[f"decoder.block.2.{key}"], one[f"decoder.block.1.{key}"])
    assert torch.equal(out["encoder.final_layer_norm.weight"], two["encoder.final_layer_norm.weight"])
    assert torch.equal(out["decoder.final_layer_norm.weight"], one["decoder.final_layer_norm.weight"])
    model = T5ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert (len(model.encoder.block), len(model.decoder.block)) == (5, 3)
    tokens = torch.tensor([[3, 1, 4]])
    assert torch.isfinite(model(input_ids=tokens, decoder_input_ids=tokens).logits).all()


def test_layers_of_models_within_a_model(tmp_path):
    a, b = saved(tmp_path, two_berts(), "a", "b")
    merge(recipe(encoder=layers((a, 0, 2), (b, 0, 1)), decoder=layers((b, 1, 3))), tmp_path / "out", verify=True)
    out = config_of(tmp_path / "out")
    assert (out["encoder"]["num_hidden_layers"], out["decoder"]["num_hidden_layers"]) == (3, 2)
    name = "encoder.layer.{}.output.dense.weight"
    assert torch.equal(read(tmp_path / "out")[f"encoder.{name.format(2)}"], read(b)[f"encoder.{name.format(0)}"])


def test_experts_and_tokens_of_models_that_are_saved_by_other_names(tmp_path):
    """transformers knows the tensors by one name and saves them by another."""
    settings = {"num_local_experts": 2, **LLAMA}
    a, b = saved(tmp_path, MixtralForCausalLM(MixtralConfig(**settings)), "a", "b")
    merge({"merge_method": "passthrough", **layers((a, 0, 2), (b, 1, 3))}, tmp_path / "out", verify=True)
    out, key = read(tmp_path / "out"), "block_sparse_moe.experts.1.w2.weight"
    assert torch.equal(out[f"model.layers.3.{key}"], read(b)[f"model.layers.2.{key}"])
    assert torch.equal(out["model.norm.weight"], read(b)["model.norm.weight"])
    content = {"merge_method": "linear", **all_of(*saved(tmp_path, gemma3(), "c"), *more_tokens(tmp_path))}
    with pytest.raises(ValueError, match=r"the vocabularies must have one size, but .*c has 24, .*d has 26"):
        merge(content, tmp_path / "none")
    merge(content | {"vocab": "truncate"}, tmp_path / "less", verify=True)
    assert read(tmp_path / "less")["language_model.model.embed_tokens.weight"].shape == (24, 8)
    assert config_of(tmp_path / "less")["text_config"]["vocab_size"] == 24


def more_tokens(folder):
    model = gemma3()
    model.resize_token_embeddings(26)
    return saved(folder, model, "d")


def test_other_names_of_one_number_follow(tmp_path):
    """A config may say how many layers there are under two names."""
    [path] = saved(tmp_path, bart(), "a")
    content = config_of(tmp_path / "a") | {"num_hidden_layers": 2}
    (tmp_path / "a/config.json").write_text(json.dumps(content))
    modules = {"encoder": layers((path, 0, 2), (path, 1, 2)), "decoder": layers((path, 1, 3)), "shared": all_of(path)}
    merge(recipe(**modules), tmp_path / "out", verify=True)
    out = config_of(tmp_path / "out")
    assert (out["encoder_layers"], out["num_hidden_layers"], out["decoder_layers"]) == (3, 3, 2)


def test_what_parts_of_a_config_say_of_layers_follows(tmp_path):
    a, b = saved(tmp_path, gemma3(), "a", "b")
    modules = {
        "text_decoder": layers((a, 1, 3), (b, 0, 2)),
        "vision_tower": layers((b, 0, 2), (a, 0, 1)),
        "multi_modal_projector": all_of(b),
    }
    merge(recipe(**modules), tmp_path / "out", verify=True)
    out = config_of(tmp_path / "out")
    assert (out["text_config"]["num_hidden_layers"], out["vision_config"]["num_hidden_layers"]) == (4, 3)
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    assert out["text_config"]["layer_types"] == kinds
    assert out["text_config"]["hidden_size"] == 8
    model = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert len(model.model.language_model.layers) == 4


def test_layers_that_a_config_names_by_numbers_follow(tmp_path):
    [path] = saved(tmp_path, qwen(), "a")
    modules = {
        "text_decoder": all_of(path),
        "vision_tower": layers((path, 0, 2), (path, 1, 4)),  # 0, 1, 1, 2, 3
        "multi_modal_projector": all_of(path),
    }
    merge(recipe(**modules), tmp_path / "out", verify=True)
    vision = config_of(tmp_path / "out")["vision_config"]
    assert (vision["depth"], vision["fullatt_block_indexes"]) == (5, [1, 2, 4])


def test_a_module_has_settings_of_its_own(tmp_path):
    base, one = saved(tmp_path, t5(), "base", "one")
    modules = {"encoder": all_of(one), "decoder": all_of(base, one), "shared": all_of(one)}
    modules["encoder"]["parameters"] = {"lambda": [0, 1]}
    modules["decoder"]["models"][1]["parameters"] = {"weight": 0.5}
    content = {"base_model": base, "parameters": {"lambda": 0.25}, **recipe("task_arithmetic", **modules)}
    merge(content, tmp_path / "out")
    out, base, one = map(read, (tmp_path / "out", base, one))
    for name, tensor in out.items():
        depth = {"encoder.block.0": 0, "encoder.block.1": 0.5, "encoder.block.2": 1, "encoder.fi": 0}
        scale = next((n for start, n in depth.items() if name.startswith(start)), 0.125 if "decoder" in name else 0.25)
        torch.testing.assert_close(tensor, base[name] + scale * (one[name] - base[name]))


@pytest.mark.filterwarnings("ignore:how to generate")  # which a model that judges does not say
def test_a_head_comes_from_the_module_that_it_is_in(tmp_path):
    """The head of one model, which is of another kind than the other's, that gives the encoder alone."""
    [summing] = saved(tmp_path, bart(), "summing")
    labels = {"id2label": {0: "no", 1: "yes", 2: "maybe"}, "label2id": {"no": 0, "yes": 1, "maybe": 2}}
    config = BartConfig(max_position_embeddings=16, **WORDS, **labels)
    [judging] = saved(tmp_path, BartForSequenceClassification(config), "judging")
    content = recipe(encoder=all_of(summing), decoder=all_of(judging), shared=all_of(judging))
    merge(content | {"base_model": judging}, tmp_path / "out", verify=True)
    out = read(tmp_path / "out")
    assert torch.equal(
        out["classification_head.out_proj.weight"], read(judging)["classification_head.out_proj.weight"]
    )
    assert config_of(tmp_path / "out")["id2label"] == {"0": "no", "1": "yes", "2": "maybe"}


def test_the_report_the_recipe_and_the_card_name_all_models(tmp_path):
    a, b = saved(tmp_path, t5(), "a", "b")
    content = recipe("linear", encoder=all_of(a), decoder=layers((b, 0, 1)), shared=all_of(a, b))
    report = merge(content, tmp_path / "out")
    assert "Merged 2 models by linear" in report.summary()
    assert [entry["model"] for entry in MergeReport.load(tmp_path / "out").inputs] == [a, b]
    merge(tmp_path / "out" / "merge_recipe.yaml", tmp_path / "again")
    assert same(read(tmp_path / "again"), read(tmp_path / "out"))
    card = save_card(tmp_path / "out").read_text()
    assert "`a`" in card or a in card
    assert "encoder" in card


# --- what is refused -------------------------------------------------------------------------------------------------


def refusal(content, folder):
    path = folder / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
    with pytest.raises(ValueError, match=r"merge cannot begin|cannot be used") as error:
        merge(path, folder / "out")
    assert not (folder / "out").exists()
    return str(error.value)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("t5s"), t5(), "a", "b")


RECIPE = """\
merge_method: linear
modules:
  encoder:
    models: [{{model: {a}}}]
  decoder:
    slices:
      - sources:
          - model: {a}
            layer_range: [0, 2]
  shared:
    models:
      - model: {b}
"""
MISTAKES = {
    "a module that is not there": (
        ("  shared:", "  head:"),
        "line 10, modules.head: there is no module 'head': {a} has 'encoder' (3 layers), 'decoder' (2 layers)",
    ),
    "a module that is missing": (
        ("  encoder:\n    models: [{{model: {a}}}]\n", ""),
        "line 2, modules: all modules of {a} must be given, but 'encoder' (3 layers) is missing",
    ),
    "one module twice": (
        ("  shared:", "  default:\n    models: [{{model: {a}}}]\n  shared:"),
        "it is the same module as",
    ),
    "models and slices": (
        ("  decoder:\n", "  decoder:\n    models: [{{model: {a}}}]\n"),
        "line 5, modules.decoder: a module must have `models` or `slices`, and not both",
    ),
    "neither": (("models: [{{model: {a}}}]", "parameters: {{}}"), "line 3, modules.encoder: a module must have"),
    "layers that are not there": (
        ("[0, 2]", "[1, 3]"),
        "line 9, modules.decoder.slices[0].sources[0].layer_range: {a} has the layers [0, 2], but got [1, 3]",
    ),
    "no layers": (("[0, 2]", "[0, 0]"), "{a} has the layers [0, 2], but got [0, 0]"),
    "layers of what has none": (
        ("    models:\n      - model: {b}", "    slices: [{{sources: [{{model: {b}, layer_range: [0, 1]}}]}}]"),
        "modules.shared.slices[0].sources[0].layer_range: {b} has the layers [0, 0], but got [0, 1]",
    ),
    "models beside modules": (
        ("modules:\n", "models: [{{model: {a}}}]\nmodules:\n"),
        "line 2, models: give one of `models`, `slices` and `modules`, not models and modules",
    ),
    "an unknown key": (
        ("    models:\n", "    weights: 1\n    models:\n"),
        "line 11, modules.shared.weights: there is no",
    ),
    "an unknown key of a model": (
        ("      - model: {b}", "      - model: {b}\n        fisher: x"),
        "modules.shared.models[0].fisher: there is no such key, there are ['model', 'parameters']",
    ),
    "a setting that is not there": (
        ("  shared:\n", "  shared:\n    parameters: {{scale: 2}}\n"),
        "line 11, modules.shared.parameters.scale: 'linear' has no setting 'scale'",
    ),
    "a method for whole models": (("linear", "opcm"), "takes whole models one after the other: give `models`"),
    "layers without their first": (
        ("models: [{{model: {a}}}]", "slices: [{{sources: [{{model: {a}, layer_range: [1, 3]}}]}}]"),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight must have (32, 2) by the config",
    ),
}


@pytest.mark.parametrize("title", MISTAKES)
def test_a_mistake_is_named_with_its_line(title, models, tmp_path):
    (old, new), message = MISTAKES[title]
    assert old in RECIPE
    a, b = models
    assert message.format(a=a, b=b) in refusal(RECIPE.replace(old, new, 1).format(a=a, b=b), tmp_path)


def test_slices_without_modules(models, tmp_path):
    message = refusal({"merge_method": "passthrough", **layers((models[0], 0, 2))}, tmp_path)
    assert f"slices need a model with one stack of layers, but {models[0]} has 'encoder' (3 layers)" in message
    assert "give the slices of each under `modules`" in message


def test_models_with_different_numbers_of_layers(models, tmp_path):
    [deep] = saved(tmp_path, t5(num_layers=4), "deep")
    content = recipe("linear", encoder=all_of(models[0], deep), decoder=all_of(*models), shared=all_of(*models))
    message = refusal(content, tmp_path)
    assert (
        f"modules.encoder.models: the models must have as many layers here, 3 as {models[0]}, but {deep} has 4"
        in message
    )


def test_a_method_that_looks_at_the_whole_model(models, tmp_path):
    content = recipe("pcb", encoder=all_of(*models), decoder=all_of(*models), shared=all_of(*models))
    assert "'pcb' looks at the whole model" in refusal(content | {"base_model": models[0]}, tmp_path)
