"""FLoRA: the Tucker product, its factored computation, ranks."""

import copy
from math import prod

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from adapters.tiny import blocks, model, move, reference, trainable
from hf_modular import FLoRAConfig
from hf_modular.adapters import FLoRA, Site

CONVS = {
    "1d": (nn.Conv1d(6, 8, 5, stride=2, padding=3, dilation=2), (3, 6, 17)),
    "2d": (nn.Conv2d(6, 8, (3, 2), stride=(1, 2), padding=(2, 0)), (3, 6, 7, 9)),
    "2d-same": (nn.Conv2d(6, 8, 3, padding="same", dilation=(1, 2)), (3, 6, 7, 9)),
    "2d-reflect": (nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (3, 6, 7, 9)),
    "2d-1x1": (nn.Conv2d(6, 8, 1), (3, 6, 4, 5)),
    "2d-single": (nn.Conv2d(6, 8, 3), (6, 7, 9)),
    "2d-groups": (nn.Conv2d(6, 8, 3, groups=2, padding=1), (3, 6, 7, 9)),
    "2d-depthwise": (nn.Conv2d(6, 12, 7, groups=6, padding=3), (3, 6, 8, 9)),
    "3d": (nn.Conv3d(6, 8, (2, 3, 1), bias=False), (3, 6, 3, 5, 4)),
    "1d-transposed": (nn.ConvTranspose1d(6, 8, 5, stride=3, output_padding=1), (3, 6, 7)),
    "2d-transposed": (nn.ConvTranspose2d(6, 8, (3, 2), stride=2, groups=2), (3, 6, 4, 5)),
}


def adapter(*shape: int, **choices: object) -> FLoRA:
    return FLoRA(FLoRAConfig(**choices), Site("layer", shape, has_bias=False))


def tucker(core: Tensor, factors: list[Tensor], scale: float) -> Tensor:
    """Axis by axis, as the formula says, and then (in, out, *kernel) to (out, in, *kernel)."""
    for axis, P in enumerate(factors):
        core = torch.tensordot(P, core.movedim(axis, 0), 1).movedim(0, axis)
    return scale * core.transpose(0, 1)


def factors(adapter: FLoRA) -> list[Tensor]:
    return [adapter.P_in, adapter.P_out, *adapter.P_kernel]


# -- the product -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv3d"])
def test_the_reference_implementation_gives_the_same(kind: str):
    given = {k.split(".", 2)[2]: v for k, v in reference().items() if k.startswith(f"flora.{kind}.")}
    expected = given["expected_delta.scale2.5"]
    ours = adapter(*expected.shape, scale=2.5, ranks=list(given["core"].shape))
    ours.core.data = given["core"]
    for axis, P in enumerate(factors(ours)):
        P.data = given[f"factor{axis}"]
    assert_close(ours.delta(), expected)


@hypothesis.settings(deadline=None, max_examples=40)
@given(sides=st.lists(st.integers(1, 6), min_size=2, max_size=5), data=st.data())
def test_the_change_is_the_tucker_product(sides: list[int], data: st.DataObject):
    ranks = [data.draw(st.integers(1, side)) for side in sides]
    in_features, out_features, *kernel = sides
    ours = adapter(out_features, in_features, *kernel, ranks=ranks, init_weights=False).double()
    assert_close(ours.delta(), tucker(ours.core, factors(ours), 4.0))
    assert sum(p.numel() for p in ours.parameters()) == prod(ranks) + sum(map(prod, zip(sides, ranks, strict=True)))


def test_with_an_identity_core_it_is_lora():
    ours = adapter(7, 5, r=3, scale=1.0)
    ours.core.data = torch.eye(3)
    assert_close(ours.delta(), ours.P_out @ ours.P_in.T)


def test_it_starts_at_zero_with_factors_of_the_published_variance():
    ours = adapter(400, 300, 3, ranks=[50, 80, 2])
    assert not ours.core.any()
    assert not ours.delta().any()
    assert_close(ours.P_in.var(), torch.tensor(0.5 / 50), rtol=0.05, atol=0)
    assert_close(ours.P_out.var(), torch.tensor(0.5 / 80), rtol=0.05, atol=0)


def test_only_the_core_has_a_gradient_at_first():
    ours = adapter(7, 5, r=3)
    (ours.delta() * torch.randn(7, 5)).sum().backward()
    assert ours.core.grad.any()
    assert not any(P.grad.any() for P in factors(ours))


# -- on layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dropout"), [(kind, p) for kind in CONVS for p in (0.0, 0.5) if not (p and "transposed" in kind)]
)
def test_convolutions_of_every_kind(kind: str, dropout: float):
    """Factored, or rewritten where it has to be: the same as the merged layer, and so are the gradients."""
    base, shape = copy.deepcopy(CONVS[kind][0]), CONVS[kind][1]
    torch.manual_seed(0)
    settings = {"r": 3, "scale": 1.0, "init_weights": False, "dropout": dropout, "target_modules": ["0"]}
    adapted = get_peft_model(nn.Sequential(base), FLoRAConfig(**settings)).double().eval()
    layer, x = adapted.base_model.model[0], torch.randn(shape, dtype=torch.float64, requires_grad=True)
    rewritten = layer._call_base(layer._fold(layer.adapters.values()), x, (), {})
    assert not torch.allclose(rewritten, base.double()(x))
    wanted = [x, *layer.adapters.parameters()]
    slopes = torch.randn_like(rewritten)
    for ours, expected in zip(
        torch.autograd.grad((layer(x) * slopes).sum(), wanted),
        torch.autograd.grad((rewritten * slopes).sum(), wanted),
        strict=True,
    ):
        assert_close(ours, expected)
    assert_close(layer(x), rewritten)


@pytest.mark.parametrize("kind", ["2d", "2d-groups", "linear", "conv1d", "embedding"])
def test_dropout_acts_on_the_adapter_and_in_training_only(kind: str):
    others = {"linear": nn.Linear(6, 8), "conv1d": Conv1D(8, 6), "embedding": nn.Embedding(6, 8)}
    base = others[kind] if kind in others else copy.deepcopy(CONVS[kind][0])
    x = torch.arange(6) if kind == "embedding" else torch.ones(CONVS[kind][1] if kind in CONVS else (2, 6))
    settings = {"init_weights": False, "dropout": 0.9, "target_modules": ["0"]}
    adapted = get_peft_model(nn.Sequential(base), FLoRAConfig(**settings)).eval()
    assert torch.equal(adapted(x), adapted(x))
    adapted.train()
    assert not torch.equal(adapted(x), adapted(x))
    adapted.base_model.model[0].adapters["default"].dropout = 1.0
    assert_close(adapted(x), base(x))


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3


@pytest.mark.parametrize("base", [Scaled(6, 8), nn.ConvTranspose1d(6, 8, 3)])
def test_a_layer_that_does_more_than_its_kind_is_rewritten(base: nn.Module):
    x = torch.arange(6) if isinstance(base, Scaled) else torch.randn(2, 6, 5)
    adapted = get_peft_model(nn.Sequential(base), FLoRAConfig(init_weights=False, target_modules=["0"])).eval()
    expected = adapted(x)
    assert_close(adapted.merge_and_unload()(x), expected)
    with pytest.raises(ValueError, match=r"`dropout` acts on the input.*layer '0'.*dropout=0.1 to 0"):
        get_peft_model(nn.Sequential(base), FLoRAConfig(dropout=0.1, target_modules=["0"]))


def test_gpt2s_layers_are_turned_around():
    adapted = move(get_peft_model(model("gpt2"), FLoRAConfig(r=4, target_modules=["c_attn"])))
    layer = adapted.get_submodule("base_model.model.transformer.h.0.attn.c_attn")
    assert layer.site.weight_shape == (96, 32)
    x = torch.randn(2, 32)
    assert_close(layer(x), layer.base_layer(x) + x @ layer.adapters["default"].delta().T)


# -- ranks -----------------------------------------------------------------------------------------------------------


def test_the_rank_is_clipped_to_short_axes():
    assert adapter(20, 3, 5, 1).core.shape == (3, 8, 5, 1)
    assert trainable(adapter(20, 3, 5, 1)) == 3 * 8 * 5 + 3 * 3 + 20 * 8 + 5 * 5 + 1


def test_a_layer_takes_the_ranks_of_its_axes():
    given = {"ranks": [4, 6, 2, 1]}
    assert adapter(20, 12, 3, 3, **given).core.shape == (4, 6, 2, 1)
    assert adapter(20, 12, **given).core.shape == (4, 6)


def test_ranks_of_single_layers():
    config = FLoRAConfig(r=4, target_modules=["wide", "narrow"], rank_pattern={"1.wide": [2, 3], "narrow": 1})
    adapted = get_peft_model(blocks(2), config)
    shapes = {n.split(".hfm")[0][-6:]: tuple(m.core.shape) for n, m in adapted.named_modules() if isinstance(m, FLoRA)}
    assert shapes == {"0.wide": (4, 4), "1.wide": (2, 3), "narrow": (1, 1)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ranks": [4, 6, 4, 1]}, r"ranks=\[4, 6, 4, 1\] for layer 'layer', whose axis 'kernel\[0\]' has length 3"),
        ({"ranks": [13, 6, 2, 1]}, "whose axis 'in' has length 12"),
        ({"ranks": [4, 21, 2, 1]}, "whose axis 'out' has length 20"),
        (
            {"ranks": [4, 6]},
            r"a rank for each axis.*ranks=\[4, 6\] for layer 'layer', whose axes are \[12, 20, 3, 3\]",
        ),
        ({"rank_pattern": {"layer": [4, 6, 2, 5]}}, r"whose axis 'kernel\[1\]' has length 3"),
        ({"r": 0}, "`r` must be a positive integer, but got r=0"),
        ({"ranks": [4, 0]}, "`ranks` must be a positive integer, but got ranks=0"),
        ({"rank_pattern": {"a": "4"}}, r"`rank_pattern\['a'\]` must be a positive integer"),
        ({"dropout": -0.1}, "`dropout` must be in"),
    ],
)
def test_settings_that_break_a_law_are_refused_with_the_values(wrong: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        adapter(20, 12, 3, 3, **wrong)


def test_as_lora_it_has_the_smaller_of_its_two_ranks():
    for ranks, rank in (([2, 5], 2), ([5, 2], 2), ([3, 3], 3)):
        ours = adapter(7, 6, ranks=ranks, init_weights=False)
        A, B, scaling = ours.lora()
        assert (A.shape, B.shape) == ((rank, 6), (7, rank))
        assert_close(scaling * B @ A, ours.delta())


def test_more_parameters_than_lora_by_its_cores():
    """By r² for each layer: 160 r² for the five kinds of layers and 32 layers of LLaMA-7B."""
    ours = get_peft_model(model("llama"), FLoRAConfig(r=4, target_modules="all-linear"))
    lora = get_peft_model(model("llama"), LoraConfig(r=4, target_modules="all-linear"))
    assert trainable(ours) - trainable(lora) == 3 * 7 * 4**2
