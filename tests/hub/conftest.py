"""A Hub to push to, and tiny models to push."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from huggingface_hub import constants
from server import Blob, Hub, serve
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    ViTConfig,
)

CONFIGS = {
    "llama": (
        AutoModelForCausalLM,
        LlamaConfig(
            vocab_size=48,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
    ),
    "bert": (
        AutoModelForSequenceClassification,
        BertConfig(
            vocab_size=48,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
        ),
    ),
    "vit": (
        AutoModelForImageClassification,
        ViTConfig(
            image_size=8,
            patch_size=4,
            num_channels=1,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_labels=3,
        ),
    ),
}


@pytest.fixture(scope="session")
def running_hub() -> Iterator[Hub]:
    with serve(urlsplit(os.environ["HF_ENDPOINT"]).port) as hub:
        yield hub


@pytest.fixture
def hub(running_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub and an empty cache; the client does not wait long before it tries again."""
    running_hub.reset()
    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    yield running_hub
    assert not running_hub.crashes


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of randomly initialised models."""
    folders = {}
    for name, (auto_class, config) in CONFIGS.items():
        torch.manual_seed(len(name))
        folders[name] = tmp_path_factory.mktemp(name)
        auto_class.from_config(config).save_pretrained(folders[name])
    return folders


@pytest.fixture
def publish(hub: Hub) -> Callable[..., str]:
    """Put a folder on the Hub as if somebody had pushed it before."""

    def publish(folder: Path, repo_id: str, card: str = "---\nlicense: apache-2.0\n---\n", **repo: Any) -> str:
        files = {p.name: Blob(p.read_bytes(), lfs=p.suffix == ".safetensors") for p in folder.iterdir() if p.is_file()}
        hub.add(repo_id, files | {"README.md": Blob(card.encode())}, **repo)
        return repo_id

    return publish


def inputs(family: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if family == "vit":
        return {"pixel_values": torch.rand(3, 1, 8, 8, generator=generator)}
    return {"input_ids": torch.randint(3, 48, (3, 7), generator=generator)}


def logits(model: torch.nn.Module, family: str) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs(family)).logits


def snippet(card: str) -> str:
    """The code of a card's section on usage."""
    found = re.search(r"## How to use\n\n```python\n(.*?)```", card, re.DOTALL)
    assert found
    return found[1]
