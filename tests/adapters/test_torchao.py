"""On a base whose weights torchao has quantised, as transformers loads it, on the CPU."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, TorchAoConfig

from adapters import tiny
from adapters.table import MERGEABLE, METHODS
from hf_modular.adapters._layer import AdapterLayer
from hf_modular.testing import AdapterCase

torchao = pytest.importorskip("torchao.quantization")

# torchao's packed 4 bits need a kernel that is there for GPUs only
KINDS = {
    "8 bits": lambda: torchao.Int8WeightOnlyConfig(),
    "4 bits": lambda: torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(32)),
}
kinds = pytest.mark.parametrize("kind", KINDS)
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llama")
    tiny.model("llama").save_pretrained(place)
    return place


def quantised(folder: Path, kind: str) -> nn.Module:
    config = TorchAoConfig(KINDS[kind]())
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()


def adapted(case: AdapterCase, folder: Path, kind: str) -> PeftModel:
    torch.manual_seed(3)
    return tiny.move(get_peft_model(quantised(folder, kind), case.config(target_modules=TARGETS))).eval()


def layers(model: nn.Module) -> list[AdapterLayer]:
    return [module for module in model.modules() if isinstance(module, AdapterLayer)]


def weights(model: nn.Module) -> list[Tensor]:
    return [layer.base_layer.weight.dequantize().clone() for layer in layers(model)]


@pytest.mark.parametrize("case", METHODS, ids=str)
@kinds
def test_training(case: AdapterCase, kind: str, folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    base = prepare_model_for_kbit_training(quantised(folder, kind), use_gradient_checkpointing=False)
    model = get_peft_model(base, case.config(target_modules=TARGETS))
    before = tiny.run(quantised(folder, kind))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        loss = model(input_ids=tiny.TOKENS, labels=tiny.TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantised(folder, kind), tmp_path)
    assert_close(tiny.run(loaded), tiny.run(model), rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(tiny.run(model), before)
    assert not torch.allclose(tiny.run(model), before, atol=1e-3)


@pytest.mark.parametrize("case", MERGEABLE, ids=str)
@kinds
def test_merging(case: AdapterCase, kind: str, folder: Path) -> None:
    model = adapted(case, folder, kind)
    output, held = tiny.run(model), weights(model)
    exact = tiny.run(tiny.model("llama"))
    error = (tiny.run(quantised(folder, kind)) - exact).norm() / exact.norm()
    model.merge_adapter(safe_merge=True)
    assert (tiny.run(model) - output).norm() / output.norm() < 4 * error, "more than quantising anew costs"
    assert not all(torch.equal(a, b) for a, b in zip(held, weights(model), strict=True))
    model.unmerge_adapter()
    assert all(torch.equal(a, b) for a, b in zip(held, weights(model), strict=True))
    assert torch.equal(tiny.run(model), output)
    kind_of_weight = type(layers(model)[0].base_layer.weight)
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj.weight) is kind_of_weight
    assert (tiny.run(merged) - output).norm() / output.norm() < 4 * error


@pytest.mark.parametrize("case", METHODS, ids=str)
def test_an_adapter_for_each_sample(case: AdapterCase, folder: Path) -> None:
    model = adapted(case, folder, "8 bits")
    mixed = tiny.run(model, adapter_names=["default", "__base__"])
    expected = torch.stack([tiny.run(model)[0], tiny.run(quantised(folder, "8 bits"))[1]])
    assert_close(mixed, expected, rtol=1e-4, atol=1e-5)
