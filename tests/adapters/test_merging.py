"""Merging in whole models: ties, norms of all sorts, what cannot be written, and what is not in memory."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from torch.testing import assert_close

from adapters import tiny
from adapters.conftest import LAYERS, adapted, targets
from adapters.table import MERGEABLE, METHODS
from hf_modular import HUTConfig, SSFConfig
from hf_modular.adapters import _peft
from hf_modular.adapters._layer import AdapterLayer
from hf_modular.testing import AdapterCase

mergeable = pytest.mark.parametrize("case", MERGEABLE, ids=str)
TIES = pytest.mark.filterwarnings(
    "ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning",
    "ignore:Input and output embeddings are no longer tied:UserWarning",
)


@mergeable
@pytest.mark.parametrize("kind", LAYERS)
def test_merging_and_unmerging_a_whole_model(case: AdapterCase, kind: str) -> None:
    model = adapted(case, kind, target_modules=targets(case, kind))
    base, expected = tiny.model(kind).state_dict(), tiny.run(model)
    model.merge_adapter(safe_merge=True)
    assert_close(tiny.run(model), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(tiny.run(model), expected)
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == base.keys()
    assert_close(tiny.run(merged), expected, rtol=1e-4, atol=1e-4)
    fresh = type(merged)(merged.config).eval()
    fresh.load_state_dict(merged.state_dict())
    assert torch.equal(tiny.run(fresh), tiny.run(merged))


@mergeable
def test_what_is_set_aside_goes_where_the_model_goes(case: AdapterCase) -> None:
    """A model that is cast or moved while it is merged is unmerged in the dtype and place that it has then."""
    models = [adapted(case, "llama", target_modules=["q_proj", "down_proj"]) for _ in range(2)]
    models[0].merge_adapter()
    for model in models:
        model.to(torch.bfloat16)
    models[0].unmerge_adapter()
    assert torch.equal(tiny.run(models[0]), tiny.run(models[1]))
    models[0].merge_adapter()
    models[0].to("meta").unmerge_adapter()
    assert all(p.is_meta for p in models[0].parameters())


def test_a_norm_that_multiplies_by_one_plus_its_weight() -> None:
    """Gemma's: its weight starts at zero, which a scale of the stored weight would leave at zero."""
    model = adapted(AdapterCase(SSFConfig, {}, len), "gemma", target_modules=["norm"])
    norm = model.base_model.model.model.norm
    scale = norm.adapters["default"].scale.detach()
    assert (norm.layout.offset, float(norm.base_layer.weight.abs().max())) == (1.0, 0.0)
    merged = model.merge_and_unload()
    assert_close(merged.model.norm.weight, scale - 1)


def for_fifty_words(case: AdapterCase) -> AdapterCase:
    """The shards of MoS must divide the size of the vocabulary."""
    return replace(case, settings={**case.settings, "shards": 2}) if "shards" in case.settings else case


@TIES
@mergeable
@pytest.mark.parametrize("side", ["wte", "lm_head"])
def test_merging_one_side_of_a_tie(case: AdapterCase, side: str) -> None:
    """The other side keeps the old weight; unmerging ties them again."""
    model = adapted(for_fifty_words(case), "gpt2", target_modules=[side])
    inside = model.base_model.model
    expected, old = tiny.run(model), inside.get_input_embeddings().weight
    assert old is inside.get_output_embeddings().weight
    model.merge_adapter()
    new = {"wte": inside.get_input_embeddings(), "lm_head": inside.get_output_embeddings()}
    other = "lm_head" if side == "wte" else "wte"
    assert new[other].weight is old
    assert not torch.equal(new[side].weight, old)
    assert_close(tiny.run(model), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert inside.get_input_embeddings().weight is inside.get_output_embeddings().weight is old
    merged = model.merge_and_unload()
    assert not merged.config.tie_word_embeddings
    assert_close(tiny.run(merged), expected, rtol=1e-4, atol=1e-4)


@TIES
@mergeable
def test_both_sides_of_a_tie(case: AdapterCase) -> None:
    model = adapted(for_fifty_words(case), "gpt2", target_modules=["wte", "lm_head"])
    expected = tiny.run(model)
    assert_close(tiny.run(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


# -- what PEFT's backends do ------------------------------------------------------------------------------------------


class HalvedLinear(nn.Module):
    """A layer as HQQ's: its weight is not called weight, and writing it makes another layer."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.W_q, self.bias = nn.Parameter(weight.detach() / 2, requires_grad=False), bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, 2 * self.W_q, self.bias)


class Halving(QuantizationBackend):
    layer_type = "linear"
    supports_merge = True
    backend_name = "halving"

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        return 2 * base_layer.W_q

    def set_base_weight(self, peft_layer: AdapterLayer, weight_data: Tensor) -> None:
        peft_layer.base_layer = HalvedLinear(weight_data, peft_layer.base_layer.bias)


class ReadOnly(Halving):
    supports_merge = False
    backend_name = "read-only"

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        raise TypeError("cannot be read")


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> nn.Module:
    backend = getattr(request, "param", Halving)()
    monkeypatch.setattr(
        _peft, "resolve_quantization_backend", lambda layer, **_: backend if isinstance(layer, HalvedLinear) else None
    )
    torch.manual_seed(0)
    linear = nn.Linear(12, 24)
    return nn.Sequential(HalvedLinear(linear.weight, linear.bias)).eval()


@mergeable
def test_a_backend_that_replaces_the_layer(case: AdapterCase, halved: nn.Module) -> None:
    x, layer = torch.randn(5, 12), halved[0]
    model = tiny.move(get_peft_model(halved, case.config(target_modules=["0"]))).eval()
    expected, wrapped = model(x), model.base_model.model[0]
    model.merge_adapter()
    assert wrapped.base_layer is not layer
    assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert wrapped.base_layer is layer
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("halved", [ReadOnly], indirect=True)
@pytest.mark.parametrize("case", METHODS, ids=str)
def test_a_backend_that_cannot_be_read(case: AdapterCase, halved: nn.Module) -> None:
    """A method that acts on the output works on it, and cannot be merged; the others are refused."""
    if case.config_class is HUTConfig:
        with pytest.raises(TypeError, match=r"HUT reads the weight of the layer.*read-only weight of '0'"):
            get_peft_model(halved, case.config(target_modules=["0"]))
        return
    model = tiny.move(get_peft_model(halved, case.config(target_modules=["0"]))).eval()
    assert not torch.equal(model(torch.ones(2, 12)), model.base_model.model[0].base_layer(torch.ones(2, 12)))
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter()


# -- where a weight cannot be read ------------------------------------------------------------------------------------


def test_an_offloaded_weight_is_refused_or_left_alone() -> None:
    """Accelerate brings an offloaded weight when its layer is called, which is too late to rewrite it."""
    x = torch.randn(5, 12)
    for config, works in ((SSFConfig(target_modules=["0"]), True), (HUTConfig(target_modules=["0"]), False)):
        torch.manual_seed(0)
        model = get_peft_model(nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 6)), config)
        expected = tiny.move(model)(x)
        cpu_offload(model.base_model.model[0].base_layer, execution_device=torch.device("cpu"))
        if works:
            assert torch.equal(model(x), expected)
        else:
            with pytest.raises(ValueError, match="weight of layer '0' is not in memory"):
                model(x)


def test_a_weight_that_is_partitioned_is_refused() -> None:
    """As ZeRO-3 leaves it: empty until the layer is called."""
    model = get_peft_model(nn.Sequential(nn.Linear(12, 24)), HUTConfig(target_modules=["0"]))
    model.base_model.model[0].base_layer.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"not in memory \(offloaded or partitioned\)"):
        model(torch.randn(2, 12))


def test_a_sharded_weight_is_refused(tmp_path: Path) -> None:
    """Tensor parallelism: the layer would see its own part of the weight only."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        linear = nn.Linear(12, 24)
        linear.weight = nn.Parameter(torch.distributed.tensor.distribute_tensor(linear.weight, mesh))
        with pytest.raises(TypeError, match=r"layer '0' is split over several devices.*tensor parallelism"):
            get_peft_model(nn.Sequential(linear), SSFConfig(target_modules=["0"]))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("case", METHODS, ids=str)
def test_layers_that_torch_reads_without_calling_them(case: AdapterCase) -> None:
    """For inference, torch's encoder layer hands the weights of its layers to a kernel."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x, padding = torch.randn(3, 6, 32), torch.arange(6).repeat(3, 1) >= torch.tensor([[6], [4], [5]])
    base = copy.deepcopy(model)
    names = ["linear1", "linear2", *(["norm1"] if "LayerNorm" in case.layers else [])]
    adapted_model = tiny.move(get_peft_model(model, case.config(target_modules=names))).eval()
    for mask in (None, padding):
        valid = slice(None) if mask is None else ~mask
        slow = adapted_model(x, src_key_padding_mask=mask)[valid]
        with torch.no_grad():
            fast = adapted_model(x, src_key_padding_mask=mask)[valid]
            before = base(x, src_key_padding_mask=mask)[valid]
        assert_close(fast, slow, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(fast, before, atol=1e-3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_nested_tensors_are_refused() -> None:
    """What torch's encoder makes of a padded batch, for kernels that read the weights."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1)
    model = get_peft_model(model, SSFConfig(target_modules=["linear1"])).eval()
    padding = torch.tensor([[False, False], [False, True]])
    with torch.no_grad(), pytest.raises(ValueError, match=r"enable_nested_tensor=False.*layers\.0\.linear1"):
        model(torch.randn(2, 2, 32), src_key_padding_mask=padding)


def test_a_merged_model_is_a_plain_one_again() -> None:
    model = adapted(AdapterCase(HUTConfig, {"r": 2}, len), "llama")
    merged = model.merge_and_unload()
    assert not isinstance(merged, PeftModel)
    assert not any(isinstance(module, AdapterLayer) for module in merged.modules())
    assert not hasattr(merged, "peft_config")
    again = get_peft_model(merged, HUTConfig(r=3))
    assert torch.equal(tiny.run(again), tiny.run(merged))


def test_unmerging_what_is_not_merged_only_warns() -> None:
    model = adapted(AdapterCase(HUTConfig, {"r": 2}, len), "llama", target_modules=["layers.0.self_attn.q_proj"])
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


@mergeable
def test_the_change_of_a_weight_can_be_asked_for(case: AdapterCase) -> None:
    model = adapted(case, "gpt2", target_modules=["c_attn"])
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    before, change = layer.weight.clone(), layer.get_delta_weight("default")
    model.merge_adapter()
    assert_close(layer.get_delta_weight("default"), change)
    assert_close(layer.weight - before, change)
