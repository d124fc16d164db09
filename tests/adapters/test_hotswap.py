"""The weights of one adapter take the place of another's, where they lie."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter as pefts_hotswap_adapter
from torch import Tensor, nn

from adapters import tiny
from adapters.conftest import Saved, adapted
from adapters.table import MERGEABLE, METHODS
from hf_modular import FLoRAConfig, HUTConfig, MoSConfig, SSFConfig, hotswap_adapter
from hf_modular.testing import AdapterCase

all_methods = pytest.mark.parametrize("case", METHODS, ids=str)
Make = Callable[[AdapterCase, str], Saved]


def other(case: AdapterCase) -> PeftModel:
    return tiny.move(adapted(case, "llama", task_type="CAUSAL_LM"), seed=9)


def places(model: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in model.state_dict(keep_vars=True).items()}


@all_methods
def test_it_is_swapped_in_place(case: AdapterCase, saved: Make) -> None:
    made = saved(case, "llama")
    model = other(case)
    before = places(model)
    assert not torch.equal(tiny.run(model), made.output)
    hotswap_adapter(model, made.adapter)
    assert torch.equal(tiny.run(model), made.output)
    assert places(model) == before


@all_methods
def test_one_of_several_in_a_model_of_transformers(case: AdapterCase, saved: Make) -> None:
    made = saved(case, "llama")
    model = made.model()
    model.add_adapter(case.config(), "mine")
    hotswap_adapter(model, made.adapter, "mine")
    assert torch.equal(tiny.run(model.eval()), made.output)


@pytest.mark.parametrize("case", MERGEABLE, ids=str)
def test_a_merged_adapter_stays(case: AdapterCase, saved: Make) -> None:
    made, model = saved(case, "llama"), other(case)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"is merged into 'model\.layers\.0.*unmerge_adapter"):
        hotswap_adapter(model, made.adapter)


def llama(config: object, seed: int = 1) -> PeftModel:
    torch.manual_seed(3)
    return tiny.move(get_peft_model(tiny.model("llama"), config), seed=seed).eval()


REFUSED = {
    "another type": (HUTConfig(), SSFConfig(), "A HFM_SSF adapter cannot take the place of a HFM_HUT"),
    "another form": (HUTConfig(), HUTConfig(form="low_rank"), "form is 'tile' and would be 'low_rank'"),
    "another scale": (FLoRAConfig(), FLoRAConfig(scale=1.0), r"scale is 4\.0 and would be 1\.0"),
    "other layers": (
        SSFConfig(target_modules=["q_proj", "k_proj"]),
        SSFConfig(target_modules=["q_proj"]),
        r"3 of its tensors.*k_proj\.hfm_ssf_adapter\.scale' is \(32,\) and would be None",
    ),
}


@pytest.mark.parametrize(("old", "new", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_alike_is_refused(old: HUTConfig, new: HUTConfig, message: str, tmp_path: Path) -> None:
    llama(new, seed=5).save_pretrained(tmp_path)
    model = llama(old)
    before: dict[str, Tensor] = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, tmp_path)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_shards_that_were_chosen_by_another_seed(tmp_path: Path) -> None:
    """The choice is saved with the adapter."""
    one, two = llama(MoSConfig(seed=1)), llama(MoSConfig(seed=2), seed=5)
    two.save_pretrained(tmp_path)
    hotswap_adapter(one, tmp_path)
    assert torch.equal(tiny.run(one), tiny.run(two))


def test_unknown_adapters_and_other_types(tmp_path: Path) -> None:
    llama(HUTConfig()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no adapter 'mine' to be swapped out; it has \['default'\]"):
        hotswap_adapter(llama(HUTConfig()), tmp_path, "mine")
    with pytest.raises(TypeError, match="is a LORA of PEFT"):
        hotswap_adapter(llama(LoraConfig()), tmp_path)
    with pytest.raises(ValueError, match="only supports LORA but HFM_HUT was passed"):
        pefts_hotswap_adapter(llama(HUTConfig()), str(tmp_path), "default", torch_device="cpu")
