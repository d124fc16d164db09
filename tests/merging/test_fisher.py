"""Fisher-weighted averaging: the formula, its settings, and where the Fisher information comes from."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_modular.checkpoints import Checkpoint, save_checkpoint
from hf_modular.merging import FisherConfig, MergeRecipe, TaskArithmeticConfig, merge, merge_state_dicts

PLAIN = FisherConfig(normalize=False, floor=0.0)


def random_state(seed, positive=False):
    generator = torch.Generator().manual_seed(seed)
    state = {"a": torch.randn(4, 3, generator=generator), "b": torch.randn(5, generator=generator)}
    return {name: tensor.abs() + 0.1 for name, tensor in state.items()} if positive else state


def merged(models, fishers, config=PLAIN, weights=None):
    return merge_state_dicts(None, models, config, weights=weights, companions={"fisher": fishers})


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(0, 10**6), st.sampled_from([0.0, 1e-6, 0.8]), st.booleans(), st.booleans())
def test_the_formula(n, seed, floor, normalize, favor_first):
    models = [random_state(seed + i) for i in range(n)]
    fishers = [random_state(seed + 100 + i, positive=True) for i in range(n)]
    weights = [0.2 + i for i in range(n)]
    found = merged(models, fishers, FisherConfig(normalize, floor, favor_first), weights)
    numerator = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in models[0].items()}
    denominator = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in models[0].items()}
    for i, (model, fisher, weight) in enumerate(zip(models, fishers, weights, strict=True)):
        norm = sum(float(tensor.double().square().sum()) for tensor in fisher.values()) ** 0.5 if normalize else 1.0
        for name, tensor in fisher.items():
            share = tensor.double().clamp(min=floor if i == 0 or not favor_first else 0) * weight / norm
            numerator[name] += share * model[name]
            denominator[name] += share
    for name in found:
        torch.testing.assert_close(found[name].double(), numerator[name] / denominator[name], rtol=1e-5, atol=1e-6)


def test_a_model_that_does_not_care_does_not_count():
    models, cares = [random_state(0), random_state(1)], random_state(2, positive=True)
    indifferent = {name: torch.zeros_like(tensor) for name, tensor in cares.items()}
    found = merged(models, [indifferent, cares])
    torch.testing.assert_close(found, models[1])


def test_where_no_model_cares_the_first_one_stays_or_the_average_does():
    models = [random_state(0), random_state(1)]
    nothing = [{name: torch.zeros_like(tensor) for name, tensor in models[0].items()}] * 2
    first = merged(models, nothing, FisherConfig(normalize=False))
    assert all(torch.equal(first[name], models[0][name]) for name in first)
    for config in (PLAIN, FisherConfig(normalize=False, favor_first=False)):
        average = merged(models, nothing, config, weights=[1, 3])
        torch.testing.assert_close(average["a"], (models[0]["a"] + 3 * models[1]["a"]) / 4)


def test_tensors_without_fisher_information_are_averaged_and_named():
    models = [random_state(0), random_state(1)]
    fishers = [{"a": random_state(2 + i, positive=True)["a"], "tied": torch.ones(7)} for i in range(2)]
    with pytest.warns(UserWarning, match="there is no 'fisher' for b"):
        found = merged(models, fishers, FisherConfig(), weights=[3, 1])
    torch.testing.assert_close(found["b"], (3 * models[0]["b"] + models[1]["b"]) / 4)
    assert not torch.allclose(found["a"], (3 * models[0]["a"] + models[1]["a"]) / 4)


def test_information_that_broadcasts():
    models = [random_state(0), random_state(1)]
    per_column = [{"a": torch.rand(1, 3) + 0.1, "b": torch.rand(1) + 0.1} for _ in models]
    expanded = [{"a": f["a"].expand(4, 3), "b": f["b"].expand(5)} for f in per_column]
    found, expected = merged(models, per_column), merged(models, expanded)
    assert all(torch.equal(found[name], expected[name]) for name in found)


FITTING = random_state(3, positive=True)


@pytest.mark.parametrize(
    ("fishers", "config", "weights", "message"),
    [
        ([], PLAIN, None, "needs 'fisher' of each of the 2 models, but got 0"),
        ([FITTING] * 3, PLAIN, None, "of each of the 2 models, but got 3"),
        ([FITTING, {"a": FITTING["a"]}], PLAIN, None, "fisher 1 has no 'fisher' for b, but others have"),
        ([{"c": FITTING["a"]}] * 2, PLAIN, None, "must have names of the model's tensors, such as a, b, but has none"),
        (
            [FITTING, FITTING | {"a": torch.ones(4, 2)}],
            PLAIN,
            None,
            r"a must fit .* \(4, 3\), but has \(4, 2\) in fisher 1",
        ),
        ([FITTING, FITTING | {"a": torch.ones(4, 3).int()}], PLAIN, None, "a must hold floating-point numbers"),
        ([FITTING, FITTING | {"b": -torch.ones(5)}], PLAIN, None, "information for b must be finite and not below 0"),
        ([FITTING, FITTING | {"b": torch.full((5,), float("nan"))}], PLAIN, None, "information for b must be finite"),
        ([FITTING, {k: 0 * v for k, v in FITTING.items()}], FisherConfig(), None, "but that of model 1 is"),
        ([FITTING] * 2, PLAIN, [1, -0.5], "weights must not be negative"),
    ],
)
def test_refuses(fishers, config, weights, message):
    with pytest.raises(ValueError, match=message):
        merged([random_state(0), random_state(1)], fishers, config, weights)


def test_a_method_that_has_no_use_for_it_refuses_it():
    with pytest.raises(ValueError, match="'task_arithmetic' has no use for 'fisher'"):
        merge_state_dicts(random_state(0), [random_state(1)], TaskArithmeticConfig(), companions={"fisher": [FITTING]})


@pytest.fixture
def saved(tmp_path):
    """Two models with Fisher information, as a recipe, and what is to come out."""
    models = [random_state(0), random_state(1)]
    fishers = [random_state(2 + i, positive=True) for i in range(2)]
    entries = []
    for i, (model, fisher) in enumerate(zip(models, fishers, strict=True)):
        save_checkpoint(tmp_path / f"model{i}", model)
        save_checkpoint(tmp_path / f"fisher{i}", fisher)
        entries.append({"model": str(tmp_path / f"model{i}"), "fisher": str(tmp_path / f"fisher{i}")})
    return {"merge_method": "fisher", "models": entries}, merged(models, fishers, FisherConfig())


def test_a_recipe_names_it_beside_each_model(saved, tmp_path):
    recipe, expected = saved
    report = merge(recipe, tmp_path / "out", progress=False)
    with Checkpoint(tmp_path / "out") as found:
        assert all(torch.equal(found.read(name), tensor) for name, tensor in expected.items())
    assert [entry["model"] for entry in report.inputs] == [
        entry[key] for entry in recipe["models"] for key in ("model", "fisher")
    ]
    again = MergeRecipe.load(tmp_path / "out" / "merge_recipe.yaml")
    assert [entry.fisher for entry in again.models] == [entry["fisher"] for entry in recipe["models"]]


def test_square_roots_say_that_they_are(saved, tmp_path):
    recipe, expected = saved
    for i in range(2):
        folder = tmp_path / f"fisher{i}"
        with Checkpoint(folder) as whole:
            roots = {name: whole.read(name).sqrt() for name in whole.tensors}
        save_checkpoint(folder, roots, overwrite=True)
        (folder / "fisher_config.json").write_text(json.dumps({"root": True}))
    merge(recipe, tmp_path / "out", progress=False)
    with Checkpoint(tmp_path / "out") as found:
        for name, tensor in expected.items():
            torch.testing.assert_close(found.read(name), tensor)


def test_a_recipe_that_lacks_it_or_cannot_use_it(saved, tmp_path):
    recipe, _ = saved
    with pytest.raises(ValueError, match="'linear' has no use for 'fisher'"):
        merge(recipe | {"merge_method": "linear"}, tmp_path / "out")
    del recipe["models"][0]["fisher"]
    with pytest.raises(ValueError, match="needs 'fisher' of each of the 2 models, but got 1"):
        merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
