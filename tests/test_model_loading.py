"""Models and texts by name, and the commands that use them."""

import json
import sys

import peft
import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from hf_modular import cli, fisher_information
from hf_modular.checkpoints import Checkpoint
from hf_modular.fisher import _loading

WORDS = ["[PAD]", "[UNK]", "the", "cat", "dog", "sat", "ran", "away"]
ROWS = [
    {"text": "the cat sat", "second": "the dog", "label": 0, "id": "a"},
    {"text": "the dog ran away", "second": "away", "label": 1, "id": "b"},
    {"text": "the cat ran", "second": "cat", "label": 1, "id": "c"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier with a tokenizer, an adapter on it, and data."""
    path = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2
    )
    model = BertForSequenceClassification(config)
    model.save_pretrained(path / "model")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(path / "model")
    reloaded = BertForSequenceClassification.from_pretrained(path / "model")
    adapted = peft.get_peft_model(reloaded, peft.LoraConfig(target_modules=["query"], init_lora_weights=False))
    adapted.save_pretrained(path / "adapter")
    (path / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    Dataset.from_list(ROWS).save_to_disk(path / "saved")
    DatasetDict({"test": Dataset.from_list(ROWS)}).save_to_disk(path / "splits")
    return path


def test_a_model_and_an_adapter(folder):
    model = _loading.load_model(str(folder / "model"))
    assert isinstance(model, BertForSequenceClassification)
    adapted = _loading.load_model(str(folder / "adapter"))
    assert isinstance(adapted, peft.PeftModel)
    assert any("lora_A" in name for name in adapted.state_dict())


def test_a_config_without_an_architecture_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="must name an architecture of transformers, but has None"):
        _loading.load_model(str(tmp_path))


@pytest.mark.parametrize(("name", "split"), [("data.jsonl", "train"), ("saved", "train"), ("splits", "test")])
@pytest.mark.parametrize("tokenizer", ["model", "adapter"])
def test_texts_become_tokens(folder, name, split, tokenizer):
    rows = _loading.load_texts(str(folder / name), split, str(folder / tokenizer), ["text"], max_length=3)
    assert rows["input_ids"][:] == [[2, 3, 5], [2, 4, 6], [2, 3, 6]]
    assert rows["labels"][:] == [0, 1, 1]
    assert not {"text", "second", "id"} & set(rows.column_names)


def test_pairs_choices_and_tokens(folder):
    data, model = str(folder / "data.jsonl"), str(folder / "model")
    pairs = _loading.load_texts(data, "train", model, ["text", "second"])
    assert pairs["input_ids"][0] == [2, 3, 5, 2, 4]
    two = [_loading.load_texts(data, "train", model, ["text"], examples=2, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert all(len(rows) == 2 for rows in two)
    assert two[0]["input_ids"][:] == two[1]["input_ids"][:]
    assert len({str(rows["input_ids"][:]) for rows in two}) > 1
    assert _loading.load_texts(data, "train", model, []).column_names == ["text", "second", "labels", "id"]


def test_what_is_not_there_is_named(folder, tmp_path):
    model = str(folder / "model")
    with pytest.raises(
        ValueError, match=r"must have the columns \['body'\], but has \['text', 'second', 'label', 'id'\]"
    ):
        _loading.load_texts(str(folder / "saved"), "train", model, ["body"])
    (tmp_path / "data.xls").write_text("")
    with pytest.raises(ValueError, match=r"a data file must be one of .*csv"):
        _loading.load_texts(str(tmp_path / "data.xls"), "train", model, ["text"])


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["hf-modular", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_fisher_command(folder, tmp_path, monkeypatch, capsys):
    common = [folder / "data.jsonl", tmp_path / "fisher", "--text", "text", "--text", "second", "--device", "cpu"]
    assert run(monkeypatch, "fisher", folder / "model", *common) == 0
    assert "the Fisher information on 3 examples is in" in capsys.readouterr().out
    rows = _loading.load_texts(str(folder / "data.jsonl"), "train", str(folder / "model"), ["text", "second"])
    expected = fisher_information(_loading.load_model(str(folder / "model")), rows)
    with Checkpoint(tmp_path / "fisher") as found:
        assert all(torch.equal(found.read(name), tensor) for name, tensor in expected.items())
    assert run(monkeypatch, "fisher", folder / "model", *common, "--overwrite", "-q", "--labels", "wrong") == 2
    assert "`labels` must be one of" in capsys.readouterr().err


def test_the_fisher_command_on_an_adapter(folder, tmp_path, monkeypatch):
    options = ["--dtype", "bfloat16", "--merged", "--examples", 2, "--include", "query", "-q"]
    assert run(monkeypatch, "fisher", folder / "adapter", folder / "saved", tmp_path / "out", *options) == 0
    with Checkpoint(tmp_path / "out") as found:
        assert {tensor.dtype for tensor in found.tensors.values()} == {torch.bfloat16}
        names = {f"bert.encoder.layer.0.attention.self.query.{part}" for part in ("weight", "bias")}
        assert found.tensors.keys() == names
