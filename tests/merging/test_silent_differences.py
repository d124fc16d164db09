"""What models differ in although their tensors match: said, or refused, never passed over."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from hf_modular.merging import merge

SMALL = {"vocab_size": 24, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2, "bos_token_id": 1}
SMALL |= {"eos_token_id": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def saved(folder, model):
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llamas")
    torch.manual_seed(0)
    tied = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True))
    return [saved(folder / name, tied) for name in ("one", "two")]


def changed(source, target, config=None, **tensors):
    """A copy of a checkpoint with other settings or tensors."""
    shutil.copytree(source, target)
    if config:
        content = json.loads((target / "config.json").read_text()) | config
        (target / "config.json").write_text(json.dumps(content))
    if tensors:
        held = load_file(target / "model.safetensors") | tensors["tensors"]
        save_file(held, target / "model.safetensors", metadata={"format": "pt"})
    return target


def merged(folder, *models, **more):
    entries = [{"model": str(model)} for model in models]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the notes, which are looked for in the report
        return merge({"merge_method": "linear", "models": entries} | more, folder, progress=False)


def tensors(folder):
    return load_file(Path(folder) / "model.safetensors")


# --- what is stored twice --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 0)], ids=["first", "last", "both"])
def test_a_head_that_the_config_ties_but_the_file_has_apart(order, models, tmp_path):
    """transformers takes the file's word for it, so the result must have both, and a config that says so."""
    head = tensors(models[0])[EMBEDDINGS] + 1
    apart = [changed(models[i], tmp_path / f"apart{i}", tensors={HEAD: head}) for i in range(2)]
    given = [[apart[0], models[1]][i] for i in order] if order != (0, 0) else apart
    report = merged(tmp_path / "out", *given)
    assert any("lm_head.weight of" in note and "merged as a tensor apart" in note for note in report.notes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    whole = [AutoModelForCausalLM.from_pretrained(path) for path in given]
    torch.testing.assert_close(model.lm_head.weight, sum(m.lm_head.weight for m in whole) / 2)
    torch.testing.assert_close(model.model.embed_tokens.weight, sum(m.model.embed_tokens.weight for m in whole) / 2)
    assert model.config.tie_word_embeddings is False


@pytest.mark.parametrize("count", [1, 2])
def test_a_head_that_is_stored_twice_is_one(count, models, tmp_path):
    head = tensors(models[0])[EMBEDDINGS].clone()
    twice = [changed(model, tmp_path / model.name, tensors={HEAD: head}) for model in models[:count]]
    merged(tmp_path / "out", *twice, *models[count:])
    assert tensors(tmp_path / "out").keys() == tensors(models[0]).keys()
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True


def test_random_masks_do_not_part_what_is_tied(models, tmp_path):
    """Each tensor has its own masks: two copies of one would become two tensors."""
    head = tensors(models[0])[EMBEDDINGS]
    twice = [
        changed(model, tmp_path / model.name, tensors={HEAD: head + i, EMBEDDINGS: head + i})
        for i, model in enumerate(models)
    ]
    merged(tmp_path / "out", twice[1], base_model=str(twice[0]), merge_method="dare", parameters={"drop": 0.5})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert not torch.equal(model.lm_head.weight, head)


def test_embeddings_of_an_encoder_and_a_decoder_that_old_files_repeat(tmp_path):
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 6, "num_heads": 2, "num_layers": 1}
    plain = saved(tmp_path / "plain", T5ForConditionalGeneration(T5Config(vocab_size=24, **sizes)))
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    shared = tensors(plain)["shared.weight"]
    old = changed(plain, tmp_path / "old", tensors={name: shared.clone() for name in copies})
    merged(tmp_path / "out", old)
    assert tensors(tmp_path / "out").keys() == tensors(plain).keys()


# --- configs ---------------------------------------------------------------------------------------------------------

NOTED = {
    "rope_parameters": ({"rope_type": "default", "rope_theta": 1e6}, "`rope_parameters.rope_theta`: 10000.0 in"),
    "rms_norm_eps": (1e-3, "`rms_norm_eps`: 1e-06 in"),
    "hidden_act": ("gelu", "`hidden_act`: 'silu' in"),
}


@pytest.mark.parametrize("key", NOTED)
def test_a_setting_that_changes_what_is_computed_is_noted(key, models, tmp_path):
    value, words = NOTED[key]
    other = changed(models[1], tmp_path / "other", {key: value})
    report = merged(tmp_path / "out", models[0], other)
    [note] = [note for note in report.notes if "configs differ" in note]
    assert words in note
    assert f"{models[0]}, which counts for the result" in note


def test_a_setting_that_one_config_leaves_out_is_noted(models, tmp_path):
    content = json.loads((models[0] / "config.json").read_text())
    del content["rms_norm_eps"]
    (changed(models[0], tmp_path / "short") / "config.json").write_text(json.dumps(content))
    other = changed(models[1], tmp_path / "other", {"rms_norm_eps": 1e-3})
    assert any("`rms_norm_eps`" in note for note in merged(tmp_path / "out", tmp_path / "short", other).notes)


def test_settings_that_change_nothing_are_not_noted(models, tmp_path):
    idle = {"use_cache": False, "transformers_version": "4.1", "attention_dropout": 0.5, "_name_or_path": "x"}
    other = changed(models[1], tmp_path / "other", idle)
    assert merged(tmp_path / "out", models[0], other).notes == []


def test_other_heads_of_attention_are_refused(models, tmp_path):
    """The matrices have one shape, but their rows belong to other heads."""
    other = changed(models[1], tmp_path / "other", {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 2})
    with pytest.raises(ValueError, match=r"all models must have the same `num_attention_heads`, but .* has 2, .* 4"):
        merged(tmp_path / "out", models[0], other)


def test_a_tensor_that_the_reference_lacks_is_said(tmp_path):
    torch.manual_seed(0)
    whole = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False))
    folder = saved(tmp_path / "lacking", whole)
    held = load_file(folder / "model.safetensors")
    del held[HEAD]
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    report = merge({"merge_method": "passthrough", "models": [{"model": str(folder)}]}, tmp_path / "out", verify=True)
    assert "missing or left over as in the reference model: lm_head.weight" in report.summary()


# --- what lies beside the weights ------------------------------------------------------------------------------------


def notes_of(folder, *models, **more):
    return "\n".join(merged(folder, *models, **more).notes)


def test_a_chat_template_that_is_not_taken_over_is_noted(models, tmp_path):
    other = changed(models[1], tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages }}")
    assert f"the chat template of {other} is not taken over, the result has none" in notes_of(
        tmp_path / "out", models[0], other
    )
    assert "chat template of" not in notes_of(tmp_path / "chosen", models[0], other, chat_template=str(other))
    assert "chat template of" not in notes_of(tmp_path / "first", other, models[1])


def test_other_ends_of_texts_are_noted(models, tmp_path):
    other = changed(models[1], tmp_path / "other")
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "transformers_version": "4"}))
    notes = notes_of(tmp_path / "out", models[0], other)
    assert f"how to generate is not taken over from {other}: the result has `eos_token_id` 2, not [2, 5]" in notes


def test_a_tokenizer_that_is_not_taken_over_is_noted(models, tmp_path):
    other = changed(models[1], tmp_path / "other")
    (other / "tokenizer_config.json").write_text("{}")
    assert f"no tokenizer or processor, but {other} has one" in notes_of(tmp_path / "out", models[0], other)


# --- what a recipe says to no effect ---------------------------------------------------------------------------------


@pytest.mark.parametrize("filter", ["q_prj", "lm_head"])
def test_a_filter_that_fits_nothing_is_noted(filter, models, tmp_path):
    """Such as a mistyped one, or one for a head that is tied and not there."""
    weight = [{"filter": filter, "value": 0}, {"filter": "mlp", "value": 0.5}, {"value": 1}]
    notes = notes_of(tmp_path / "out", *models, parameters={"weight": weight})
    assert f"the filter {filter!r} fits the name of no tensor" in notes
    assert "'mlp'" not in notes


def test_keys_without_a_value_are_as_good_as_none(models, tmp_path):
    entries = [{"model": str(model), "parameters": None} for model in models]
    empty = dict.fromkeys(["parameters", "slices", "modules", "dtype", "tokenizer", "seed", "vocab", "heads"])
    merge({"merge_method": "linear", "models": entries, **empty}, tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="there is no such key"):
        merge({"merge_method": "linear", "models": entries, "modul": None}, tmp_path / "other", progress=False)


def test_buffers_of_old_checkpoints_are_no_part_of_a_model(models, tmp_path):
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    old = changed(models[0], tmp_path / "old", tensors=buffer)
    for i, pair in enumerate([(old, models[1]), (models[1], old)]):
        assert "rotary_emb.inv_freq" in notes_of(tmp_path / f"out{i}", *pair)
        assert tensors(tmp_path / f"out{i}").keys() == tensors(models[1]).keys()


def test_tokens_of_other_numbers_are_refused_or_noted(models, tmp_path):
    given = []
    for i, (model, words) in enumerate(zip(models, ("abc", "acb"), strict=True)):
        given.append(changed(model, tmp_path / f"of{i}"))
        vocabulary = {word: number for number, word in enumerate(words)}
        content = {"version": "1.0", "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"}}
        (given[-1] / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must give a token the same number, but 2 of 3"):
        merged(tmp_path / "out", *given)
    assert "rows of different tokens were merged" in notes_of(tmp_path / "out", *given, vocab="pad")
