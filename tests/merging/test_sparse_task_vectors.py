"""TIES, DARE, Breadcrumbs, DELLA and SCE: their formulas, element by element, and their laws."""

import math

import pytest
import torch
from chunks import merged, stack_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load_file
from torch.testing import assert_close

from hf_modular.merging import (
    BreadcrumbsConfig,
    DAREConfig,
    DELLAConfig,
    MergeRecipe,
    SCEConfig,
    TIESConfig,
    merge_state_dicts,
)
from hf_modular.merging.della import by_rank

SHAPE = (6, 8)
SPARSE = {
    "ties": TIESConfig(density=0.4),
    "ties, sum": TIESConfig(density=0.4, normalize=False, scale=0.7),
    "ties, rescaled": TIESConfig(density=0.4, rescale="norm"),
    "ties, inverse": TIESConfig(density=0.4, rescale="inverse"),
    "ties, mergekit": TIESConfig(density=0.4, election="mergekit"),
    "trimmed": TIESConfig(density=0.4, election="none", normalize=False),
    "dare": DAREConfig(drop=0.3),
    "dare, ties": DAREConfig(drop=0.3, election="symmetric", normalize=True),
    "dare, norm": DAREConfig(drop=0.3, rescale="norm", election="mergekit"),
    "breadcrumbs": BreadcrumbsConfig(density=0.5, gamma=0.2),
    "breadcrumbs, ties": BreadcrumbsConfig(density=0.5, gamma=0.2, election="symmetric"),
    "della": DELLAConfig(density=0.5, epsilon=0.2),
    "della, norm": DELLAConfig(density=0.5, epsilon=0.2, rescale="norm", normalize=False),
    "della, linear": DELLAConfig(density=0.5, epsilon=0.2, rescale="none", election="none"),
}


def models_of(seed, n=3, coarse=False):
    g = torch.Generator().manual_seed(seed)
    base, *deltas = (torch.randn(SHAPE, generator=g) for _ in range(n + 1))
    deltas = [(4 * delta).round() / 8 if coarse else 0.3 * delta for delta in deltas]
    return (base * 16).round() / 16, deltas


def reference(config, stack):
    """The formula with Python's floats, one element after another."""
    weights, thinned = stack.weights.tolist(), []
    for i in range(len(stack.models)):
        delta = (stack.models[i] - stack.base).flatten().tolist()
        kept, factors = kept_by(config, stack, i, delta)
        after = sum(abs(d) for d, k in zip(delta, kept, strict=True) if k)
        ratio = sum(map(abs, delta)) / after if config.rescale == "norm" and after else 1.0
        thinned.append([d * k * f * ratio for d, k, f in zip(delta, kept, factors, strict=True)])
    mixed = [config.scale * combined(config, weights, column) for column in zip(*thinned, strict=True)]
    return stack.base + torch.tensor(mixed).view(SHAPE)


def kept_by(config, stack, i, delta):
    """Which elements are kept, and what each is multiplied by with "inverse"."""
    size, order = len(delta), sorted(range(len(delta)), key=lambda j: abs(delta[j]))
    share = 1 - config.drop if isinstance(config, DAREConfig) else config.density
    factors = [1 / share if config.rescale == "inverse" else 1.0] * size
    match config:
        case TIESConfig():
            first = sorted(range(size), key=lambda j: -abs(delta[j]))[: max(1, int(share * size))]
            return [j in first for j in range(size)], factors
        case DAREConfig():
            return (stack.bernoulli(i, share).flatten() > 0).tolist(), factors
        case BreadcrumbsConfig():
            low = max(0, size - int(share * size) - int(config.gamma * size))
            return [j in order[low : low + int(share * size)] for j in range(size)], factors
        case DELLAConfig():
            chances = [0.0] * size
            for row in range(SHAPE[0]):
                here = [j for j in order if j // SHAPE[1] == row]
                for rank, j in enumerate(here):
                    chances[j] = share - config.epsilon + 2 * config.epsilon * rank / (SHAPE[1] - 1)
            drawn = stack.uniform(i).flatten().tolist()
            inverse = [1 / c if config.rescale == "inverse" else 1.0 for c in chances]
            return [u < c for u, c in zip(drawn, chances, strict=True)], inverse


def combined(config, weights, values):
    terms = [w * v for w, v in zip(weights, values, strict=True)]
    if config.election == "none":
        return sum(terms) / (sum(weights) if config.normalize else 1)
    total = math.fsum(terms)
    sign = 1 if total > 1e-7 else -1 if total < -1e-7 else int(config.election == "mergekit")
    agree = [t * sign > 0 for t in terms]
    shares = [w if config.election == "mergekit" else abs(w) for w in weights]
    divisor = sum(s for s, a in zip(shares, agree, strict=True) if a) if config.normalize else 1
    return sum(t for t, a in zip(terms, agree, strict=True) if a) / (divisor or 1)


@pytest.mark.parametrize("size", [None, 11])
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("title", SPARSE)
def test_the_formula(title, coarse, size):
    base, deltas = models_of(3, coarse=coarse)
    weights = [0.5, 1.0, 0.25] if coarse else [0.3, 1.1, -0.4]
    stack = stack_of(base, *(base + delta for delta in deltas), weights=weights, seed=5)
    assert_close(merged(SPARSE[title], stack, size), reference(SPARSE[title], stack))


def test_each_model_may_have_its_own_settings():
    base, deltas = models_of(4)
    own = {"density": (0.2, 1.0, 0.6)}
    stack = stack_of(base, *(base + delta for delta in deltas), settings=own)
    config = TIESConfig(election="none", normalize=False)
    alone = [
        merged(TIESConfig(density=d, election="none"), stack_of(base, base + x)) - base
        for d, x in zip(own["density"], deltas, strict=True)
    ]
    assert_close(merged(config, stack, 7), base + sum(alone))


@pytest.mark.parametrize(("density", "kept"), [(0.0, 0), (0.001, 1), (0.5, 24), (0.99, 47), (1.0, 48)])
@pytest.mark.parametrize("coarse", [False, True])
def test_ties_keeps_so_many(density, kept, coarse):
    base, (delta,) = models_of(5, n=1, coarse=coarse)
    delta = delta.where(delta != 0, 0.125)
    found = merged(TIESConfig(density=density), stack_of(base, base + delta), 9)
    assert int((found != base).sum()) == kept


@pytest.mark.parametrize(
    ("density", "gamma", "kept"), [(0.0, 0.5, 0), (0.5, 0.0, 24), (0.5, 0.5, 24), (0.9, 0.5, 43), (1.0, 0.5, 48)]
)
def test_breadcrumbs_keeps_so_many(density, gamma, kept):
    base, (delta,) = models_of(6, n=1)
    found = merged(BreadcrumbsConfig(density=density, gamma=gamma), stack_of(base, base + delta), 9)
    assert int((found != base).sum()) == kept
    if density + gamma == 1:
        assert (found - base).abs().max() < delta.abs().median() + 1e-6


@pytest.mark.parametrize("title", [title for title, config in SPARSE.items() if not isinstance(config, DELLAConfig)])
def test_a_model_of_weight_0_has_no_effect(title):
    base, deltas = models_of(7)
    models = [base + delta for delta in deltas]
    with_it = merged(SPARSE[title], stack_of(base, *models, weights=[0.7, 0.4, 0.0]))
    assert_close(with_it, merged(SPARSE[title], stack_of(base, *models[:2], weights=[0.7, 0.4])))


@pytest.mark.parametrize("election", ["none", "symmetric", "mergekit"])
def test_identical_models_are_one(election):
    base, (delta,) = models_of(8, n=1)
    config = TIESConfig(density=1.0, election=election)
    assert_close(merged(config, stack_of(base, *[base + delta] * 3, weights=[0.2, 0.5, 0.1])), base + delta)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_the_opposite_of_everything_is_the_opposite_result(data):
    few = st.sampled_from([-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0])
    deltas = torch.from_numpy(data.draw(arrays.arrays("float32", (3, 12), elements=few)))
    density = data.draw(st.sampled_from([0.25, 0.5, 1.0]))
    zero = torch.zeros(12)
    there = merged(TIESConfig(density=density), stack_of(zero, *deltas))
    back = merged(TIESConfig(density=density), stack_of(zero, *-deltas))
    assert torch.equal(there, -back)


def test_on_a_tie_of_signs_the_base_is_kept_and_mergekit_takes_the_positive():
    stack = stack_of([0.0], [1.0], [-1.0])
    assert merged(TIESConfig(density=1.0), stack).item() == 0
    assert merged(TIESConfig(density=1.0, election="mergekit"), stack).item() == 1


def test_a_negative_weight_takes_away_and_with_mergekit_adds():
    stack = stack_of([0.0], [1.0], weights=[-1.0])
    assert merged(TIESConfig(density=1.0), stack).item() == -1
    assert merged(TIESConfig(density=1.0, election="mergekit"), stack).item() == 1


def test_weights_that_cancel_out_are_refused_for_a_mean():
    stack = stack_of([0.0], [1.0], [2.0], weights=[1.0, -1.0])
    with pytest.raises(ValueError, match="must not sum to 0"):
        merged(TIESConfig(density=1.0, election="none"), stack)


@pytest.mark.parametrize("config", [DELLAConfig(density=0.6, epsilon=0.3), DAREConfig(drop=0.4)])
def test_inverse_keeps_the_expectation(config):
    delta = torch.linspace(-1, 1, 400).expand(500, 400).contiguous()
    found = merged(config, stack_of(torch.zeros(500, 400), delta, seed=1))
    assert_close(found.mean(dim=0), delta[0], atol=0.2, rtol=0)
    assert abs(float((found - delta).mean())) < 5 * 1.2 / 200_000**0.5


def test_della_keeps_the_large_more_often():
    delta = torch.randn(300, 201, generator=torch.Generator().manual_seed(9))
    kept = merged(DELLAConfig(density=0.5, epsilon=0.4, rescale="none"), stack_of(torch.zeros_like(delta), delta)) != 0
    ranks = delta.abs().argsort(dim=1).argsort(dim=1)
    for low, high in ((0, 20), (90, 110), (180, 201)):
        chosen = kept[(ranks >= low) & (ranks < high)].float()
        expected = 0.1 + 0.8 * (low + high - 1) / 2 / 200
        assert abs(float(chosen.mean()) - expected) < 5 * 0.5 / len(chosen) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 7), (3, 1), (4, 5), (0, 3), (2, 200_000)])
def test_dellas_chances_by_rank(shape, dtype):
    x = (8 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)).round()
    ranks = x.abs().argsort(dim=1, stable=True).argsort(dim=1)
    expected = 0.2 + 0.6 * (ranks / (shape[1] - 1) if shape[1] > 1 else torch.full(ranks.shape, 0.5))
    assert_close(by_rank(x, 0.2, 0.8), expected.to(dtype), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["embed", "up", "norm", "coarse", "tiny"])
def test_dellas_chances_are_mergekits(name, request):
    oracles = load_file(request.config.rootpath / "tests/data/mergekit.safetensors")
    for i in range(3):
        if f"della/chances/{i}/{name}" not in oracles:  # all the same, for equal tensors
            continue
        delta, chances = (
            oracles[f"inputs/model {i}/{name}"] - oracles[f"inputs/base/{name}"],
            oracles[f"della/chances/{i}/{name}"],
        )
        rows = delta.reshape(-1, delta.shape[-1])
        assert_close(by_rank(rows, 0.4, 0.8).view(delta.shape), chances, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rescale", ["norm", "inverse"])
@pytest.mark.parametrize("shape", [(), (1,), (70_000,), (3, 1), (300, 500), (2, 3, 50_000), (0, 3), (3, 0)])
def test_della_in_parts_is_della(shape, rescale, monkeypatch):
    base, *deltas = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(3))
    config, stack = DELLAConfig(rescale=rescale), stack_of(base, *(base + delta for delta in deltas))
    found = merged(config, stack)
    monkeypatch.setattr("hf_modular.merging.della._SORTED", 1 << 30)
    assert found.shape == base.shape
    assert_close(merged(config, stack), found, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.15, 0.15), (0.9, 0.1)])
def test_della_refuses_chances_that_are_none(density, epsilon):
    with pytest.raises(ValueError, match=r"density - epsilon and density \+ epsilon must be in \(0, 1\)"):
        merge_state_dicts({"w": torch.zeros(4)}, [{"w": torch.ones(4)}], DELLAConfig(density=density, epsilon=epsilon))


def sce(config, base, models):
    """Select, calculate, erase with Python's floats."""
    columns = [[m - b for m in column] for b, *column in zip(base, *models, strict=True)]
    n = len(models)
    variance = [sum((d - sum(c) / n) ** 2 for d in c) / n for c in columns]
    varying = [j for j, v in enumerate(variance) if v > 1e-12]
    chosen = sorted(varying, key=lambda j: -variance[j])[: int(config.select_topk * len(varying))]
    if config.select_topk < 1:
        columns = [c if j in chosen else [0.0] * n for j, c in enumerate(columns)]
    energies = [math.fsum(c[i] ** 2 for c in columns) for i in range(n)]
    shares = [e / (sum(energies) or 1) for e in energies]
    out = []
    for b, c in zip(base, columns, strict=True):
        sign = math.copysign(1, sum(c))
        agree = [i for i in range(n) if c[i] * sign > 0]
        divisor = sum(shares[i] for i in agree)
        out.append(b + (sum(shares[i] * c[i] for i in agree) / divisor if divisor else 0.0))
    return torch.tensor(out)


@pytest.mark.parametrize("size", [None, 5])
@pytest.mark.parametrize("topk", [0.0, 0.01, 0.3, 0.9, 1.0])
def test_sce(topk, size):
    base, deltas = models_of(10)
    deltas[1] *= 3
    for delta in deltas:
        delta.view(-1)[::7] = 0.25  # the same in all: no variance
    config, models = SCEConfig(select_topk=topk), [base + delta for delta in deltas]
    expected = sce(config, base.flatten().tolist(), [model.flatten().tolist() for model in models])
    assert_close(merged(config, stack_of(base, *models), size), expected.view(SHAPE))


def test_sce_weighs_however_small_the_changes_are_and_with_a_floor_does_not():
    stack = stack_of([0.0, 0.0], [3e-6, 0.0], [1e-6, 0.0])
    assert_close(merged(SCEConfig(), stack)[0].item(), (9 * 3e-6 + 1 * 1e-6) / 10)
    assert_close(merged(SCEConfig(energy_floor=1e-6), stack)[0].item(), 2e-6)


def test_sce_of_what_nobody_changes_is_the_base():
    base, _ = models_of(11)
    assert torch.equal(merged(SCEConfig(select_topk=0.5), stack_of(base, base, base)), base)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ties", {"density": 1.0, "normalize": True, "rescale": "none", "election": "mergekit"}),
        ("dare_ties", {"drop": 0.0, "normalize": False, "rescale": "norm", "election": "mergekit"}),
        ("dare_linear", {"drop": 0.0, "normalize": False, "rescale": "norm", "election": "none"}),
        ("breadcrumbs", {"density": 1.0, "gamma": 0.01, "normalize": False, "rescale": "none", "election": "none"}),
        ("breadcrumbs_ties", {"density": 1.0, "gamma": 0.01, "normalize": False, "election": "mergekit"}),
        ("della", {"density": 1.0, "epsilon": 0.15, "normalize": True, "rescale": "norm", "election": "mergekit"}),
        ("della_linear", {"density": 1.0, "normalize": False, "rescale": "norm", "election": "none"}),
        ("sce", {"select_topk": 1.0, "energy_floor": 1e-6, "election": "mergekit"}),
    ],
)
def test_a_recipes_defaults_are_mergekits(name, settings):
    method = MergeRecipe.load({"merge_method": name, "base_model": "b", "models": [{"model": "m"}]}).method
    assert {key: getattr(method, key) for key in settings} == settings


@pytest.mark.parametrize("method", [TIESConfig(rescale="norm"), BreadcrumbsConfig(), DELLAConfig(), SCEConfig()])
def test_settings_of_ours_survive_a_recipe_of_the_same_name(method):
    recipe = MergeRecipe.of(method, ["m"], "b")
    assert recipe.settings.at("w", 0.0).method == method
