"""Results of another type than LoRA, and what cannot be merged or represented."""

import pytest
import torch
from adapters import tiny
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn

from adapter_merging.zoo import NAMES, adapted, difference, expected, lora, merged_weights, zoo
from hf_modular import CompacterConfig, FLoRAConfig, HUTConfig, MoSConfig, SSFConfig, merge_adapters
from hf_modular.merging import LinearConfig, TaskArithmeticConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
]

ALL = ["embed", "fc", "free", "gpt", "conv1", "conv2", "conv3", "point"]


def into_folder(model, config, base, folder, **more):
    """The merged adapter on the base model, and the report."""
    report = merge_adapters(model, NAMES[:2], TaskArithmeticConfig(), into=config, output_dir=folder, **more)
    return PeftModel.from_pretrained(base, folder, adapter_name="merged"), report


def test_flora_holds_all_at_full_ranks(tmp_path):
    model = adapted(lora(), lora(r=2))
    wanted = expected(model, zoo(), {"first": 1, "second": 1})
    loaded, report = into_folder(model, FLoRAConfig(r=40, scale=3), zoo(), tmp_path / "out")
    assert report.error < 1e-5
    assert difference(merged_weights(loaded, "merged"), wanted, zoo()) < 1e-5


def test_flora_at_lower_ranks_loses_what_the_report_says(tmp_path):
    model = adapted(lora(), lora(r=2))
    wanted = expected(model, zoo(), {"first": 1, "second": 1})
    config = FLoRAConfig(ranks=[4, 3, 1, 2, 2], rank_pattern={"point": 2, "conv1": 2, "gpt": 5, "fc": [2, 5]})
    loaded, report = into_folder(model, config, zoo(), tmp_path / "out", warn_above=1)
    found = merged_weights(loaded, "merged")
    assert 0.05 < report.error < 0.9
    assert difference(found, wanted, zoo()) == pytest.approx(report.error, rel=1e-3)
    delta = (wanted["fc.weight"] - zoo().fc.weight.detach()).double()
    singular = torch.linalg.svdvals(delta)
    nearest = float((singular[2:].square().sum() / singular.square().sum()).sqrt())
    assert report.layers["fc"]["error"] == pytest.approx(nearest, rel=1e-4)


def ssf_or_hut(config):
    """Two adapters whose sum is of the same form again, or near to it."""
    return adapted(config(), config())


@pytest.mark.parametrize("targets", [[*ALL, "norm"]])
def test_a_sum_of_ssf_is_ssf(targets):
    """Put into the model itself: a model of SSF adapters gets another one."""
    model = ssf_or_hut(lambda: SSFConfig(target_modules=targets))
    wanted = expected(model, zoo(), {"first": 0.5, "second": 0.5})
    report = merge_adapters(model, NAMES[:2], LinearConfig())
    assert (report.peft_type, report.error < 1e-5) == ("HFM_SSF", True)
    assert difference(merged_weights(model, "merged"), wanted, zoo()) < 1e-5


@pytest.mark.parametrize("form", ["tile", "row_column", "low_rank"])
def test_hut_is_found_again(form):
    """One adapter is of the form that is fitted, so that nothing need be lost."""
    model = adapted(HUTConfig(r=2, form=form, target_modules=ALL))
    wanted = merged_weights(model, "first")
    report = merge_adapters(model, ["first"], LinearConfig())
    assert report.error < 2e-3
    assert difference(merged_weights(model, "merged"), wanted, zoo()) == pytest.approx(report.error, abs=1e-4)


@pytest.mark.parametrize("form", ["tile", "row_column", "low_rank"])
def test_alternating_least_squares_ends_where_no_factor_can_be_better(form):
    model = adapted(*(HUTConfig(r=2, form=form, target_modules=["fc", "conv1"]) for _ in range(2)))
    wanted = expected(model, zoo(), {"first": 0.5, "second": 0.5})
    report = merge_adapters(model, NAMES[:2], LinearConfig(), warn_above=1)
    assert difference(merged_weights(model, "merged"), wanted, zoo()) == pytest.approx(report.error, rel=1e-3)
    layer = model.base_model.model.fc
    adapter = layer.adapters["merged"]
    target = wanted["fc.weight"]
    for parameter in (adapter.A.requires_grad_(), adapter.B.requires_grad_()):
        weight, _ = adapter.transform(layer.base_layer.weight, layer.base_layer.bias)
        loss = (weight - target).square().sum()
        (gradient,) = torch.autograd.grad(loss, parameter)
        assert float(gradient.abs().max()) < 1e-2 * float(loss.detach())


def test_biases_need_a_place():
    model = adapted(SSFConfig(target_modules=["embed", "fc"]), SSFConfig(target_modules=["embed", "fc"]))
    with pytest.raises(ValueError, match=r"cannot be on an embedding, but 'embed' is one"):
        merge_adapters(model, NAMES[:2], LinearConfig(), rank=12, output_dir="never")
    model = adapted(SSFConfig(target_modules=["norm"]))
    with pytest.raises(ValueError, match=r"layer 'norm' is a norm. Choose another type, such as `into=SSFConfig\(\)`"):
        merge_adapters(model, ["first"], LinearConfig(), rank=12, output_dir="never")


def test_types_that_a_model_cannot_hold_beside_its_own():
    model = adapted(MoSConfig(shards=2, target_modules=["fc", "gpt"]))
    with pytest.raises(ValueError, match=r"HFM_MOS cannot hold a LoRA.* `output_dir`.* use space='parameters'"):
        merge_adapters(model, ["first"], LinearConfig())
    model = adapted(SSFConfig(target_modules=["fc"]))
    with pytest.raises(ValueError, match=r"or no `rank` for a result of type HFM_SSF"):
        merge_adapters(model, ["first"], LinearConfig(), rank=3)


def test_a_rank_must_be_stated_where_there_is_none(tmp_path):
    model = adapted(IA3Config(target_modules=["fc"], feedforward_modules=[]))
    from hf_modular.merging import TIESConfig

    with pytest.raises(ValueError, match=r"layer 'fc' has no low rank of its own: state the `rank`"):
        merge_adapters(model, ["first"], TIESConfig(), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


REFUSED = {
    "pissa": (lambda: {"init_lora_weights": "pissa", "target_modules": ["fc"]}, r"init_lora_weights='pissa'"),
    "olora": (lambda: {"init_lora_weights": "olora", "target_modules": ["fc"]}, r"init_lora_weights='olora'"),
    "alora": (lambda: {"alora_invocation_tokens": [1], "target_modules": ["fc"]}, "acts on some tokens only"),
    "tokens": (lambda: {"trainable_token_indices": {"embed": [1]}, "target_modules": ["fc"]}, "single tokens"),
    "parameters": (lambda: {"target_modules": [], "target_parameters": ["fc.weight"]}, "adapts parameters"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_no_change_of_weights_is_refused(case):
    settings, words = REFUSED[case]
    model = adapted(lora(**settings()))
    with pytest.raises(ValueError, match=words):
        merge_adapters(model, ["first"], LinearConfig())
    assert [*model.peft_config] == ["first"]


def test_a_network_behind_a_layer_has_no_weight(tmp_path):
    model = adapted(CompacterConfig(reduction_factor=2, phm_dim=2, target_modules=["fc"]))
    with pytest.raises(ValueError, match=r"cannot be merged"):
        merge_adapters(model, ["first"], LinearConfig(), output_dir=tmp_path / "out")


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_grouped_convolutions_are_refused():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 2, groups=2)

    model = get_peft_model(Grouped(), LoraConfig(r=2, target_modules=["conv"]), "first")
    with pytest.raises(ValueError, match="grouped convolution"):
        merge_adapters(model, ["first"], LinearConfig())


def test_merged_adapters_must_be_taken_out_first():
    model = adapted(lora(), lora())
    model.merge_adapter(["first"])
    with pytest.raises(ValueError, match=r"has merged \['first'\] into its weight: call `unmerge_adapter` first"):
        merge_adapters(model, NAMES[:2], LinearConfig())


def test_heads_of_different_sizes_are_refused():
    model = adapted(lora(modules_to_save=["head"]), lora(modules_to_save=["head"]))
    model.base_model.model.head.modules_to_save["second"] = nn.Linear(5, 3)
    with pytest.raises(
        ValueError, match=r"must have one shape.*'head\.(weight|bias)'.* Keep the adapters' heads apart"
    ):
        merge_adapters(model, NAMES[:2], LinearConfig())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"adapters": ["first", "nobody"]}, r"no adapters \['nobody'\]; it has \['first', 'second'\]"),
        ({"adapters": ["first", "first"]}, "can be merged once"),
        ({"adapters": "first"}, "must be a list of names"),
        ({"adapter_name": "second"}, "has an adapter 'second' already"),
        ({"weights": [1]}, "needs one weight"),
        ({"weights": [1, -1]}, "must not sum to 0"),
        ({"rank": 0}, "`rank` must be a positive integer"),
        ({"rank": True}, "`rank` must be a positive integer"),
        ({"space": "both"}, "`space` must be 'weights' or 'parameters'"),
        ({"rank": 3, "into": LoraConfig()}, "Give `rank` or `into`, not both"),
        ({"into": IA3Config()}, "but got IA3Config"),
        ({"into": SSFConfig(target_modules=["fc"])}, "leave its `target_modules` out"),
    ],
)
def test_a_wrong_call_changes_nothing(settings, words):
    model = adapted(lora(), lora())
    call = {"adapters": NAMES[:2], **settings}
    with pytest.raises(ValueError, match=words):
        merge_adapters(model, config=LinearConfig(), **call)
    assert [*model.peft_config] == ["first", "second"]


def test_only_models_with_adapters_are_taken():
    with pytest.raises(TypeError, match="must be a PeftModel, but got a Zoo"):
        merge_adapters(zoo(), ["first"], LinearConfig())


def test_adapters_of_different_base_models_are_noted():
    model = adapted(lora(), lora())
    for name in NAMES[:2]:
        model.peft_config[name].base_model_name_or_path = f"someone/{name}"
    report = merge_adapters(model, NAMES[:2], LinearConfig())
    assert report.notes == ["the adapters name different base models: ['someone/first', 'someone/second']"]
    assert model.peft_config["merged"].base_model_name_or_path is None
    assert "relative error 0" in report.summary()


def test_the_settings_of_a_chosen_lora_are_kept():
    model = adapted(lora(), lora())
    wanted = expected(model, zoo(), {"first": 0.5, "second": 0.5})
    into = LoraConfig(r=8, lora_alpha=32, use_rslora=True, lora_dropout=0.1)
    merge_adapters(model, NAMES[:2], LinearConfig(), into=into)
    config = model.peft_config["merged"]
    assert (config.r, config.lora_alpha, config.use_rslora, config.lora_dropout) == (8, 32, True, 0.1)
    assert difference(merged_weights(model, "merged"), wanted, zoo()) < 2e-6


def test_quantised_models_can_hold_the_adapters():
    bnb = pytest.importorskip("bitsandbytes")
    base = tiny.model("llama")
    for layer in base.model.layers:
        old = layer.self_attn.q_proj
        new = bnb.nn.Linear4bit(32, 32, bias=False, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        layer.self_attn.q_proj = new.to("cpu")
    base.is_loaded_in_4bit = True
    model = adapted(*(LoraConfig(r=2, target_modules=["q_proj"]) for _ in range(2)), base=base)
    merge_adapters(model, NAMES[:2], TaskArithmeticConfig())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    parts = {}
    for name in (*NAMES[:2], "merged"):
        A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
        parts[name] = layer.scaling[name] * x @ A.t() @ B.t()
    torch.testing.assert_close(parts["merged"], parts["first"] + parts["second"], rtol=1e-4, atol=1e-4)
