"""Serving tasks from one RMM adapter: the factors of the task in use are kept, and samples name tasks of their own."""

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from adapters import tiny
from hf_modular import hotswap_adapter
from hf_modular.adapters import RMM, RMMAdapterConfig

TASKS = ["mrpc", "sst2", "cola"]
SETTINGS = [
    {"r": 4, "p": 2},
    {"r": 4, "p": 2, "granularity": "tensor"},
    {"r": 4, "p": 1, "granularity": "layer"},
]


def served(seed: int = 1, **settings: Any) -> PeftModel:
    """As an adapter that was loaded: nothing of it is trained."""
    config = {"tasks": TASKS, "target_modules": ["wide", "narrow"], "inference_mode": True, "init_weights": False}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(tiny.blocks(), RMMAdapterConfig(**config, **{"r": 4, "p": 2, **settings})).eval()


def trained() -> PeftModel:
    model = served()
    for adapter in adapters(model):
        adapter.requires_grad_(True)
    return model


def adapters(model: nn.Module) -> list[RMM]:
    return [module for module in model.modules() if isinstance(module, RMM)]


def x() -> Tensor:
    return torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def afresh(model: nn.Module) -> Tensor:
    """The output of a copy, which has kept nothing."""
    return copy.deepcopy(model)(x())


# -- what is kept --------------------------------------------------------------------------------------------------


def test_the_factors_of_one_task_are_kept() -> None:
    model = served()
    adapter = adapters(model)[0]
    first = adapter.factors()
    assert adapter.factors() is first
    model.set_task("cola")
    other = adapter.factors()
    assert not torch.equal(other.up, first.up)
    model.set_task("mrpc")
    assert adapter.factors() is not first  # of one task only
    assert torch.equal(adapter.factors().up, first.up)


def in_place(model: PeftModel) -> None:
    with torch.no_grad():
        for adapter in adapters(model):
            adapter.A.basis.mul_(2)


def through_data(model: PeftModel) -> None:
    """Twice, so that the second tensor may lie where the one before the first did."""
    for adapter in adapters(model):
        for _ in range(2):
            adapter.B.basis.data = adapter.B.basis.data * 2


def views(model: PeftModel) -> None:
    """Of one memory, in turn."""
    for adapter in adapters(model):
        both = torch.stack([adapter.A.mean.data, adapter.A.mean.data + 1])
        adapter.A.mean.data = both[0]
        model(x())
        adapter.A.mean.data = both[1]


def cast_and_back(model: PeftModel) -> None:
    model.to(torch.bfloat16)
    model.to(torch.float32)


def load(model: PeftModel) -> None:
    model.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()})


def assign(model: PeftModel) -> None:
    model.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()}, assign=True)


def wrap_anew(model: PeftModel) -> None:
    """The same memory in another parameter, of which the versions are counted from the beginning."""
    for adapter in adapters(model):
        old, adapter.A.mean = adapter.A.mean, nn.Parameter(adapter.A.mean.data, requires_grad=False)
        while adapter.A.mean._version < old._version:
            adapter.A.mean.add_(1)


def train(model: PeftModel) -> None:
    for adapter in adapters(model):
        adapter.requires_grad_(True)
    model(x()).square().sum().backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data.sub_(parameter.grad)  # as an optimizer may, without a trace
    for adapter in adapters(model):
        adapter.requires_grad_(False)


def use_another(model: PeftModel) -> None:
    model.set_task("sst2")


def delete(model: PeftModel) -> None:
    model.delete_task("mrpc")


CHANGES = [in_place, through_data, views, cast_and_back, load, assign, wrap_anew, train, use_another, delete]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.get("granularity", "position"))
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_nothing_is_kept_that_has_changed(change: Callable[[PeftModel], None], settings: dict[str, Any]) -> None:
    model = served(**settings)
    before = model(x())
    change(model)
    found = model(x())
    assert not torch.equal(found, before)
    assert torch.equal(found, afresh(model))


def test_a_hotswapped_adapter(tmp_path: Any) -> None:
    model, other = served(), served(seed=2)
    other.save_pretrained(tmp_path)
    model(x())
    hotswap_adapter(model, tmp_path)
    assert torch.equal(model(x()), other(x()))


def test_copies_keep_nothing_of_the_original() -> None:
    model = served()
    wanted = model(x())
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(adapters(model)[0]))
    in_place(copied)
    assert torch.equal(model(x()), wanted)
    assert not torch.equal(copied(x()), wanted)
    assert torch.equal(pickled.factors().up, adapters(model)[0].factors().up)


def test_what_is_trained_is_not_kept() -> None:
    model = trained()
    adapter = adapters(model)[0]
    assert adapter.factors() is not adapter.factors()
    assert adapter.factors().up.requires_grad


def test_an_average_of_weights_is_put_in_for_an_evaluation() -> None:
    """It writes to `data`, which leaves no trace, and does so with what is trained."""
    model = trained()
    with torch.no_grad():
        before = model(x())
        for adapter in adapters(model):
            adapter.A.mean.data.mul_(2)
        found = model(x())
    assert not torch.equal(found, before)
    assert torch.equal(found, afresh(model))


def test_it_can_be_built_in_inference_mode_and_used_where_gradients_flow() -> None:
    model = served()
    with torch.inference_mode():
        wanted = model(x())
    inputs = x().requires_grad_()
    model(inputs).square().sum().backward()
    assert torch.equal(model(x()), wanted)
    assert inputs.grad is not None


def test_parameters_that_were_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = served()
        wanted = afresh(model)
        model(x())
        for adapter in adapters(model):
            adapter.A.mean.add_(1)
        assert not torch.equal(model(x()), wanted)
        assert torch.equal(model(x()), afresh(model))


# -- samples of different tasks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.get("granularity", "position"))
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3)], ids=["no-token", "one-token", "few", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"], ids=str)
def test_each_sample_is_as_alone(settings: dict[str, Any], shape: tuple[int, ...], dtype: Any) -> None:
    """With fewer tokens than the rank and with more, which are computed in two ways."""
    model, rough = served(**settings), dtype != torch.float32
    inputs = torch.randn(6, *shape, 12, generator=torch.Generator().manual_seed(3))
    if dtype == torch.bfloat16:
        model, inputs = model.to(dtype), inputs.to(dtype)
    names = ["cola", "__base__", "mrpc", "sst2", "cola", "default"]
    model.set_task("sst2")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if dtype == "autocast" else nullcontext():
        together = model(inputs, adapter_names=names)
        for i, name in enumerate(names):
            model.set_task(name if name in TASKS else "sst2")
            with model.disable_adapter() if name == "__base__" else nullcontext():
                alone = model(inputs[i : i + 1])
            tolerance = 0.06 if rough else 1e-5
            assert_close(together[i : i + 1].float(), alone.float(), rtol=tolerance, atol=tolerance)


def test_gradients_of_a_mixed_batch_are_those_of_its_samples() -> None:
    model, names = served(), ["cola", "mrpc", "sst2"]
    for adapter in adapters(model):
        adapter.requires_grad_(True)
    inputs = x()

    def gradients(outputs: list[Tensor]) -> dict[str, Tensor]:
        model.zero_grad()
        torch.cat(outputs).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    found = gradients([model(inputs, adapter_names=names)])
    alone = []
    for i, name in enumerate(names):
        model.set_task(name)
        alone.append(model(inputs[i : i + 1]))
    wanted = gradients(alone)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
