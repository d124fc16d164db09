"""Every merge method on adapters: what it makes of their changes in memory, or a refusal."""

import pytest
import torch

from adapter_merging.zoo import adapted, difference, lora, merged_weights, zoo
from hf_modular import merge_adapters
from hf_modular.merging import METHODS, merge_state_dicts

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")

TARGETS = ["fc", "free", "conv1"]
REFUSED = {"fisher": r"needs \['fisher'\]", "ssd": r"needs \['fisher', 'forget'\]"}


def pair():
    """Two adapters that have something in common, one of them on more layers."""
    model = adapted(lora(target_modules=TARGETS), lora(r=2, lora_alpha=6, target_modules=["fc", "free"]))
    with torch.no_grad():
        for layer in (model.base_model.model.fc, model.base_model.model.free):
            layer.lora_A["second"].weight.copy_(layer.lora_A["first"].weight[:2])
            layer.lora_B["second"].weight.add_(layer.lora_B["first"].weight[:, :2])
    return model


def wanted_of(model, adapters, method):
    """W₀ + what the method makes of the changes, with a base of zeros if it must have one."""
    start = zoo().state_dict()
    changed = [f"{layer}.weight" for layer in TARGETS]
    deltas = [{n: merged_weights(model, adapter)[n] - start[n] for n in changed} for adapter in adapters]
    zeros = {n: torch.zeros_like(start[n]) for n in changed} if method.base_model == "required" else None
    return start | {n: start[n] + d for n, d in merge_state_dicts(zeros, deltas, method, seed=5).items()}


@pytest.mark.parametrize("name", METHODS)
def test_it_gives_what_it_makes_of_the_changes_or_is_refused(name):
    method, model = METHODS[name](), pair()
    adapters = ["first", "second"][: int(min(method.model_counts[1], 2))]
    try:
        wanted = wanted_of(model, adapters, method)
    except ValueError:
        assert name in REFUSED
        with pytest.raises(ValueError, match=REFUSED[name]):
            merge_adapters(model, adapters, method, rank=60, seed=5)
        assert [*model.peft_config] == ["first", "second"]
        return
    assert name not in REFUSED
    merge_adapters(model, adapters, method, rank=60, seed=5)
    assert difference(merged_weights(model, "merged"), wanted, zoo()) < 1e-4
