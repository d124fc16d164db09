"""Repositories are inspected by the headers of their files."""

from pathlib import Path

import pytest
from adapters import tiny
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model

from hf_modular.inspection import inspect


@pytest.mark.filterwarnings("ignore:Could not find a config file in")
def test_no_weights_are_downloaded(hub, publish, tmp_path):
    tiny.model("llama").save_pretrained(tmp_path / "model", max_shard_size="50KB")
    get_peft_model(tiny.model("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    for name in ("model", "adapter"):
        publish(tmp_path / name, f"me/{name}")
        here, there = inspect(tmp_path / name), inspect(f"me/{name}@main")
        assert there.reference == f"me/{name}@{hub.repos[f'me/{name}'].log()[0].sha}"
        for fact in ("kind", "files", "tensors", "parameters", "bytes", "dtypes", "settings", "tied"):
            assert getattr(there, fact) == getattr(here, fact)
    downloaded = {path.name for path in Path(constants.HF_HUB_CACHE).glob("models--me--*/snapshots/*/*")}
    assert not any(name.endswith(".safetensors") for name in downloaded)


def test_what_is_not_there_is_named(hub):
    with pytest.raises(FileNotFoundError, match="me/nothing is no folder here, and the Hub does not give it"):
        inspect("me/nothing")
