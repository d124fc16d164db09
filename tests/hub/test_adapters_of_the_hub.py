"""Models and adapters of the Hub as one source: downloaded, pinned, and compared with the base that they name."""

import re
from pathlib import Path

import pytest
import torch
from adapters import tiny
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_modular.merging import MergeRecipe, merge

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def names(tmp_path, publish, monkeypatch):
    """The models of the README's recipe."""
    monkeypatch.chdir(tmp_path)
    tiny.model("llama").save_pretrained(tmp_path / "base")
    publish(tmp_path / "base", "Qwen/Qwen3-0.6B")
    for i, name in enumerate(("law", "medicine")):
        torch.manual_seed(i)
        model = tiny.move(get_peft_model(tiny.model("llama"), LoraConfig(r=2, target_modules=["q_proj"])), i, 0.2)
        model.peft_config["default"].base_model_name_or_path = "Qwen/Qwen3-0.6B"
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
        publish(tmp_path / name, f"me/qwen3-{name}-lora")
    return tmp_path


def test_a_model_with_an_adapter_of_the_hub(hub, names, tmp_path):
    recipe = {
        "merge_method": "passthrough",
        "models": [{"model": "Qwen/Qwen3-0.6B@main", "adapter": "me/qwen3-law-lora"}],
    }
    report = merge(recipe, tmp_path / "out", progress=False)
    wanted = PeftModel.from_pretrained(tiny.model("llama"), tmp_path / "law").merge_and_unload().state_dict()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    commits = [hub.repos[name].log()[0].sha for name in ("Qwen/Qwen3-0.6B", "me/qwen3-law-lora")]
    pinned = f"Qwen/Qwen3-0.6B@{commits[0]}+me/qwen3-law-lora@{commits[1]}"
    assert [entry["model"] for entry in report.inputs] == [pinned]
    assert [entry.model for entry in MergeRecipe.load(tmp_path / "out" / "merge_recipe.yaml").models] == [pinned]
    again = merge(tmp_path / "out" / "merge_recipe.yaml", tmp_path / "again", progress=False)
    assert again.outputs == report.outputs
    kept = {path.name for path in Path(constants.HF_HUB_CACHE).glob("models--me--*/snapshots/*/*")}
    assert kept == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_recipe_of_the_readme(names, tmp_path):
    [recipe] = [
        block for block in re.findall(r"```yaml\n(.*?)```", README.read_text(), re.DOTALL) if "adapter:" in block
    ]
    (tmp_path / "recipe.yaml").write_text(recipe)
    report = merge(tmp_path / "recipe.yaml", tmp_path / "out", progress=False)
    assert [entry.get("adapter", {}).get("peft_type") for entry in report.inputs] == [None, "LORA", "LORA"]
