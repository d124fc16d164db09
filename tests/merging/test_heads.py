"""Models with different heads: refused by default, or one head is kept and the rest merged."""

import json

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_modular.checkpoints import Checkpoint
from hf_modular.merging import merge

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
KINDS = {
    "two": (BertForSequenceClassification, {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}),
    "other": (BertForSequenceClassification, {"id2label": {0: "ham", 1: "spam"}, "label2id": {"ham": 0, "spam": 1}}),
    "unnamed": (BertForSequenceClassification, {"num_labels": 2}),
    "five": (BertForSequenceClassification, {"num_labels": 5, "problem_type": "multi_label_classification"}),
    "words": (BertForMaskedLM, {}),
}


@pytest.fixture(scope="module")
def berts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("berts")
    for seed, (name, (kind, settings)) in enumerate(KINDS.items()):
        torch.manual_seed(seed)
        kind(BertConfig(vocab_size=32, **SMALL, **settings)).save_pretrained(folder / name)
    return {name: str(folder / name) for name in KINDS}


def read(folder):
    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def average(*models, **more):
    return {"merge_method": "linear", "models": [{"model": model} for model in models]} | more


def refusal(recipe, folder):
    with pytest.raises(ValueError, match="merge cannot begin") as error:
        merge(recipe, folder / "out")
    assert not (folder / "out").exists()
    return str(error.value)


def test_different_heads_are_refused_with_the_ways_out(berts, tmp_path):
    message = refusal(average(berts["two"], berts["five"]), tmp_path)
    expected = (
        f"the heads of the models differ in classifier.bias, classifier.weight: {berts['two']} has (2,), (2, 16); "
        f"{berts['five']} has (5,), (5, 16): choose one with `heads: base`, or with a model's name"
    )
    assert expected in message
    assert message.count("\n") == 1


def test_labels_that_mean_different_things_are_refused(berts, tmp_path):
    message = refusal(average(berts["two"], berts["other"]), tmp_path)
    assert f"the labels of {berts['two']} and {berts['other']} differ: bad, good and ham, spam" in message
    merge(average(berts["two"], berts["unnamed"]), tmp_path / "fine")


@pytest.mark.parametrize(("heads", "kept"), [("base", "two"), ("five", "five")])
def test_one_head_is_kept_and_the_rest_is_merged(berts, tmp_path, heads, kept):
    recipe = average(berts["two"], berts["five"], heads=berts.get(heads, heads), dtype="bfloat16")
    merge(recipe, tmp_path / "out")
    out, two, five, head = map(read, (tmp_path / "out", berts["two"], berts["five"], berts[kept]))
    assert out.keys() == two.keys()
    for name, tensor in out.items():
        expected = head[name] if name.startswith("classifier") else (two[name] + five[name]) / 2
        assert torch.equal(tensor, expected.bfloat16())
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    own = AutoModelForSequenceClassification.from_pretrained(berts[kept])
    assert model.config.id2label == own.config.id2label
    assert model.config.problem_type == own.config.problem_type
    assert (
        merge(tmp_path / "out/merge_recipe.yaml", tmp_path / "again").outputs == merge(recipe, tmp_path / "2").outputs
    )


def test_a_head_of_another_kind(berts, tmp_path):
    message = refusal(average(berts["two"], berts["words"]), tmp_path)
    assert "the heads of the models differ in bert.pooler.dense.bias" in message
    merge(average(berts["two"], berts["words"], heads=berts["words"]), tmp_path / "out")
    out, two, words = map(read, (tmp_path / "out", berts["two"], berts["words"]))
    assert out.keys() == words.keys()
    assert torch.equal(out["cls.predictions.bias"], words["cls.predictions.bias"])
    name = "bert.encoder.layer.1.output.dense.weight"
    assert torch.equal(out[name], (two[name] + words[name]) / 2)
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["BertForMaskedLM"]
    AutoModelForMaskedLM.from_pretrained(tmp_path / "out")


def test_images(tmp_path):
    for labels in (3, 4):
        config = ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=labels, **SMALL)
        ViTForImageClassification(config).save_pretrained(tmp_path / str(labels))
    merge(average(str(tmp_path / "3"), str(tmp_path / "4"), heads=str(tmp_path / "4")), tmp_path / "out")
    model = ViTForImageClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(model.classifier.weight, read(tmp_path / "4")["classifier.weight"])
    assert model.config.num_labels == 4


def test_slices_and_heads(berts, tmp_path):
    slices = [{"sources": [{"model": berts[name], "layer_range": [0, 2]}]} for name in ("two", "five")]
    merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "last")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "last").config.num_labels == 5
    merge({"merge_method": "passthrough", "slices": slices, "heads": "base"}, tmp_path / "base")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").config.num_labels == 2


def test_no_head(tmp_path):
    for name in ("a", "b"):
        BertForMaskedLM(BertConfig(vocab_size=32, **SMALL)).bert.save_pretrained(tmp_path / name)
    message = refusal(average(str(tmp_path / "a"), str(tmp_path / "b"), heads="base"), tmp_path)
    assert "has no head that could be told from the rest of it" in message
