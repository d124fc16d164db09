"""`torch.compile` takes adapted layers whole, in training and inference, and keeps what it has compiled."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

from adapters import tiny
from adapters.table import MERGEABLE, METHODS, SETTINGS
from hf_modular import HUTConfig, hotswap_adapter
from hf_modular.testing import AdapterCase

# of torch's own compiler, about an autograd function that it looks at
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*'torch.autograd.function.Function'. should not be:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def adapted(case: AdapterCase, seed: int = 1) -> PeftModel:
    torch.manual_seed(3)
    return tiny.move(get_peft_model(tiny.blocks(1, 24, 48), case.config(target_modules=["wide", "narrow"])), seed=seed)


def step(model: nn.Module, compiled: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output and the gradients of one step."""
    model.zero_grad()
    y = compiled(x)
    y.square().sum().backward()
    return {"output": y.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# and the forms of HUT, each of which has a gradient of its own
FORMS = [case for case in SETTINGS if case.config_class is HUTConfig]


@pytest.mark.parametrize("case", [*METHODS, *FORMS], ids=str)
def test_a_step_is_one_graph(case: AdapterCase) -> None:
    model, x = adapted(case).eval(), torch.randn(5, 24)
    expected = step(model, model, x)
    found = step(model, torch.compile(model, backend="aot_eager", fullgraph=True), x)
    assert found.keys() == expected.keys()
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", METHODS, ids=str)
def test_swapping_and_switching_adapters(case: AdapterCase, tmp_path: Path) -> None:
    model, other, counter, x = adapted(case).eval(), adapted(case, seed=9).eval(), CompileCounter(), torch.randn(5, 24)
    other.save_pretrained(tmp_path)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(x), model(x))
        hotswap_adapter(compiled, tmp_path)
        assert_close(compiled(x), other(x))
        assert counter.frame_count == 1
        with model.disable_adapter():
            assert_close(compiled(x), tiny.blocks(1, 24, 48)(x))
        if case in MERGEABLE:
            model.merge_adapter()
        assert_close(compiled(x), other(x), rtol=1e-4, atol=1e-5)
