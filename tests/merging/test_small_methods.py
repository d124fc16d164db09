"""Robust weight signatures, grafting and dampening: their formulas, their way back, and what they refuse."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hf_modular.checkpoints import Checkpoint, save_checkpoint
from hf_modular.merging import GraftConfig, MergeRecipe, RWSConfig, SSDConfig, merge, merge_state_dicts

SHAPES = {"conv": (4, 3, 2), "norm": (5,), "head": (3, 7)}


def states(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for _ in range(count)]


def signature(base, clean, robust):
    a, v = (clean - base).double(), (robust - base).double()
    return v - (v * a).sum() / (a * a).sum() * a


def test_signatures_are_orthogonal_to_clean_fine_tuning():
    base, clean, *robust = states(4)
    patched = merge_state_dicts(base, [clean, *robust], RWSConfig(scale=0.8))
    for name in SHAPES:
        signatures = [signature(base[name], clean[name], model[name]) for model in robust]
        assert_close(patched[name].double(), clean[name] + 0.4 * sum(signatures), rtol=1e-5, atol=1e-6)
        change = (patched[name] - clean[name]).double()
        assert abs(float((change * (clean[name] - base[name])).sum())) < 1e-4


@given(scale=st.floats(-2, 2), seed=st.integers(0, 30), average=st.sampled_from([None, "norm", ""]))
@settings(max_examples=20, deadline=None)
def test_a_patch_comes_out_again(scale, seed, average):
    base, clean, one, two, target = states(5, seed)
    kept = {"target": "last", "include": "conv|norm", "average": average}
    patched = merge_state_dicts(base, [clean, one, two, target], RWSConfig(scale=scale, **kept))
    assert torch.equal(patched["head"], target["head"])
    back = merge_state_dicts(base, [clean, one, two, patched], RWSConfig(scale=-scale, **kept))
    assert_close(back, target, rtol=1e-4, atol=1e-5)


def test_averaged_tensors_of_the_clean_model_are_the_mean_of_the_robust_ones():
    base, clean, *robust = states(5)
    patched = merge_state_dicts(base, [clean, *robust], RWSConfig(average="norm"))
    assert_close(patched["norm"], sum(model["norm"] for model in robust) / 3)
    assert not torch.allclose(patched["conv"], sum(model["conv"] for model in robust) / 3, atol=1e-2)


def test_a_clean_model_that_is_the_base_takes_nothing_away():
    base, robust = states(2)
    patched = merge_state_dicts(base, [base, robust], RWSConfig())
    assert_close(patched, robust)


def test_a_target_must_be_another_model():
    base, clean, robust = states(3)
    with pytest.raises(ValueError, match="rws needs a clean model, robust ones and with target='last' one to patch"):
        merge_state_dicts(base, [clean, robust], RWSConfig(target="last"))


@given(density=st.floats(0.01, 1), scope=st.sampled_from(["global", "tensor"]), seed=st.integers(0, 30))
@settings(max_examples=25, deadline=None)
def test_the_largest_elements_are_grafted(density, scope, seed):
    base, *models = states(3, seed)
    found = merge_state_dicts(base, models, GraftConfig(density=density, scope=scope), weights=[0.7, -1.2])
    expected = {name: tensor.clone() for name, tensor in base.items()}
    for weight, model in zip([0.7, -1.2], models, strict=True):
        deltas = {name: model[name] - base[name] for name in SHAPES}
        everything = torch.cat([delta.flatten() for delta in deltas.values()])
        for name, delta in deltas.items():
            among = everything if scope == "global" else delta.flatten()
            kept = max(-int(-len(among) * density // 1), 1)
            mask = delta.abs() >= among.abs().sort(descending=True).values[kept - 1]
            expected[name] += weight * delta * mask
    assert_close(found, expected)


def test_equal_elements_are_grafted_together():
    base, model = {"w": torch.zeros(8)}, {"w": torch.tensor([1.0, 2, 2, -2, 0.5, 0, 3, 0])}
    found = merge_state_dicts(base, [model], GraftConfig(density=0.25))
    assert found["w"].tolist() == [0, 2, 2, -2, 0, 0, 3, 0]


def fishers(seed):
    return [{name: tensor.square() for name, tensor in state.items()} for state in states(2, seed)]


@given(
    selection=st.floats(0.1, 20),
    dampening=st.floats(0, 3),
    of=st.sampled_from(["weights", "task_vector"]),
    seed=st.integers(0, 30),
)
@settings(max_examples=25, deadline=None)
def test_what_matters_for_the_forgotten_alone_is_dampened(selection, dampening, of, seed):
    base, model = states(2, seed)
    fisher, forget = fishers(seed + 100)
    beside = {"fisher": [fisher], "forget": [forget]}
    found = merge_state_dicts(base, [model], SSDConfig(selection, dampening, of), companions=beside)
    for name in SHAPES:
        chosen = forget[name] > selection * fisher[name]
        factor = torch.where(chosen, (dampening * fisher[name] / forget[name]).clamp(max=1), 1.0)
        start = base[name] if of == "task_vector" else torch.zeros(())
        assert_close(found[name], start + factor * (model[name] - start), rtol=1e-5, atol=1e-6)
        assert torch.equal(found[name][~chosen], model[name][~chosen])


def test_nothing_of_importance_for_the_rest_is_wiped_out():
    model = {"w": torch.tensor([1.0, 2.0, 3.0])}
    beside = {"fisher": [{"w": torch.tensor([0.0, 1.0, 0.0])}], "forget": [{"w": torch.tensor([1.0, 10.0, 0.0])}]}
    found = merge_state_dicts(None, [model], SSDConfig(), companions=beside)
    assert found["w"].tolist() == [0.0, 2.0, 3.0]


def test_dampening_refuses():
    base, model = states(2)
    fisher, forget = fishers(3)
    with pytest.raises(ValueError, match='of="task_vector" needs a base model'):
        merge_state_dicts(
            None, [model], SSDConfig(of="task_vector"), companions={"fisher": [fisher], "forget": [forget]}
        )
    with pytest.raises(ValueError, match="needs 'forget' of each of the 1 models, but got 0"):
        merge_state_dicts(base, [model], SSDConfig(), companions={"fisher": [fisher]})
    forget["norm"][1] = -1
    with pytest.raises(ValueError, match="the 'forget' information for norm must be finite and not below 0"):
        merge_state_dicts(base, [model], SSDConfig(), companions={"fisher": [fisher], "forget": [forget]})


def test_a_recipe_names_both_kinds_of_information(tmp_path):
    _, model = states(2)
    fisher, forget = fishers(3)
    save_checkpoint(tmp_path / "model", model)
    save_checkpoint(tmp_path / "all", fisher)
    save_checkpoint(tmp_path / "some", {name: tensor.sqrt() for name, tensor in forget.items()})
    (tmp_path / "some" / "fisher_config.json").write_text(json.dumps({"root": True}))
    entry = {"model": "model", "fisher": "all", "forget": "some"}
    recipe = {"merge_method": "ssd", "models": [{key: str(tmp_path / name) for key, name in entry.items()}]}
    merge(recipe | {"parameters": {"selection": 2.0}}, tmp_path / "out", progress=False)
    expected = merge_state_dicts(
        None, [model], SSDConfig(selection=2.0), companions={"fisher": [fisher], "forget": [forget]}
    )
    with Checkpoint(tmp_path / "out") as found:
        for name, tensor in expected.items():
            assert_close(found.read(name), tensor, rtol=1e-5, atol=1e-6)
    again = MergeRecipe.load(tmp_path / "out" / "merge_recipe.yaml")
    assert again.models[0].forget == str(tmp_path / "some")
