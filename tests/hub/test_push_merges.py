"""Publishing merged models: their parents, their recipe, their licence."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CONFIGS, snippet
from huggingface_hub import ModelCard
from safetensors.torch import load
from server import Hub

from hf_modular import merge, push_to_hub

REPO = "tester/merged"
SHA = "ab" * 32


@pytest.fixture
def merged(bases: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A merged model with its recipe and report."""

    def make(base: str, *models: str) -> Path:
        folder = tmp_path / "merged"
        CONFIGS["llama"][0].from_pretrained(bases["llama"]).save_pretrained(folder)
        entries = [{"model": model, "parameters": {"weight": 0.5 + i}} for i, model in enumerate(models)]
        recipe = {"merge_method": "dare_linear", "base_model": base, "models": entries, "parameters": {"density": 0.5}}
        (folder / "merge_recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        inputs = [{"model": m, "files": {"model.safetensors": {"sha256": SHA}}} for m in (base, *models)]
        report = {"merge_method": "dare", "seed": 7, "inputs": inputs, "notes": [f"the tokenizer is that of {base}"]}
        report |= {"seconds": 1.25, "peak_memory": 2_500_000_000, "device": "cpu", "versions": {"torch": "2.13.0"}}
        (folder / "merge_report.json").write_text(json.dumps(report))
        return folder

    return make


def card_of(hub: Hub) -> ModelCard:
    return ModelCard(hub.repos[REPO].files["README.md"].data.decode())


def parents(publish: Callable[..., str], folder: Path, *licenses: str | None) -> list[str]:
    """Repositories under these licences."""
    cards = [f"---\nlicense: {name}\n---\n" if name else "---\ntags: []\n---\n" for name in licenses]
    return [publish(folder, f"tester/parent-{i}", card) for i, card in enumerate(cards)]


def test_parents_on_the_hub(hub, bases, merged, publish):
    names = parents(publish, bases["llama"], "apache-2.0", "mit", "mit")
    folder = merged(names[0], f"{names[1]}@main", names[2])
    push_to_hub(folder, REPO)
    card = card_of(hub)
    assert card.data.to_dict() == {
        "base_model": names,
        "base_model_relation": "merge",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["hf-modular", "merge", "dare"],
    }
    page = "https://huggingface.co/tester/parent"
    assert f"| [tester/parent-0]({page}-0) | `{SHA}` | base | `apache-2.0` |" in card.text
    assert f"| [tester/parent-1]({page}-1) | `main` | `0.5` | `mit` |" in card.text
    assert "[arXiv 2311.03099](https://arxiv.org/abs/2311.03099)" in card.text
    assert "(run with seed 7)" in card.text
    assert "Merged in 1.2 s with 2.5 GB of memory on `cpu` by torch 2.13.0." in card.text
    recipe = (folder / "merge_recipe.yaml").read_text()
    assert f"```yaml\n{recipe.strip()}\n```" in card.text
    assert hub.repos[REPO].files["merge_recipe.yaml"].data.decode() == recipe
    names_of_code: dict[str, Any] = {}
    exec(snippet(card.text), names_of_code)
    assert names_of_code["model"].config.hidden_size == 32


def test_a_merge_of_repositories_is_pinned_and_can_be_run_again(hub, bases, publish, tmp_path):
    names = parents(publish, bases["llama"], "mit", "mit")
    expert = CONFIGS["llama"][0].from_pretrained(names[0])
    with torch.no_grad():
        expert.lm_head.weight.add_(torch.ones(32))
    expert.save_pretrained(tmp_path / "expert")
    publish(tmp_path / "expert", names[1], "---\nlicense: mit\n---\n")
    models = [{"model": names[1], "parameters": {"weight": 0.5}}]
    recipe = {"merge_method": "dare", "base_model": names[0], "models": models, "parameters": {"drop": 0.5}, "seed": 3}
    merge(recipe, tmp_path / "merged", progress=False)
    push_to_hub(tmp_path / "merged", REPO)
    card = card_of(hub)
    assert (card.data.base_model, card.data.license) == (names, "mit")
    for name in names:
        assert f"| [{name}](https://huggingface.co/{name}) | `{hub.repos[name].heads['main']}` |" in card.text
    assert "makes the same weights again, bit for bit." in card.text
    assert "(run with seed 3)" in card.text
    embedded = re.search(r"```yaml\n(.*?)```", card.text, re.DOTALL)
    (tmp_path / "again.yaml").write_text(embedded[1])
    merge(tmp_path / "again.yaml", tmp_path / "again", progress=False)
    weights = hub.repos[REPO].files["model.safetensors"].data
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights
    names_of_code: dict[str, Any] = {}
    exec(snippet(card.text), names_of_code)
    assert torch.equal(names_of_code["model"].lm_head.weight, load(weights)["lm_head.weight"])


def test_no_path_of_a_parent_is_told(hub, bases, merged, publish, tmp_path):
    publish(bases["llama"], "tester/parent")
    local = [tmp_path / "expert-a", tmp_path / "expert-b"]
    for folder in local:
        folder.mkdir()
    push_to_hub(merged("tester/parent", *map(str, local)), REPO)
    content = b"".join(blob.data for blob in hub.repos[REPO].files.values())
    assert str(tmp_path).encode() not in content
    card = card_of(hub)
    assert card.data.base_model == "tester/parent"
    assert f"| `expert-a` (a local folder, not on the Hub) | `{SHA}` | `0.5` | unknown |" in card.text
    recipe = yaml.safe_load(hub.repos[REPO].files["merge_recipe.yaml"].data)
    assert [entry["model"] for entry in recipe["models"]] == ["path/to/expert-a", "path/to/expert-b"]
    assert "for whoever has `expert-a`, `expert-b`" in card.text
    assert "license" not in card.data.to_dict()


@pytest.mark.parametrize("licenses", [("llama3", "mit", "mit"), ("cc-by-nc-4.0", "mit", None)])
def test_licences_that_somebody_should_read_first(licenses, hub, bases, merged, publish):
    folder = merged(*parents(publish, bases["llama"], *licenses))
    with pytest.raises(ValueError, match="before somebody has read the licences"):
        push_to_hub(folder, REPO)
    assert REPO not in hub.repos
    push_to_hub(folder, REPO, private=True)
    expected = None if None in licenses else "other"
    assert card_of(hub).data.license == expected
    push_to_hub(folder, "tester/public", accept_license=True)
    push_to_hub(folder, "tester/stated", license="mit")
    stated = ModelCard(hub.repos["tester/stated"].files["README.md"].data.decode())
    assert stated.data.license == "mit"


def test_a_recipe_that_cannot_be_read(hub, bases, merged):
    folder = merged("tester/base", "tester/a")
    for text, message in (("a: [", "must be YAML"), ("- a", "must hold a mapping, but holds a list")):
        (folder / "merge_recipe.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            push_to_hub(folder, REPO)
    assert not hub.repos


def test_settings_that_tell_a_path_are_cleaned(hub, bases, merged):
    folder = merged("tester/base", "tester/a")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": "/home/me/base"}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"name_or_path": "org/tokenizer", "a": 1}))
    push_to_hub(folder, REPO)
    files = hub.repos[REPO].files
    assert json.loads(files["config.json"].data) == config
    assert json.loads(files["tokenizer_config.json"].data) == {"name_or_path": "org/tokenizer", "a": 1}
