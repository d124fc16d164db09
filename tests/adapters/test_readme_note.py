"""A saved adapter says in its folder what to import before it can be loaded."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import get_peft_model

from adapters import tiny
from adapters.table import METHODS
from hf_modular import HUTConfig
from hf_modular.adapters._readme import add_loading_note
from hf_modular.testing import AdapterCase

NOTE = "import hf_modular"


@pytest.mark.parametrize("case", METHODS, ids=str)
def test_every_saved_adapter_has_it(case: AdapterCase, tmp_path: Path) -> None:
    model = get_peft_model(tiny.model("llama"), case.config())
    model.add_adapter("second", case.config())
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "second"):
        text = (folder / "README.md").read_text()
        assert text.count(NOTE) == 1
        assert case.config_class.type_name in text
        assert ModelCard(text).data.library_name == "peft"
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().count(NOTE) == 1


def test_it_stands_behind_the_metadata_and_before_the_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nText.\n")
    add_loading_note(tmp_path, "HFM_HUT", "some/model")
    text = (tmp_path / "README.md").read_text()
    assert ModelCard(text).data.license == "mit"
    assert text.index("license: mit") < text.index(NOTE) < text.index("# Mine")
    assert text.endswith("# Mine\n\nText.\n")


def test_a_text_without_metadata_keeps_its_words(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("Mine.\n---\nNot metadata.\n")
    add_loading_note(tmp_path, "HFM_HUT", None)
    text = (tmp_path / "README.md").read_text()
    assert text.endswith("Mine.\n---\nNot metadata.\n")
    assert NOTE in text


@pytest.mark.parametrize(
    ("base_model", "named"),
    [("some/model", "some/model"), ("gpt2", "gpt2"), ("/home/me/model", None), ("../model", None), (None, None)],
)
def test_only_a_model_of_the_hub_is_named_as_the_base(
    tmp_path: Path, base_model: str | None, named: str | None
) -> None:
    """A path on this computer says nothing to others, and the Hub refuses it."""
    HUTConfig(base_model_name_or_path=base_model).save_pretrained(str(tmp_path))
    assert ModelCard.load(tmp_path / "README.md").data.base_model == named


def test_a_folder_with_the_name_of_a_model_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    HUTConfig(base_model_name_or_path="checkpoint").save_pretrained(str(tmp_path / "adapter"))
    assert ModelCard.load(tmp_path / "adapter" / "README.md").data.base_model is None
