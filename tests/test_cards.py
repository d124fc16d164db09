"""Cards of folders, made without asking anybody."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData, constants
from safetensors.torch import save_file

from hf_modular.cards import save_card
from hf_modular.cards._licenses import Terms, resolve, stated_terms
from hf_modular.cards._origins import is_hub_id, trace
from hf_modular.cards._text import read_card

PEFT_CARD = ModelCard.from_template(ModelCardData()).content + "\n### Framework versions\n\n- PEFT 0.21.2"
TRAINER_CARD = """\
---
license: mit
tags:
- generated_from_trainer
---

<!-- This model card has been generated automatically according to the information the Trainer had access to. You
should probably proofread and complete it, then remove this comment. -->

# run

This model is a fine-tuned version of [a/b](https://huggingface.co/a/b) on an unknown dataset.
It achieves the following results on the evaluation set:
- Loss: 0.5
- Accuracy: 0.9

## Model description

More information needed

## Training procedure

### Training hyperparameters

The following hyperparameters were used during training:
- learning_rate: 0.001

### Framework versions

- PEFT 0.21.2
- Transformers 5.23.0
"""
LOADING_NOTE = """\
## Loading this adapter

Its type comes from a package.

```python
import hf_modular
```
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub, so that no other test's models are found in it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA adapter of two layers with a classifier of five classes."""
    folder = tmp_path / "my-adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}
    config |= {"base_model_name_or_path": "org/base", "revision": None, "bias": "none", "target_modules": ["q", "k"]}
    tensors = {f"base_model.model.{i}.q.lora_A.weight": torch.ones(3, 7) for i in range(2)}
    tensors |= {f"base_model.model.{i}.q.lora_B.weight": torch.ones(5, 3) for i in range(2)}
    tensors |= {"base_model.model.classifier.weight": torch.ones(5, 4)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def configure(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def saved(folder: Path, **facts: Any) -> ModelCard:
    return ModelCard.load(save_card(folder, **facts))


def in_cache(cache: Path, repo_id: str, card: str) -> Path:
    """Put a repository into the Hub's cache, as a download does."""
    folder = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("c" * 40)
    (snapshot / "README.md").write_text(card)
    return snapshot


# ---- licences

MIT, APACHE, LLAMA = Terms("mit"), Terms("apache-2.0"), Terms("llama3")


@pytest.mark.parametrize(
    ("parents", "stated", "needs_consent"),
    [
        ([MIT], MIT, False),
        ([MIT, MIT], MIT, False),
        ([LLAMA], LLAMA, False),
        ([LLAMA, LLAMA], LLAMA, False),
        ([MIT, APACHE], APACHE, False),
        ([Terms("cc-by-4.0"), MIT, APACHE], Terms("cc-by-4.0"), False),
        ([LLAMA, MIT], Terms("other", "llama3-and-mit"), True),
        ([Terms("cc-by-nc-4.0"), Terms("cc-by-4.0")], Terms("other", "cc-by-4.0-and-cc-by-nc-4.0"), True),
        ([Terms("other", "a"), Terms("other", "b")], Terms("other", "a-and-b"), True),
        ([Terms("other", "a", "x"), Terms("other", "a", "x")], Terms("other", "a", "x"), False),
        ([], None, False),
        ([None], None, False),
        ([MIT, None], None, False),
        ([LLAMA, None], None, True),
    ],
)
def test_the_licence_of_a_child(parents, stated, needs_consent):
    verdict = resolve({f"parent {i}": terms for i, terms in enumerate(parents)})
    assert (verdict.terms, verdict.needs_consent) == (stated, needs_consent)


@pytest.mark.parametrize(
    ("metadata", "terms"),
    [
        ({"license": "MIT"}, MIT),
        ({"license": ["mit"]}, MIT),
        ({"license": ["mit", "apache-2.0"]}, None),
        ({"license": "unknown"}, None),
        ({"licence": "license"}, None),  # what TRL writes
        ({"license": "other", "license_name": "x", "license_link": "y"}, Terms("other", "x", "y")),
        ({}, None),
    ],
)
def test_the_licence_that_a_card_states(metadata, terms):
    assert stated_terms(metadata) == terms


def test_the_licence_of_the_base_is_inherited_from_the_cache(adapter, cache):
    assert "license" not in saved(adapter).data.to_dict()
    assert "Unknown: no licence is stated for org/base." in saved(adapter).text
    in_cache(cache, "org/base", "---\nlicense: apache-2.0\n---\n")
    assert saved(adapter).data.license == "apache-2.0"
    assert "`apache-2.0`: the licence of org/base." in saved(adapter).text


def test_a_stated_licence_stays_and_an_inherited_one_is_found_anew(adapter, cache):
    snapshot = in_cache(cache, "org/base", "---\nlicense: mit\n---\n")
    assert saved(adapter).data.license == "mit"
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert saved(adapter).data.license == "apache-2.0"
    assert saved(adapter, license="bsd-3-clause").data.license == "bsd-3-clause"
    assert saved(adapter).data.license == "bsd-3-clause"
    edited = (adapter / "README.md").read_text().replace("license: bsd-3-clause", "license: isc")
    (adapter / "README.md").write_text(edited)
    assert saved(adapter).data.license == "isc"


# ---- where a model comes from


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("org/base", True),
        ("gpt2", True),
        ("/home/me/base", False),
        ("./base", False),
        ("~/base", False),
        ("a/b/c", False),
        ("C:\\models\\base", False),
        ("output/checkpoint-500", False),
    ],
)
def test_what_can_be_an_id(name, answer):
    assert is_hub_id(name) is answer


def test_a_folder_here_is_no_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("org/base").mkdir(parents=True)
    assert not is_hub_id("org/base")
    assert trace("org/base").label == "base"


@pytest.mark.parametrize("path", ["/home/me/base", "C:\\Users\\me\\base", "../me/base/", "/home/me/base/"])
def test_a_path_is_not_told(path):
    origin = trace(path)
    assert (origin.id, origin.label) == (None, "base")


def test_a_snapshot_of_the_cache_is_its_repository(cache):
    snapshot = in_cache(cache, "org/base-v2", "---\nlicense: mit\n---\n")
    origin = trace(str(snapshot))
    assert (origin.id, origin.revision, origin.terms) == ("org/base-v2", "c" * 40, MIT)


def test_what_a_config_claims_is_marked_as_unchecked(tmp_path):
    (tmp_path / "config.json").write_text('{"_name_or_path": "org/base"}')
    origin = trace(str(tmp_path))
    assert origin.id == "org/base"
    assert "was not checked" in origin.note


def test_a_local_folder_has_the_licence_of_its_card(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert trace(str(tmp_path)).terms == MIT


# ---- whose text it is


@pytest.mark.parametrize(
    "text",
    [
        "",
        "---\nlicense: mit\n---\n",
        PEFT_CARD,
        PEFT_CARD.replace("---\n\n#", "---\n\n" + LOADING_NOTE + "\n#"),
        LOADING_NOTE,
        TRAINER_CARD,
        TRAINER_CARD.replace("\n", "\r\n"),
    ],
    ids=["nothing", "metadata", "PEFT", "HUT", "note", "Trainer", "CRLF"],
)
def test_a_template_is_nobodys_text(text):
    assert read_card(text).body is None


@pytest.mark.parametrize(
    "text",
    [
        "# Mine\n",
        "---\nlicense: mit\n---\n\nMy model.\n",
        PEFT_CARD.replace("- **Developed by:** [More Information Needed]", "- **Developed by:** me"),
        TRAINER_CARD.replace("More information needed", "A model of verse."),
        LOADING_NOTE + "\nMine.\n",
    ],
)
def test_a_text_that_somebody_wrote(text):
    body = read_card(text).body
    assert body
    assert text.endswith(body)


def test_the_trainers_account_is_carried_over(adapter):
    (adapter / "README.md").write_text(TRAINER_CARD)
    for _ in range(2):  # and again from our own card
        card = saved(adapter)
        procedure = card.text.split("## Training procedure\n")[1].split("\n## ")[0]
        assert "- learning_rate: 0.001" in procedure
        assert "Transformers" not in procedure
        assert "generated_from_trainer" in card.data.tags
        assert "a/b" not in card.text
    (adapter / "README.md").write_text(TRAINER_CARD)
    for _ in range(2):
        assert "- Loss: 0.5\n- Accuracy: 0.9" in saved(adapter).text.split("## Evaluation")[1].split("\n## ")[0]


# ---- the card


def test_a_card_made_twice_is_the_same(adapter):
    first = save_card(adapter).read_text()
    assert save_card(adapter).read_text() == first


def test_our_own_text_is_made_anew_until_somebody_edits_it(adapter):
    save_card(adapter)
    configure(adapter, r=9)
    assert "| `r` | `9` |" in saved(adapter).text
    text = (adapter / "README.md").read_text().replace("Unknown: none were stated.", "For verse only.")
    (adapter / "README.md").write_text(text)
    configure(adapter, r=11)
    card = saved(adapter)
    assert "For verse only." in card.text
    assert "| `r` | `9` |" in card.text


def test_what_a_card_was_told_stays_when_it_is_made_anew(adapter):
    told = {
        "summary": "Verse, line by line.\n\nIt rhymes.",
        "training_data": "A thousand\n\nsonnets.",
        "training_procedure": "### Optimizer\n\nAdamW.",
        "limits": "For verse only.",
    }
    first = saved(adapter, **told).content
    assert all(text in first for text in told.values())
    assert saved(adapter).content == first
    configure(adapter, r=9)
    again = saved(adapter, limits="For sonnets only.").text
    assert "| `r` | `9` |" in again
    assert "For verse only." not in again
    assert "For sonnets only." in again
    assert told["training_data"] in again
    for _ in range(2):
        section = saved(adapter, datasets=["org/sonnets"]).text.split("## Training data\n\n")[1].split("\n## ")[0]
        page = "https://huggingface.co/datasets/org/sonnets"
        assert section == f"{told['training_data']}\n\nDatasets: [org/sonnets]({page})\n"


def test_the_facts_of_an_adapter(adapter):
    card = saved(adapter)
    assert card.data.to_dict() == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": ["hf-modular", "lora", "base_model:adapter:org/base"],
    }
    assert "# my-adapter\n" in card.text
    assert "| adapter, on 2 layers | 72 |" in card.text
    assert "| modules trained whole | 20 |" in card.text
    assert "| `target_modules` | `k, q` |" in card.text
    assert "`base_model_name_or_path`" not in card.text
    assert 'from_pretrained("org/base", num_labels=5, ignore_mismatched_sizes=True)' in card.text
    assert "import hf_modular" not in card.text


def test_a_type_of_ours_says_what_to_import(adapter):
    configure(adapter, peft_type="HFM_HUT")
    text = saved(adapter).text
    assert "import hf_modular  # registers the adapter type HFM_HUT with PEFT" in text
    assert "KeyError: 'HFM_HUT'" in text
    assert "[arXiv 2409.13501](https://arxiv.org/abs/2409.13501)" in text
    (adapter / "README.md").write_text("Written by hand.\n")
    text = saved(adapter).text
    assert text.startswith("Written by hand.\n")
    assert "import hf_modular" in text
    assert saved(adapter).text == text


def test_a_base_model_that_is_no_model_of_transformers(adapter):
    mapping = {"base_model_class": "MyNet", "parent_library": "my.nets"}
    configure(adapter, task_type=None, auto_mapping=mapping, base_model_name_or_path=None)
    text = saved(adapter).text
    assert "base = ...  # your MyNet" in text
    assert "put yours in the place of `...`" in text
    assert "## Base model\n\nUnknown: none was stated." in text


def test_a_base_that_only_the_caller_knows(adapter):
    configure(adapter, base_model_name_or_path="/home/me/base")
    assert "base_model" not in saved(adapter).data.to_dict()
    assert "/home/me" not in (adapter / "README.md").read_text()
    assert saved(adapter, base_model="org/known").data.base_model == "org/known"


def test_metadata_that_a_program_wrote_tell_no_path(adapter):
    configure(adapter, base_model_name_or_path="/home/me/base")
    metadata = "base_model: /home/me/base\nlicence: license\ntags:\n- base_model:adapter:/home/me/base\n- verse\n"
    (adapter / "README.md").write_text(f"---\n{metadata}language: de\n---\n")
    card = saved(adapter)
    assert "/home/me" not in card.content
    assert card.data.to_dict()["tags"] == ["verse", "hf-modular", "lora"]
    assert card.data.language == "de"
    assert "licence" not in card.data


def test_results_stay_when_the_card_is_made_anew(adapter):
    result = EvalResult("text-classification", "org/verse", "Verse", "accuracy", 0.75, dataset_split="test")
    saved(adapter, metrics=[result])
    card = saved(adapter)
    assert card.data.eval_results == [result]
    assert "| Verse | test | accuracy | 0.75 |" in card.text


def test_a_setting_cannot_break_the_table(adapter):
    configure(adapter, target_modules=r".*\.(q|k)", note="a\nb`c")
    text = saved(adapter).text
    assert r"| `target_modules` | `.*\.(q\|k)` |" in text
    assert "| `note` | `a b'c` |" in text
