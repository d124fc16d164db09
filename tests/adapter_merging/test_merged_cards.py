"""The cards of adapters that were merged or extracted: what they were made from, how near they are, and no paths."""

import pytest
from adapters import tiny
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from adapter_merging.zoo import adapted, lora
from hf_modular import RMMConfig, extract_adapter, merge_adapter_files, merge_adapters
from hf_modular.cards._artifact import read_artifact
from hf_modular.cards._card import make_card
from hf_modular.merging import LinearConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Parents of known licences in the Hub's cache, and no other test's models."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def parents(tmp_path):
    """Folders of adapters, two with a licence."""
    model = adapted(*(lora(target_modules=["fc", "conv2"]) for _ in range(3)))
    for name in model.peft_config:
        model.save_pretrained(tmp_path / "secret", selected_adapters=[name])
    for name, terms in {"first": "cc-by-nc-4.0", "second": "mit"}.items():
        (tmp_path / "secret" / name / "README.md").write_text(f"---\nlicense: {terms}\n---\n")
    return [tmp_path / "secret" / name for name in model.peft_config]


def card(folder):
    return make_card(read_artifact(folder))


def recipe(method, folders, **more):
    return {"merge_method": method, "models": [{"model": str(folder)} for folder in folders], **more}


def test_of_many_tasks(parents, tmp_path):
    merge_adapter_files(recipe("rmm", parents, parameters={"p": 1}, warn_above=9), tmp_path / "out")
    made = card(tmp_path / "out")
    text = made.content.text
    config = PeftModel.from_pretrained(adapted(lora()).unload(), tmp_path / "out").peft_config["default"]
    for task in ("first", "second", "third"):
        assert f"| `{task}` | {config.errors[task]:.3g} |" in text
    assert "and it has 0.917 of the numbers that the adapters have." in text
    assert 'model.set_task("first")  # or "second", "third"' in text
    assert "directions in which they may differ (1 at most)" in text
    assert "trained parameters" not in text
    assert "merge_method: rmm" in text
    assert "| `first` (a local folder, not on the Hub) | `cc-by-nc-4.0` |" in text
    published = [text, *made.subject.public.values()]
    assert {"merge_recipe.yaml", "merge_report.json"} <= made.subject.public.keys()
    assert all("secret" not in each and str(tmp_path) not in each for each in published)


def test_licences_of_what_was_merged_count(parents, tmp_path):
    merge_adapter_files(recipe("linear", parents[:2]), tmp_path / "out")
    verdict = card(tmp_path / "out").verdict
    assert verdict.terms is None or verdict.terms.id != "mit"


def test_of_one_that_was_merged_in_memory(tmp_path):
    model = adapted(lora(), lora())
    merge_adapters(model, ["first", "second"], LinearConfig(), output_dir=tmp_path / "out")
    text = card(tmp_path / "out").content.text
    assert "Merged by `linear`." in text
    assert "| `adapter 'first'` | unknown |" in text
    assert "The recipe" not in text
    merge_adapters(model, ["first", "second"], RMMConfig(p=1), output_dir=tmp_path / "rmm")
    assert "Merged by `rmm`." in card(tmp_path / "rmm").content.text


def test_of_one_that_was_extracted(tmp_path):
    model = tiny.model("llama")
    model.save_pretrained(tmp_path / "secret" / "base")
    state = load_file(tmp_path / "secret" / "base" / "model.safetensors")
    (tmp_path / "secret" / "tuned").mkdir()
    name = "model.layers.0.self_attn.q_proj.weight"
    state[name] = state[name] + 0.1
    save_file(state, tmp_path / "secret" / "tuned" / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(tmp_path / "secret" / "tuned")
    folders = [tmp_path / "secret" / name for name in ("base", "tuned")]
    extract_adapter(*folders, LoraConfig(r=1, target_modules=["q_proj"]), tmp_path / "out")
    made = card(tmp_path / "out")
    assert "Extracted from the difference of a fine-tuned model and its base." in made.content.text
    assert "| `tuned` (a local folder, not on the Hub) | unknown |" in made.content.text
    assert all("secret" not in text for text in [made.content.text, *made.subject.public.values()])


def test_a_classifiers_card_names_its_class(tmp_path):
    for seed in (1, 2):
        config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
        model = tiny.move(get_peft_model(tiny.model("classifier"), config), seed)
        model.save_pretrained(tmp_path / str(seed))
    tiny.model("classifier").save_pretrained(tmp_path / "base")
    more = {"parameters": {"p": 1}, "warn_above": 9, "base_model": str(tmp_path / "base")}
    merge_adapter_files(recipe("rmm", [tmp_path / "1", tmp_path / "2"], **more), tmp_path / "out")
    text = card(tmp_path / "out").content.text
    assert "AutoModelForSequenceClassification" in text
    loaded = PeftModel.from_pretrained(tiny.model("classifier"), tmp_path / "out")
    assert loaded.tasks == ["1", "2"]
