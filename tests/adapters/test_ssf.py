"""SSF: the paper's parameter count, the order of composition, and norms that count while they train."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import ViTConfig, ViTForImageClassification

from adapters import tiny
from hf_modular import SSFConfig
from hf_modular.adapters import SSF, Site

# Where the paper puts an SSF in a vision transformer: behind the patch embedding, each linear layer, and each norm.
PLACES = [
    "patch_embeddings.projection",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "fc1",
    "fc2",
    "layernorm_before",
    "layernorm_after",
    "vit.layernorm",
]


def test_the_paper_s_count_on_vit_b_16() -> None:
    """205,824 beside the head (0.28 M with one of 100 classes); the paper's fused qkv is q, k and v here."""
    with torch.device("meta"):
        base = ViTForImageClassification(ViTConfig(num_labels=100))
        model = get_peft_model(base, SSFConfig(target_modules=PLACES, modules_to_save=["classifier"]))
    counts = {"ssf": 0, "head": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts["head" if "classifier" in name else "ssf"] += parameter.numel()
    assert counts == {"ssf": 205_824, "head": 76_900}
    assert sum(counts.values()) == 282_724


def site(features: int = 4, bias: bool = True) -> Site:
    return Site("layer", (features, 6), bias)


def adapter(seed: int) -> SSF:
    torch.manual_seed(seed)
    return SSF(SSFConfig(init_weights=False), site()).double()


def test_several_compose_in_their_order() -> None:
    """γ₂ (γ₁ y + β₁) + β₂, which is not what the other order gives."""
    one, two = adapter(1), adapter(2)
    weight, bias, x = torch.randn(4, 6).double(), torch.randn(4).double(), torch.randn(7, 6).double()
    y = nn.functional.linear(x, weight, bias)
    expected = two.scale * (one.scale * y + one.shift) + two.shift
    assert_close(two(x, one(x, y)), expected)
    assert_close(nn.functional.linear(x, *two.transform(*one.transform(weight, bias))), expected)
    assert not torch.allclose(one(x, two(x, y)), expected)


def test_the_order_of_active_adapters_is_the_order_of_composition() -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), SSFConfig(target_modules=["0"], init_weights=False), "one")
    model.add_adapter("two", SSFConfig(target_modules=["0"], init_weights=False))
    layer, x = model.base_model.model[0], torch.randn(3, 6)
    y, found = layer.base_layer(x), {}
    for order in (["one", "two"], ["two", "one"]):
        model.base_model.set_adapter(order)
        first, second = (layer.adapters[name] for name in order)
        found[order[0]] = model(x)
        assert_close(found[order[0]], second.scale * (first.scale * y + first.shift) + second.shift)
        model.merge_adapter(adapter_names=order)
        assert_close(model(x), found[order[0]])
        model.unmerge_adapter()
    assert not torch.allclose(found["one"], found["two"])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d(6), nn.BatchNorm2d(6), nn.InstanceNorm1d(6, affine=True)], ids=str)
def test_batch_norm_while_it_counts_and_after(norm: nn.Module, training: bool) -> None:
    """Scale and shift follow the normalisation, so merging holds for the statistics of a batch too."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(norm), SSFConfig(target_modules=["0"], init_weights=False)).train(training)
    layer = model.base_model.model[0]
    x = 3 + 2 * torch.randn(5, 6, *([4] * (2 if isinstance(norm, nn.BatchNorm2d) else 1)))
    statistics = {name: buffer.clone() for name, buffer in layer.base_layer.named_buffers()}
    scale, shift = (p.detach().reshape(-1, *[1] * (x.ndim - 2)) for p in layer.adapters["default"].parameters())
    output = model(x)
    counted = {name: buffer.clone() for name, buffer in layer.base_layer.named_buffers()}
    if statistics:
        assert torch.equal(counted["running_mean"], statistics["running_mean"]) is not training
    for name, buffer in statistics.items():
        layer.base_layer.get_buffer(name).copy_(buffer)
    assert_close(output, scale * layer.base_layer(x) + shift)
    for name, buffer in statistics.items():
        layer.base_layer.get_buffer(name).copy_(buffer)
    model.merge_adapter()
    assert_close(model(x), output, rtol=1e-4, atol=1e-5)
    for name, buffer in counted.items():
        assert_close(layer.base_layer.get_buffer(name), buffer)


def test_the_starts() -> None:
    torch.manual_seed(0)
    many = Site("layer", (20_000, 6), True)
    paper, exact = SSF(SSFConfig(), many), SSF(SSFConfig(init_weights="identity"), many)
    for parameter, mean in ((paper.scale, 1.0), (paper.shift, 0.0)):
        assert_close(parameter.mean().item(), mean, rtol=0, atol=1e-3)
        assert_close(parameter.std().item(), 0.02, rtol=0.03, atol=0)
    assert bool((exact.scale == 1).all() and (exact.shift == 0).all())
    assert SSF(SSFConfig(init_std=0.5), many).scale.std() > 0.4


@pytest.mark.parametrize(
    ("shift", "bias", "shifted"),
    [("auto", True, True), ("auto", False, False), (True, False, True), (False, True, False)],
)
def test_where_it_shifts(shift: bool | str, bias: bool, shifted: bool) -> None:
    made = SSF(SSFConfig(shift=shift), site(bias=bias))
    assert (made.shift is not None) is shifted
    assert (made.unmergeable() is not None) is (shifted and not bias)


def test_a_forced_shift_is_kept_out_of_a_merge_and_its_layers_are_named() -> None:
    model = tiny.move(get_peft_model(tiny.model("llama"), SSFConfig(target_modules=["q_proj", "norm"], shift=True)))
    named = [*(f"model.layers.{i}.self_attn.q_proj" for i in range(3)), "model.norm"]
    with pytest.raises(ValueError, match="cannot be merged") as error:
        model.merge_and_unload()
    assert all(f"{name}: its SSF adapter shifts the output" in str(error.value) for name in named)
    assert not any("bias" in name for name, _ in model.unload().named_parameters())


def test_every_default_adapter_merges() -> None:
    """Llama has no biases anywhere: there the default scales only."""
    model = tiny.move(get_peft_model(tiny.model("llama"), SSFConfig(target_modules="all-linear"))).eval()
    expected = tiny.run(model)
    assert not any("shift" in name for name, _ in model.named_parameters())
    assert_close(tiny.run(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)
