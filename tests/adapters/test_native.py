"""The adapter methods of transformers' own models, without a PeftModel."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    pipeline,
)

from adapters import tiny
from adapters.conftest import Saved, words
from adapters.table import METHODS
from hf_modular.testing import AdapterCase

pytestmark = pytest.mark.parametrize("case", METHODS, ids=str)
Make = Callable[[AdapterCase, str], Saved]


def same(model: PreTrainedModel, output: torch.Tensor) -> bool:
    return torch.equal(tiny.run(model.eval()), output)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_load_adapter(
    saved: Make, case: AdapterCase, kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = saved(case, kind)
    model = made.model()
    reports: list[str] = []
    monkeypatch.setattr("transformers.modeling_utils.logger.warning", reports.append)
    info = model.load_adapter(made.adapter)
    assert same(model, made.output)
    assert (info.missing_keys, info.unexpected_keys, info.mismatched_keys) == (set(), set(), set())
    assert not reports


@pytest.mark.parametrize(
    ("kind", "auto"), [("llama", AutoModelForCausalLM), ("classifier", AutoModelForSequenceClassification)]
)
def test_auto_classes_load_an_adapter_folder(saved: Make, case: AdapterCase, kind: str, auto: type) -> None:
    made = saved(case, kind)
    assert same(auto.from_pretrained(made.adapter), made.output)


def test_a_folder_with_model_and_adapter(saved: Make, case: AdapterCase, tmp_path: Path) -> None:
    made = saved(case, "llama")
    for folder in (made.base, made.adapter):
        for file in folder.glob("*.*"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path), made.output)


def test_pipelines_take_an_adapter_folder(saved: Make, case: AdapterCase) -> None:
    made = saved(case, "classifier")
    classify = pipeline("text-classification", model=str(made.adapter), tokenizer=words(), top_k=None)
    text = " ".join(words().convert_ids_to_tokens(tiny.TOKENS[0]))
    scores = {found["label"]: found["score"] for found in classify([text])[0]}
    expected = made.output[0].softmax(-1)
    assert [scores[f"LABEL_{i}"] for i in range(3)] == pytest.approx(expected.tolist(), abs=1e-5)


def test_adapters_come_go_and_change_places(saved: Make, case: AdapterCase) -> None:
    made = saved(case, "llama")
    model = made.model()
    model.load_adapter(made.adapter, "theirs")
    with pytest.warns(UserWarning, match="multiple adapters"):  # PEFT's, for every second adapter on this path
        model.add_adapter(case.config(), "mine")
    tiny.move(model, seed=5)
    mine = tiny.run(model.eval())
    assert model.active_adapters() == ["mine"]
    assert not torch.equal(mine, made.output)
    model.set_adapter("theirs")
    assert same(model, made.output)
    model.disable_adapters()
    assert same(model, made.base_output)
    model.enable_adapters()
    assert same(model, made.output)
    model.set_adapter(["theirs", "mine"])
    both = tiny.run(model)
    assert not any(torch.equal(both, other) for other in (made.output, mine, made.base_output))
    model.set_adapter("mine")
    model.delete_adapter("theirs")
    assert same(model, mine)
    model.delete_adapter("mine")
    assert same(model, made.base_output)
    assert not any("hfm_" in name for name in model.state_dict())


def test_a_model_saves_the_adapter_that_was_added_to_it(saved: Make, case: AdapterCase, tmp_path: Path) -> None:
    made = saved(case, "llama")
    model = AutoModelForCausalLM.from_pretrained(made.base)
    model.add_adapter(case.config())
    tiny.move(model)
    model.save_pretrained(tmp_path)
    assert "import hf_modular" in (tmp_path / "README.md").read_text()
    assert (
        load_file(tmp_path / "adapter_model.safetensors").keys()
        == load_file(made.adapter / "adapter_model.safetensors").keys()
    )
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path), tiny.run(model.eval()))


def test_a_half_precision_model_loads_it(saved: Make, case: AdapterCase) -> None:
    made = saved(case, "llama")
    model = AutoModelForCausalLM.from_pretrained(made.adapter, dtype=torch.bfloat16)
    output = tiny.run(model)
    assert output.dtype == torch.bfloat16
    error = (output.float() - made.output).norm() / made.output.norm()
    assert error < 0.05 * (made.output - made.base_output).norm() / made.output.norm() + 0.02
    assert not torch.equal(output, tiny.run(AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.bfloat16)))
