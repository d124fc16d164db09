"""Publishing, end to end: the real client over HTTP, and what comes back."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, inputs, logits, snippet
from huggingface_hub import EvalResult, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from server import Blob, Hub

from hf_modular import HUTConfig, SSFConfig, push_to_hub

REPO = "tester/model"
TEMPLATE = "# Model Card for Model ID"


@dataclass
class Case:
    family: str
    config: Any
    tag: str
    pipeline_tag: str

    @property
    def id(self) -> str:
        return f"{self.family}-{self.tag}"


CASES = [
    Case("llama", LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"), "lora", "text-generation"),
    Case("llama", HUTConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"), "hut", "text-generation"),
    Case("bert", SSFConfig(target_modules=["query"], task_type="SEQ_CLS"), "ssf", "text-classification"),
    Case("vit", LoraConfig(r=3, target_modules=["q_proj"]), "lora", "image-classification"),
    Case("vit", HUTConfig(r=3, target_modules=["v_proj"], modules_to_save=["classifier"]), "hut", "image-classification"),
]


@pytest.fixture
def adapter(bases: dict[str, Path], tmp_path: Path) -> Callable[..., tuple[Path, torch.Tensor]]:
    """Save an adapter with random parameters on a base model; gives its folder and the logits of the two."""

    def make(case: Case, base: str | Path) -> tuple[Path, torch.Tensor]:
        torch.manual_seed(1)
        model = get_peft_model(CONFIGS[case.family][0].from_pretrained(base), case.config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) / 3)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", logits(model, case.family)

    return make


@pytest.fixture
def lora(bases: dict[str, Path], adapter: Callable[..., Any], publish: Callable[..., str]) -> Path:
    """A LoRA adapter for a base that is on the Hub as tester/base."""
    return adapter(CASES[0], publish(bases["llama"], "tester/base"))[0]


def card_of(hub: Hub, repo_id: str = REPO) -> ModelCard:
    return ModelCard(hub.repos[repo_id].files["README.md"].data.decode())


# ---- there and back


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_an_adapter_comes_back_as_it_was(case, hub, publish, bases, adapter):
    base = publish(bases[case.family], "tester/base")
    folder, expected = adapter(case, base)
    commit = push_to_hub(folder, REPO)
    repo = hub.repos[REPO]
    assert commit.oid == repo.at("main").sha
    assert [c.title for c in repo.log()] == ["Upload adapter with hf_modular", "initial commit"]
    assert hub.count("POST", f"/{REPO}/commit/") == 1
    data = ModelCard.load(REPO).data
    assert (data.base_model, data.base_model_relation, data.library_name) == (base, "adapter", "peft")
    assert (data.license, data.pipeline_tag) == ("apache-2.0", case.pipeline_tag)
    assert {"hf-modular", case.tag} <= set(data.tags)
    reloaded = PeftModel.from_pretrained(CONFIGS[case.family][0].from_pretrained(base), REPO)
    assert torch.equal(logits(reloaded, case.family), expected)
    names: dict[str, Any] = {}
    exec(snippet(card_of(hub).text), names)
    assert torch.equal(logits(names["model"], case.family), expected)
