"""README is true: its code runs as it stands, against a Hub that has the models it names."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from server import USERS, Hub
from transformers import AutoModelForCausalLM, Qwen3Config
from typer.testing import CliRunner

from hf_modular import RMMConfig
from hf_modular.adapters import METHODS as ADAPTERS
from hf_modular.cli import app
from hf_modular.merging import METHODS as MERGES

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def home(tmp_path: Path, publish: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the recipe, and the models on the Hub."""
    config = Qwen3Config(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    for seed, name in enumerate(["Qwen/Qwen3-0.6B", "me/qwen3-law", "me/qwen3-medicine"]):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        publish(tmp_path / name, name)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "Qwen/Qwen3-0.6B")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "law")
    adapted.add_adapter("medicine", LoraConfig(r=3, target_modules=["v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapters")
    for name in ("law", "medicine"):
        publish(tmp_path / "adapters" / name, f"me/qwen3-{name}-lora")
    monkeypatch.setitem(USERS, "hf_test", "me")
    (tmp_path / "recipe.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_first_code_comes_within_twenty_lines() -> None:
    assert "```python" in "\n".join(README.splitlines()[:20])


def test_the_code_runs(home: Path, hub: Hub) -> None:
    tensors = [{"w": torch.randn(3, 2)} for _ in range(3)]
    names = dict(zip(("base", "one", "two"), tensors, strict=True))
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), names)
    assert names["model"].peft_config["default"].peft_type == "HFM_HUT"
    assert names["both"].tasks == ["law", "medicine"]
    assert all(error < 1e-5 for error in names["both"].peft_config["default"].errors.values())
    assert names["state_dict"]["w"].shape == (3, 2)
    assert "me/qwen3-law-medicine" in hub.repos


def test_the_commands_run(home: Path, hub: Hub) -> None:
    commands = [line.split()[2:] for line in README.splitlines() if line.startswith("$ hf-modular ")]
    assert commands
    for command in commands:
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    merged = AutoModelForCausalLM.from_pretrained(home / "merged")
    assert merged.dtype == torch.bfloat16


def test_the_table_has_every_method() -> None:
    for name in ADAPTERS:
        assert re.search(rf"^\| `{name}`", README, re.MULTILINE | re.IGNORECASE), name
    for name in (*MERGES, RMMConfig.name):
        assert f"`{name}`" in README, name
