"""Several adapters in one model: together, one after the other, and one per sample of a batch."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.testing import assert_close
from transformers import GenerationConfig

from adapters import tiny
from adapters.conftest import TASKS, Saved, adapted
from adapters.table import MERGEABLE, METHODS
from hf_modular import HUTConfig, SSFConfig
from hf_modular.testing import AdapterCase

all_methods = pytest.mark.parametrize("case", METHODS, ids=str)
Make = Callable[[AdapterCase, str], Saved]
BASE = "__base__"


def two(case: AdapterCase, kind: str, **choices: object) -> PeftModel:
    """A model with the adapters `one` and `two`, and `one` active."""
    model = adapted(case, kind, task_type=TASKS.get(kind), **choices)
    model.add_adapter("two", case.config(task_type=TASKS.get(kind), **choices))
    model.set_adapter("two")
    tiny.move(model, seed=7)
    model.set_adapter("default")
    return model.eval()


def outputs(model: PeftModel) -> dict[str, Tensor]:
    """What each adapter gives alone."""
    found = {}
    for name in ("default", "two"):
        model.set_adapter(name)
        found[name] = tiny.run(model)
    with model.disable_adapter():
        found[BASE] = tiny.run(model)
    return found


@all_methods
def test_adapters_are_switched_deleted_and_reloaded(case: AdapterCase, tmp_path: Path) -> None:
    model = two(case, "llama")
    alone = outputs(model)
    model.save_pretrained(tmp_path)
    model.set_adapter("two")
    with pytest.warns(UserWarning, match="two was active which is now deleted. Setting active adapter to default"):
        model.delete_adapter("two")
    assert torch.equal(tiny.run(model), alone["default"])
    model.load_adapter(tmp_path / "two", "again")
    model.set_adapter("again")
    assert torch.equal(tiny.run(model), alone["two"])


@all_methods
def test_different_targets(case: AdapterCase) -> None:
    """A layer with one adapter only goes on as the base model where the other adapter is active."""
    model = adapted(case, "llama", target_modules=["q_proj"])
    model.add_adapter("two", case.config(target_modules=["up_proj"]))
    model.set_adapter("two")
    tiny.move(model, seed=7)
    alone = tiny.run(adapted(case, "llama", target_modules=["q_proj"]))
    other = tiny.run(model)
    model.set_adapter("default")
    assert torch.equal(tiny.run(model), alone)
    assert not torch.equal(other, alone)
    names = ["default", "two"]
    assert_close(tiny.run(model, adapter_names=names), torch.stack([alone[0], other[1]]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", MERGEABLE, ids=str)
def test_adapters_merge_together_and_one_by_one(case: AdapterCase) -> None:
    model = two(case, "llama")
    alone = outputs(model)
    for name in ("two", "default"):
        model.merge_adapter(adapter_names=[name])
        assert_close(tiny.run(model), alone[name], rtol=1e-3, atol=1e-4)
        model.unmerge_adapter()
    model.base_model.set_adapter(["default", "two"])
    both = tiny.run(model)
    merged = model.merge_and_unload(adapter_names=["default", "two"])
    assert_close(tiny.run(merged), both, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_merged_does_not_forbid_merging_the_other() -> None:
    model = adapted(AdapterCase(SSFConfig, {"shift": True}, len), "llama", target_modules=["q_proj"])
    model.add_adapter("two", SSFConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"cannot be merged(.|\n)*model\.layers\.2\.self_attn\.q_proj: .*shift=True"):
        model.merge_adapter()
    model.merge_adapter(adapter_names=["two"])
    assert model.base_model.model.model.layers[0].self_attn.q_proj.merged_adapters == ["two"]


# -- an adapter per sample --------------------------------------------------------------------------------------------


@all_methods
@pytest.mark.parametrize("kind", ["llama", "t5", "classifier", "vit"])
def test_mixed_batches(case: AdapterCase, kind: str) -> None:
    model = two(case, kind)
    alone = outputs(model)
    for names in (["two", "default"], [BASE, "two"], [BASE, BASE]):
        expected = torch.stack([alone[name][i] for i, name in enumerate(names)])
        assert_close(tiny.run(model, adapter_names=names), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(tiny.run(model), alone["two"]), "the active adapter is another one afterwards"


@all_methods
def test_mixed_batches_with_a_head_each(case: AdapterCase) -> None:
    model = two(case, "vit", modules_to_save=["classifier"])
    alone = outputs(model)
    expected = torch.stack([alone["two"][0], alone["default"][1]])
    assert_close(tiny.run(model, adapter_names=["two", "default"]), expected, rtol=1e-4, atol=1e-5)


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams by config": {"generation_config": GenerationConfig(num_beams=2, max_new_tokens=4, min_new_tokens=4)},
    "several answers": {"num_beams": 4, "num_return_sequences": 2},
}


@all_methods
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_mixed_batches_generate(case: AdapterCase, kind: str, way: dict[str, object]) -> None:
    """Beam search repeats the samples in a decoder, and not in an encoder."""
    model = two(case, kind)
    alone = {}
    for name in ("default", "two"):
        model.set_adapter(name)
        alone[name] = scores(model, way)
    expected = torch.stack([alone["two"][:, 0], alone["default"][:, 1]], 1)
    assert not torch.allclose(expected, torch.stack([alone["default"][:, 0], alone["two"][:, 1]], 1), atol=1e-3)
    assert_close(scores(model, way, adapter_names=["two", "default"]), expected, rtol=1e-3, atol=1e-4)


def scores(model: PeftModel, way: dict[str, object], **kwargs: object) -> Tensor:  # (tokens, samples, beams, words)
    limits = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    found = model.generate(
        input_ids=tiny.TOKENS,
        attention_mask=torch.ones_like(tiny.TOKENS),
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **({} if "generation_config" in way else limits),
        **way,
        **kwargs,
    )
    return torch.stack(found.scores).unflatten(1, (2, -1))


@pytest.fixture
def mixed() -> PeftModel:
    return two(AdapterCase(HUTConfig, {"r": 2}, len), "llama")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["default"], r"1 names for an input of shape \(2, 7, 32\) in layer 'model\.layers\.0"),
        (["default", "two", "two"], "3 names"),
        (["default", "nobody"], r"non-existing adapter\(s\): nobody\. The model has \['default', 'two'\]"),
    ],
)
def test_wrong_names_are_refused(mixed: PeftModel, names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.run(mixed, adapter_names=names)
    assert not any(m._forward_pre_hooks for m in mixed.modules()), "the hooks stay behind"


def test_mixed_batches_are_for_inference(mixed: PeftModel) -> None:
    names = ["default", "two"]
    with pytest.raises(ValueError, match=r"`adapter_names` is for inference|training mode"):
        tiny.run(mixed.train(), adapter_names=names)
    mixed.eval()
    mixed.merge_adapter()
    with pytest.raises(ValueError, match=r"merged \['default'\]"):
        tiny.run(mixed, adapter_names=names)
    mixed.unmerge_adapter()
    with mixed.disable_adapter():
        assert torch.equal(tiny.run(mixed, adapter_names=names), tiny.run(tiny.model("llama")))
