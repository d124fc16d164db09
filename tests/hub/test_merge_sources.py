"""Merging models of the Hub: by name and revision, what is downloaded, and without a connection."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from server import Blob

from hf_modular.checkpoints import save_checkpoint
from hf_modular.merging import DAREConfig, LinearConfig, MergeRecipe, merge


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(5, 3, generator=generator), "b": torch.randn(7, generator=generator)}


@pytest.fixture
def models(tmp_path, publish):
    """Two models: one in a file, one in shards, with files beside them that a merge has no use for."""
    for i, (name, size) in enumerate((("one", "5GB"), ("two", 40))):
        folder = tmp_path / name
        save_checkpoint(folder, tensors(i), max_shard_size=size)
        (folder / "config.json").write_text('{"model_type": "thing"}')
        (folder / "tokenizer.json").write_text("{}")
        (folder / "modeling_thing.py").write_text("raise SystemExit")
        (folder / "pytorch_model.bin").write_bytes(b"pickle")
        save_file({"c": torch.ones(1)}, folder / "consolidated.safetensors")
        publish(folder, f"me/{name}")
    return MergeRecipe.of(LinearConfig(), ["me/one", "me/two@main"])


def test_models_of_the_hub(hub, models, tmp_path):
    report = merge(models, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, first in tensors(0).items():
        torch.testing.assert_close(merged[name], (first + tensors(1)[name]) / 2)
    commits = [hub.repos[name].log()[0].sha for name in ("me/one", "me/two")]
    pinned = [f"me/one@{commits[0]}", f"me/two@{commits[1]}"]
    assert [entry["model"] for entry in report.inputs] == pinned
    assert [entry.model for entry in MergeRecipe.load(tmp_path / "out" / "merge_recipe.yaml").models] == pinned


def test_only_what_is_needed_is_downloaded(models, tmp_path):
    merge(models, tmp_path / "out")
    downloaded = {path.name for path in Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*/*")}
    assert downloaded == {
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }


def test_the_saved_recipe_is_replayed_from_the_commit(hub, models, tmp_path):
    merge(models, tmp_path / "out")
    hub.add("me/one", {"model.safetensors": Blob(b"something else", lfs=True)})
    merge(tmp_path / "out" / "merge_recipe.yaml", tmp_path / "again")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert files[0] == files[1]


def test_without_a_connection_the_cache_is_used(models, tmp_path, monkeypatch):
    merge(models, tmp_path / "out")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    merge(models, tmp_path / "offline")
    elsewhere = MergeRecipe.of(LinearConfig(), ["me/one", "me/three"])
    with pytest.raises(FileNotFoundError, match="me/three is no folder here, and the Hub does not give it"):
        merge(elsewhere, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("reference", ["me/nobody", "me/one@v9", "nobody", "a b", "me/one@"])
def test_what_is_not_on_the_hub(models, tmp_path, reference):
    with pytest.raises(FileNotFoundError, match="is no folder here, and the Hub does not give it"):
        merge(MergeRecipe.of(LinearConfig(), [reference, "me/two"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_repository_without_safetensors(hub, models, tmp_path):
    hub.add("me/old", {"pytorch_model.bin": Blob(b"pickle", lfs=True), "config.json": Blob(b"{}")})
    with pytest.raises(FileNotFoundError, match=r"must hold model\.safetensors or"):
        merge(MergeRecipe.of(LinearConfig(), ["me/old", "me/two"]), tmp_path / "out")


def test_an_index_on_the_hub_cannot_lead_elsewhere(hub, models, tmp_path):
    index = b'{"weight_map": {"a": "../../../secret.safetensors"}}'
    hub.add("me/evil", {"model.safetensors.index.json": Blob(index), "config.json": Blob(b"{}")})
    with pytest.raises((ValueError, FileNotFoundError), match="secret"):
        merge(MergeRecipe.of(LinearConfig(), ["me/evil", "me/two"]), tmp_path / "out")


def test_settings_are_pushed_and_read_back(hub):
    config = DAREConfig(drop=0.25, scale=0.5)
    address = config.push_to_hub("tester/settings", private=True)
    assert hub.repos["tester/settings"].log()[0].sha in address
    assert hub.repos["tester/settings"].private
    assert DAREConfig.from_pretrained("tester/settings") == config
    with pytest.raises(ValueError, match="settings of 'linear', but got those of 'dare'"):
        LinearConfig.from_pretrained("tester/settings")
