"""On a base in 4 or 8 bits of bitsandbytes, on the CPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.quantization_utils import Bnb4bitBackend
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from adapters import tiny
from adapters.table import MERGEABLE, METHODS
from hf_modular.adapters._layer import AdapterLayer
from hf_modular.adapters._quantised import dequantised
from hf_modular.testing import AdapterCase

bnb = pytest.importorskip("bitsandbytes")

BITS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "4 bits": lambda old: bnb.nn.Linear4bit(
        old.in_features, old.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
    ),
    "8 bits": lambda old: bnb.nn.Linear8bitLt(old.in_features, old.out_features, bias=False, has_fp16_weights=False),
}
bits = pytest.mark.parametrize("bits", BITS)


def whole() -> nn.Module:
    """A Llama whose rows fill the blocks of 64 numbers that are quantised together."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval()


def quantised(kind: str) -> nn.Module:
    """The same with quantised layers in all of its blocks, as transformers loads it."""
    model = whole()
    for name, old in list(model.model.layers.named_modules()):
        if isinstance(old, nn.Linear):
            new = BITS[kind](old)
            new.load_state_dict({"weight": old.weight.data}, strict=False)
            model.model.layers.set_submodule(name, new.to("cpu"))
    tiny.run(model)
    return model.requires_grad_(False).eval()


def adapted(case: AdapterCase, kind: str) -> PeftModel:
    torch.manual_seed(3)
    return tiny.move(get_peft_model(quantised(kind), case.config(target_modules=["q_proj", "down_proj"]))).eval()


def layers(model: nn.Module) -> list[AdapterLayer]:
    return [module for module in model.modules() if isinstance(module, AdapterLayer)]


def bytes_of(model: nn.Module) -> list[Tensor]:
    """Everything that the quantised layers hold."""
    held = []
    for layer in layers(model):
        weight, state = layer.base_layer.weight, getattr(layer.base_layer, "state", None)
        held += [weight.data, *([weight.quant_state.absmax] if state is None else [state.CB, state.SCB])]
    return [tensor.clone() for tensor in held if tensor is not None]


@pytest.mark.parametrize("case", METHODS, ids=str)
@bits
def test_training(case: AdapterCase, bits: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    base = prepare_model_for_kbit_training(quantised(bits), use_gradient_checkpointing=False)
    model = get_peft_model(base, case.config(target_modules=["q_proj", "down_proj"]))
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
    loaded = PeftModel.from_pretrained(quantised(bits), tmp_path)
    # bitsandbytes packs a weight in another way when it is used for inference, and is less exact after that
    assert_close(tiny.run(loaded), tiny.run(model), rtol=0.02, atol=0.01)
    with model.disable_adapter():
        assert_close(tiny.run(model), tiny.run(quantised(bits)), rtol=0.02, atol=0.01)
        assert (tiny.run(model) - tiny.run(loaded)).abs().max() > 0.02


@pytest.mark.parametrize("case", METHODS, ids=str)
@bits
def test_starts_where_it_promises(case: AdapterCase, bits: str) -> None:
    torch.manual_seed(3)
    model = get_peft_model(quantised(bits), case.config(target_modules=["q_proj", "down_proj"]))
    start, base = tiny.run(model), tiny.run(quantised(bits))
    if case.identity:
        assert_close(start, base, rtol=0.02, atol=0.02)
    else:
        assert not torch.equal(start, base)
    with model.disable_adapter():
        assert torch.equal(tiny.run(model), base)


@pytest.mark.parametrize("nested", [False, True])
def test_a_weight_that_was_packed_for_inference_is_read_as_before(nested: bool) -> None:
    base = nn.Sequential(bnb.nn.Linear4bit(64, 96, bias=False, compress_statistics=nested, quant_type="nf4"))
    base.load_state_dict({"0.weight": torch.randn(96, 64)}, strict=False)
    layer = base.to("cpu")[0]
    backend = Bnb4bitBackend()
    before, held = dequantised(layer, backend), layer.weight.data.clone()
    with torch.no_grad():
        output = base.eval()(torch.eye(64)).t()
    if torch.equal(held, layer.weight.data):
        pytest.skip("this CPU has no bf16 instructions, for which bitsandbytes packs weights")
    assert_close(dequantised(layer, backend).float(), before.float(), rtol=0.01, atol=0.0)  # bf16 scales
    assert_close(output.float(), before.float(), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("case", MERGEABLE, ids=str)
@bits
def test_merging_and_unmerging(case: AdapterCase, bits: str) -> None:
    model = adapted(case, bits)
    output, held = tiny.run(model), bytes_of(model)  # a first call packs the weights in another way
    error = quantisation_error(bits)
    model.merge_adapter(safe_merge=True)
    assert (tiny.run(model) - output).norm() / output.norm() < 4 * error, "more than quantising anew costs"
    assert not all(torch.equal(a, b) for a, b in zip(held, bytes_of(model), strict=True))
    model.unmerge_adapter()
    assert all(torch.equal(a, b) for a, b in zip(held, bytes_of(model), strict=True))
    assert torch.equal(tiny.run(model), output)
    kinds = {type(layer.base_layer) for layer in layers(model)}
    merged = model.merge_and_unload()
    assert {type(merged.model.layers[0].self_attn.q_proj)} == kinds
    assert (tiny.run(merged) - output).norm() / output.norm() < 4 * error


def quantisation_error(bits: str) -> float:
    exact = tiny.run(whole())
    return float((tiny.run(quantised(bits)) - exact).norm() / exact.norm())


@pytest.mark.parametrize("case", MERGEABLE, ids=str)
@bits
def test_two_adapters_and_mixed_batches(case: AdapterCase, bits: str) -> None:
    model = adapted(case, bits)
    model.add_adapter("two", case.config(target_modules=["q_proj", "down_proj"]))
    model.set_adapter("two")
    two = tiny.run(tiny.move(model, seed=9).eval())
    model.set_adapter("default")
    one = tiny.run(model)
    mixed = tiny.run(model, adapter_names=["two", "default"])
    assert_close(mixed, torch.stack([two[0], one[1]]), rtol=0.02, atol=0.02)
    model.base_model.set_adapter(["default", "two"])
    both = tiny.run(model)
    model.merge_adapter()
    assert (tiny.run(model) - both).norm() / both.norm() < 4 * quantisation_error(bits)
