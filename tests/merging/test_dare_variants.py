"""DAREx: q given and in closed form, columns and importance masks, and DARE before PCB."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hf_modular.merging import DAREConfig, MergeRecipe, PCBConfig, merge_state_dicts
from hf_modular.merging.dare import best_q

SHAPES = {
    "embed.weight": (9, 6),
    "layer.weight": (8, 6),
    "layer.bias": (8,),
    "kernel": (5, 7, 2, 3),
    "norm.weight": (6,),
    "none": (0, 3),
    "one": (),
}


def states(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for _ in range(count)]


def delta(config, seed=0, models=1, **more):
    base, *others = states(models + 1, seed)
    merged = merge_state_dicts(base, others, config, **more)
    return {name: merged[name] - base[name] for name in SHAPES}, [
        {name: other[name] - base[name] for name in SHAPES} for other in others
    ]


@given(p=st.sampled_from([0.3, 0.9, 0.99]), shift=st.floats(-1, 1), seed=st.integers(0, 20))
@settings(max_examples=12, deadline=None)
def test_the_closed_form_is_the_least_mean_square(p, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn(6, 40, generator=generator, dtype=torch.float64) + shift  # of 6 neurons
    found = best_q(1 - p, float(c.square().sum()), float(c.sum(1).square().sum()))
    sums = torch.stack([((torch.rand(6, 40, generator=generator) >= p) * c).sum(1) for _ in range(3000)])  # (draws, 6)

    def mean_square(q):
        return float((c.sum(1) - sums / q).square().mean())

    # as good as any other, up to what 3,000 draws can tell
    candidates = torch.linspace(1 - p, 1, 60)[:-1]
    assert mean_square(found) <= 1.06 * min(mean_square(float(q)) for q in candidates) + 1e-9
    assert 1 - p <= found <= 1


def test_a_given_q_divides_what_is_kept():
    plain, _ = delta(DAREConfig(drop=0.7, rescale="none"), models=2)
    divided, _ = delta(DAREConfig(drop=0.7, rescale="q", q=0.4), models=2)
    assert_close(divided, {name: x / 0.4 for name, x in plain.items()})
    inverse, _ = delta(DAREConfig(drop=0.7), models=2)
    same, _ = delta(DAREConfig(drop=0.7, rescale="q", q=1 - 0.7), models=2)
    assert_close(same, inverse)


def test_models_and_tensors_may_have_their_own(tmp_path):
    recipe = {
        "merge_method": "dare",
        "base_model": "b",
        "models": [{"model": "x", "parameters": {"q": 0.3}}, {"model": "y", "parameters": {"q": 0.6}}],
        "parameters": {"rescale": "q", "drop": 0.8},
    }
    resolved = MergeRecipe.load(recipe).settings.at("layer.weight", 0.0)
    assert resolved.each["q"] == (0.3, 0.6)
    recipe["models"] = [{"model": "x"}]
    recipe["parameters"]["q"] = [{"filter": "layer", "value": 0.5}, {"value": 0.25}]
    loaded = MergeRecipe.load(recipe)
    assert [loaded.settings.at(name, 0.0).method.q for name in ("layer.weight", "norm.weight")] == [0.5, 0.25]


def test_the_closed_form_by_layer():
    p = 0.8
    found, (first, second) = delta(DAREConfig(drop=p, rescale="q", q="closed_form"), models=2)
    plain = [delta(DAREConfig(drop=p, rescale="none"), models=2, weights=weights)[0] for weights in ([1, 0], [0, 1])]
    expected = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for deltas, kept in zip((first, second), plain, strict=True):
        layers = {}
        for name in ("layer.weight", "kernel"):
            rows = deltas[name].flatten(1)
            layers[name] = min(1 - p + p * float(rows.square().sum() / rows.sum(1).square().sum()), 1)
        mean = sum(layers.values()) / 2
        own = {**dict.fromkeys(SHAPES, mean), **layers, "layer.bias": layers["layer.weight"]}
        expected = {name: expected[name] + kept[name] / own[name] for name in SHAPES}
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_whole_columns_are_dropped():
    found, (original,) = delta(DAREConfig(drop=0.5, mask="columns"), seed=3)
    for name in ("layer.weight", "kernel", "embed.weight"):
        columns = found[name].transpose(0, 1).flatten(1)
        kept = columns.abs().sum(1) > 0
        assert 0 < int(kept.sum()) < len(kept)
        assert_close(columns[kept], 2 * original[name].transpose(0, 1).flatten(1)[kept])
    assert int((found["norm.weight"] != 0).sum()) in range(1, 6)
    again, _ = delta(DAREConfig(drop=0.5, mask="columns"), seed=3, models=1)
    other, _ = delta(DAREConfig(drop=0.5, mask="columns", rescale="norm"), seed=3)
    assert all(torch.equal(found[name], again[name]) for name in SHAPES)
    for name in ("layer.weight", "kernel"):
        assert_close(other[name].abs().sum(), original[name].abs().sum())


def test_the_largest_are_kept():
    found, (original,) = delta(DAREConfig(drop=0.75, mask="magnitude", rescale="none"))
    for name in ("layer.weight", "kernel", "layer.bias"):
        flat = original[name].flatten()
        kept = flat.abs() >= flat.abs().sort(descending=True).values[int(0.25 * len(flat)) - 1]
        assert_close(found[name].flatten(), flat * kept)


def test_wanda_keeps_the_largest_of_each_row_by_their_inputs():
    base, model = states(2)
    sizes = {"layer.weight": torch.rand(1, 6) + 0.1, "kernel": torch.rand(1, 7, 1, 1) + 0.1}
    config = DAREConfig(drop=0.5, mask="wanda", rescale="q", q=0.8)
    with pytest.warns(UserWarning, match="there is no 'activations' for"):
        merged = merge_state_dicts(base, [model], config, companions={"activations": [sizes]})
    for name, shape in SHAPES.items():
        if len(shape) < 1 or 0 in shape:
            continue
        d = model[name] - base[name]
        rows = (d.abs() * sizes.get(name, 1)).reshape(shape[0] if len(shape) > 1 else 1, -1)
        kept = rows >= rows.sort(dim=1, descending=True).values[:, [rows.shape[1] // 2 - 1]]
        assert_close(merged[name] - base[name], d * kept.view(shape) / 0.8, rtol=1e-4, atol=1e-5)


def test_of_equal_elements_the_first_are_kept():
    base, model = {"w": torch.zeros(2, 4)}, {"w": torch.ones(2, 4)}
    config = DAREConfig(drop=0.5, mask="wanda", rescale="none")
    found = merge_state_dicts(base, [model], config, companions={"activations": [{"w": torch.ones(1, 4)}]})
    assert found["w"].tolist() == [[1, 1, 0, 0]] * 2


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_pcb_of_thinned_task_vectors(scope):
    base, *models = states(4)
    thinned = []
    for i in range(3):
        weights = [float(i == j) for j in range(3)]
        thinned.append(merge_state_dicts(base, models, DAREConfig(drop=0.6), weights=weights, seed=5))
    expected = merge_state_dicts(base, thinned, PCBConfig(density=0.4, scope=scope))
    found = merge_state_dicts(base, models, PCBConfig(density=0.4, scope=scope, drop=0.6), seed=5)
    assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found["kernel"], merge_state_dicts(base, models, PCBConfig(density=0.4))["kernel"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rescale": "q"}, "rescale='q' needs a `q`, a number or 'closed_form', but there is none"),
        ({"q": 0.5}, "`q` counts with rescale='q' alone, but got q=0.5 and rescale='inverse'"),
        ({"mask": "magnitude"}, "are for what is dropped at random, but got mask='magnitude'"),
        ({"mask": "magnitude", "rescale": "q", "q": "closed_form"}, "are for what is dropped at random"),
    ],
)
def test_settings_that_do_not_go_together(given, message):
    with pytest.raises(ValueError, match=message):
        delta(DAREConfig(**given))


def test_settings_that_are_refused():
    with pytest.raises(ValueError, match=r"`q` must be a number or 'closed_form', but got q='search': .*dare_q"):
        DAREConfig(rescale="q", q="search")
    with pytest.raises(ValueError, match=r"`q` must be in \(0, 1\], but got q=1.5"):
        DAREConfig(rescale="q", q=1.5)
    with pytest.raises(ValueError, match="`drop` must be in"):
        PCBConfig(drop=1.0)
    recipe = {
        "merge_method": "dare",
        "base_model": "b",
        "models": [{"model": "x", "parameters": {"q": "closed_form"}}],
        "parameters": {"rescale": "q"},
    }
    settings = MergeRecipe.load(recipe).settings.at("w", 0.0)
    from hf_modular.merging.engine._preflight import setting_problems

    assert "q='closed_form' is for all models alike" in str([*setting_problems({"w": settings}, 1, True)])
