"""Merged adapters against the truth: the weights of the merged models, merged by hand."""

import warnings

import pytest
import torch
from torch.testing import assert_close

from adapter_merging.zoo import CONVOLUTIONS, NAMES, TOKENS, adapted, difference, expected, lora, merged_weights, zoo
from hf_modular import merge_adapters
from hf_modular.merging import DAREConfig, LinearConfig, TaskArithmeticConfig, TIESConfig, merge_state_dicts

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:.*lora_bias=True.*:UserWarning"),
]

BIASED = ["fc", "gpt", *CONVOLUTIONS]

# Settings with which PEFT's own merge is wrong or refused, and the plain ones.
CASES = {
    "plain": ({}, {}),
    "rank-stabilised": ({"use_rslora": True, "r": 8}, {"use_rslora": True, "r": 8}),
    "one-rank-stabilised": ({"use_rslora": True, "lora_alpha": 3}, {}),
    "alphas-and-ranks": ({"r": 2, "lora_alpha": 16}, {"r": 5, "lora_alpha": 3}),
    "patterns": ({"rank_pattern": {"fc": 3, "^conv2": 2}, "alpha_pattern": {"free": 20}}, {"r": 2}),
    "dora": ({"use_dora": True}, {"use_dora": True, "r": 3}),
    "dora-and-lora": ({"use_dora": True}, {}),
    "biases": ({"lora_bias": True, "target_modules": BIASED}, {"lora_bias": True, "target_modules": BIASED}),
    "some-biases": ({"lora_bias": True, "target_modules": ["fc"]}, {"target_modules": BIASED}),
    "other-layers": ({"target_modules": ["embed", "fc"]}, {"target_modules": ["fc", "conv3"]}),
    "heads": ({"modules_to_save": ["head"]}, {"modules_to_save": ["head"]}),
    "one-head": ({"modules_to_save": ["head", "norm"]}, {}),
}


def pair(case: str):
    return adapted(*(lora(**settings) for settings in CASES[case]))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.4)], ids=["sum", "negative"])
def test_task_arithmetic_is_exact(case, weights):
    model = pair(case)
    wanted = expected(model, zoo(), dict(zip(NAMES, weights, strict=False)))
    rank = 18 if "dora" in case else None  # what DoRA adds is of full rank
    report = merge_adapters(model, NAMES[:2], TaskArithmeticConfig(), weights=weights, rank=rank)
    assert report.error < 1e-6
    assert difference(merged_weights(model, "merged"), wanted, zoo()) < 2e-6


@pytest.mark.parametrize("case", CASES)
def test_the_adapter_gives_what_the_merged_model_gives(case):
    """Not only its weights: the adapter on its layers, not merged into them."""
    model, base = pair(case), zoo()
    wanted = expected(model, base, {"first": 0.5, "second": 0.5})
    merge_adapters(model, NAMES[:2], LinearConfig(), rank=18 if "dora" in case else None)
    model.set_adapter("merged")
    base.load_state_dict(wanted)
    assert_close(model(TOKENS), base(TOKENS), rtol=1e-4, atol=1e-4)


def test_a_bias_of_a_layer_without_one():
    """It cannot be merged into the layer, but the adapter can have it."""
    model = adapted(*(lora(lora_bias=True, target_modules=["fc", "free"]) for _ in range(2)))
    free = model.base_model.model.free
    x = torch.randn(3, 24)
    both = [model.set_adapter(name) or free(x) - free.base_layer(x) for name in NAMES[:2]]
    merge_adapters(model, NAMES[:2], TaskArithmeticConfig())
    model.set_adapter("merged")
    assert_close(free(x) - free.base_layer(x), sum(both), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    [TIESConfig(density=0.4), DAREConfig(drop=0.5), TIESConfig(density=0.7, election="mergekit")],
    ids=["ties", "dare", "mergekit-ties"],
)
@pytest.mark.parametrize("case", ["alphas-and-ranks", "some-biases", "one-head", "dora"])
def test_other_methods_merge_what_whole_models_would_give(case, method):
    """At full rank the fit loses nothing, so what is left is what the method makes of the deltas."""
    model, base = pair(case), zoo().state_dict()
    models = [merged_weights(model, name) for name in NAMES[:2]]
    zeros = {name: torch.zeros_like(value) for name, value in base.items()}
    deltas = [{name: value - base[name] for name, value in merged.items()} for merged in models]
    changed = {name for name in base if any(bool(delta[name].any()) for delta in deltas)}
    wanted = merge_state_dicts(
        {name: zeros[name] for name in changed},
        [{name: delta[name] for name in changed} for delta in deltas],
        method,
        weights=[0.6, 1.1],
        seed=3,
    )
    wanted = {name: value + wanted[name] if name in wanted else value for name, value in base.items()}
    report = merge_adapters(model, NAMES[:2], method, weights=[0.6, 1.1], seed=3, rank=60)
    assert report.error < 1e-6
    found = merged_weights(model, "merged")
    if isinstance(method, DAREConfig):  # its masks belong to (out, in), which these layers store the other way round
        found |= {name: wanted[name] for name in ("embed.weight", "gpt.weight")}
    assert difference(found, wanted, zoo()) < 1e-5


def test_one_adapter_with_weight_one_is_itself():
    model = pair("alphas-and-ranks")
    report = merge_adapters(model, ["first"], TaskArithmeticConfig())
    assert report.error == 0
    own, merged = (merged_weights(model, name) for name in ("first", "merged"))
    assert difference(merged, own, zoo()) < 1e-7


def test_the_order_of_adapters_does_not_matter():
    model = adapted(lora(), lora(r=3), lora(target_modules=["fc"]))
    settings = {"rank": 4, "warn_above": 1.0}
    merge_adapters(model, NAMES, LinearConfig(), weights=[1, 2, 3], adapter_name="forth", **settings)
    merge_adapters(model, NAMES[::-1], LinearConfig(), weights=[3, 2, 1], adapter_name="back", **settings)
    assert difference(merged_weights(model, "forth"), merged_weights(model, "back"), zoo()) < 1e-5


def test_a_smaller_rank_is_the_nearest_and_its_error_is_told():
    model = pair("plain")
    wanted = expected(model, zoo(), {"first": 1.0, "second": 1.0})
    with pytest.warns(UserWarning, match=r"relative error of 0\.\d+, above 0\.1"):
        report = merge_adapters(model, NAMES[:2], TaskArithmeticConfig(), rank=2)
    found, start = merged_weights(model, "merged"), zoo().state_dict()
    assert abs(difference(found, wanted, zoo()) - report.error) < 1e-5
    delta = (wanted["fc.weight"] - start["fc.weight"]).double()
    singular = torch.linalg.svdvals(delta)
    lost = float((singular[2:].square().sum() / singular.square().sum()).sqrt())
    assert report.layers["fc"]["rank"] == 2
    assert report.layers["fc"]["error"] == pytest.approx(lost, rel=1e-4)
    assert float((found["fc.weight"] - wanted["fc.weight"]).norm() / delta.norm()) == pytest.approx(lost, rel=1e-4)


def test_a_rank_may_be_a_share_of_the_squared_norm():
    model = pair("alphas-and-ranks")
    report = merge_adapters(model, NAMES[:2], TaskArithmeticConfig(), rank=0.9995)
    assert all(layer["error"] <= 0.0005**0.5 + 1e-6 for layer in report.layers.values())
    assert len({layer["rank"] for layer in report.layers.values()}) > 1
    assert model.base_model.model.fc.r["merged"] == report.layers["fc"]["rank"]


def test_pefts_result_is_another_one():
    """What the tests above hold us to, PEFT's own method does not do."""
    model = adapted(*(lora(target_modules=["fc"], **settings) for settings in CASES["rank-stabilised"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "peft", combination_type="svd", svd_rank=8)
    start = zoo().fc.weight.detach()
    found = merged_weights(model, "peft")["fc.weight"] - start
    wanted = expected(model, zoo(), {"first": 0.5, "second": 0.5})["fc.weight"] - start
    assert float(found.norm() / wanted.norm()) == pytest.approx(8**0.5, rel=0.05)
