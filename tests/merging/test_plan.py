"""What a merge would do, said without doing it."""

import json

import pytest
import torch
from adapters import tiny
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from hf_modular.merging import METHODS, merge, plan_merge

SHAPES = {"wide": (300, 200), "narrow": (40, 30), "bias": (7,)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folders = []
    for i in range(3):
        folder = tmp_path_factory.mktemp(f"model{i}")
        rng = torch.Generator().manual_seed(i)
        save_file({n: torch.randn(s, generator=rng) for n, s in SHAPES.items()}, folder / "model.safetensors")
        folders.append(str(folder))
    return folders


def recipe(method, models, **more):
    base = {} if METHODS[method].base_model == "unused" else {"base_model": models[0]}
    return {"merge_method": method, "models": [{"model": m} for m in models[1:]], **base, **more}


@pytest.mark.parametrize("method", ["linear", "ties", "pcb", "model_stock", "opcm"])
def test_a_plan_has_the_sizes_of_the_merge_and_writes_nothing(method, models, tmp_path):
    made = recipe(method, models, dtype="bfloat16")
    plan = plan_merge(made, tmp_path / "out", max_shard_size="100KB")
    assert not (tmp_path / "out").exists()
    report = merge(made, tmp_path / "out", max_shard_size="100KB", progress=False)
    assert (plan.tensors, plan.parameters) == (report.tensors, report.parameters)
    assert plan.bytes_written == report.bytes_written
    assert plan.files == len(report.outputs)
    assert plan.bytes_read == sum(f["bytes"] for entry in report.inputs for f in entry["files"].values())
    assert (plan.seconds is None) is (method == "opcm")
    assert plan.seconds is None or 0 < plan.seconds < 60
    assert plan.models == [entry["model"] for entry in report.inputs]


def test_layers_that_are_computed_count_as_memory(tmp_path):
    tiny.model("llama").save_pretrained(tmp_path / "base")
    adapted = get_peft_model(tiny.model("llama"), LoraConfig(target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = None
    adapted.save_pretrained(tmp_path / "adapter")
    alone, base = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "base")}]}, tmp_path / "base"
    plan = plan_merge(alone | {"models": [{"model": f"{base}+{tmp_path / 'adapter'}"}]}, tmp_path / "out")
    assert plan.peak_memory > plan_merge(alone, tmp_path / "out").peak_memory


def test_what_would_stop_the_merge_stops_the_plan(models, tmp_path):
    with pytest.raises(ValueError, match="cannot begin"):
        plan_merge(recipe("linear", models), models[1])
    with pytest.raises(FileNotFoundError, match=r"there is no folder \./nowhere"):
        plan_merge(recipe("linear", [*models, "./nowhere"]), tmp_path / "out")


def test_a_plan_says_what_it_is(models, tmp_path):
    plan = plan_merge(recipe("linear", models), tmp_path / "out", seed=3, workers=1)
    assert "Would merge 2 models by linear: 3 tensors, 61,207 parameters, 1 files" in plan.summary()
    assert "on 1 workers" in plan.summary()
    assert json.loads(plan.to_json())["bytes_written"] == 61207 * 4
