"""Saved adapters come back by every way that PEFT has."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)

from adapters import tiny
from adapters.conftest import Saved, adapted, targets
from adapters.table import METHODS
from hf_modular.testing import AdapterCase

pytestmark = pytest.mark.parametrize("case", METHODS, ids=str)
Make = Callable[[AdapterCase, str], Saved]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("kind", ["llama", "classifier", "t5"])
def test_peft_model(saved: Make, case: AdapterCase, kind: str, low_cpu_mem_usage: bool) -> None:
    made = saved(case, kind)
    model = PeftModel.from_pretrained(made.model(), made.adapter, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(tiny.run(model), made.output)
    assert not torch.equal(made.output, made.base_output)
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())


def test_a_loaded_adapter_can_be_trained_on(saved: Make, case: AdapterCase) -> None:
    made = saved(case, "llama")
    fresh = adapted(case, "llama", task_type="CAUSAL_LM")
    model = PeftModel.from_pretrained(made.model(), made.adapter, is_trainable=True)
    assert tiny.trainable(model) == tiny.trainable(fresh) > 0


@pytest.mark.parametrize(
    ("kind", "auto"),
    [
        ("llama", AutoPeftModelForCausalLM),
        ("classifier", AutoPeftModelForSequenceClassification),
    ],
)
def test_auto_classes_find_the_base_model(saved: Make, case: AdapterCase, kind: str, auto: type) -> None:
    made = saved(case, kind)
    model = auto.from_pretrained(made.adapter)
    assert torch.equal(tiny.run(model.eval()), made.output)


def test_the_auto_class_needs_no_task(case: AdapterCase, saved: Make, tmp_path: Path) -> None:
    model = adapted(case, "llama")
    model.peft_config["default"].base_model_name_or_path = str(saved(case, "llama").base)
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny.run(AutoPeftModel.from_pretrained(tmp_path).eval()), tiny.run(model))


def test_peft_config(saved: Make, case: AdapterCase) -> None:
    made = saved(case, "llama")
    config = PeftConfig.from_pretrained(made.adapter)
    assert type(config) is case.config_class
    assert config.base_model_name_or_path == str(made.base)
    assert all(getattr(config, name) == value for name, value in case.settings.items())


def test_bare_injection(saved: Make, case: AdapterCase) -> None:
    """Without a PeftModel, as transformers and diffusers do it."""
    made = saved(case, "llama")
    model = inject_adapter_in_model(PeftConfig.from_pretrained(made.adapter), made.model(), "mine")
    result = set_peft_model_state_dict(model, load_peft_weights(made.adapter), "mine")
    assert not result.unexpected_keys
    assert torch.equal(tiny.run(model.eval()), made.output)
    again = get_peft_model_state_dict(model, adapter_name="mine")
    file = {key.removeprefix("base_model.model."): tensor for key, tensor in load_peft_weights(made.adapter).items()}
    assert again.keys() == file.keys()
    assert all(torch.equal(tensor, file[key]) for key, tensor in again.items())


def test_injection_by_the_keys_of_a_file(saved: Make, case: AdapterCase) -> None:
    """The layers are found by the file alone, whatever the targets of the config."""
    made = saved(case, "llama")
    state = {k.removeprefix("base_model.model."): v for k, v in load_peft_weights(made.adapter).items()}
    config = PeftConfig.from_pretrained(made.adapter)
    model = inject_adapter_in_model(config, made.model(), state_dict=state)
    set_peft_model_state_dict(model, state)
    assert torch.equal(tiny.run(model.eval()), made.output)


def test_weights_are_exchanged_in_place(saved: Make, case: AdapterCase) -> None:
    """How a server swaps adapters of one shape: no tensor is allocated anew."""
    made = saved(case, "llama")
    model = adapted(case, "llama", task_type="CAUSAL_LM")
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    tiny.move(model, seed=9)
    set_peft_model_state_dict(model, load_peft_weights(made.adapter))
    assert torch.equal(tiny.run(model), made.output)
    assert places == {name: p.data_ptr() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["bert", "gpt2", "vit", "gemma"])
def test_every_family_of_layers(case: AdapterCase, kind: str, tmp_path: Path) -> None:
    model = adapted(case, kind, target_modules=targets(case, kind))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.model(kind), tmp_path, adapter_name="other")
    assert torch.equal(tiny.run(loaded), tiny.run(model))
