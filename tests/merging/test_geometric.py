"""SLERP and its relatives, Karcher mean, Model Stock: naive formulas in fp64, and their laws."""

import math

import pytest
import torch
from chunks import merged, stack_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hf_modular.merging import (
    KarcherConfig,
    MergeRecipe,
    ModelStockConfig,
    MultiSLERPConfig,
    NuSLERPConfig,
    SLERPConfig,
    merge_state_dicts,
)

TRUE = SLERPConfig(threshold=1.0)


def tensors(n, shape=(5, 7), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for _ in range(n)]


def slerp(t, a, b):
    """By turning a towards b in the plane of both: another way to the same point."""
    a, b = a.double().flatten(), b.double().flatten()
    u, v = a / a.norm(), b / b.norm()
    across = v - (u @ v) * u
    angle = math.atan2(float(across.norm()), float(u @ v))
    ends = [x * math.sin(s * angle) / math.sin(angle) for x, s in ((a, 1 - t), (b, t))]
    if abs(float(a.norm() - b.norm())) < 1e-9:
        turned = math.cos(t * angle) * u + math.sin(t * angle) * across / across.norm()
        assert_close(sum(ends), a.norm() * turned)
    return sum(ends)


@settings(deadline=None, max_examples=50)
@given(t=st.floats(0, 1), seed=st.integers(0, 1000), size=st.sampled_from([None, 4]))
def test_slerp_turns(t, seed, size):
    a, b = tensors(2, seed=seed)
    b = b * (a.norm() / b.norm())
    found = merged(SLERPConfig(t=t, threshold=1.0), stack_of(a, b), size)
    assert_close(found.flatten(), slerp(t, a, b).float(), atol=1e-6, rtol=1e-6)
    assert_close(found.norm(), a.norm())


def test_slerp_begins_at_the_base_or_the_first_model():
    a, b = tensors(2)
    for t, end in ((0.0, a), (1.0, b)):
        assert_close(merged(SLERPConfig(t=t), stack_of(a, b)), end)
        assert_close(merged(SLERPConfig(t=t), stack_of(a, a, b, has_base=False)), end)


def test_slerp_there_is_slerp_back():
    a, b = tensors(2)
    assert_close(merged(SLERPConfig(t=0.3), stack_of(a, b)), merged(SLERPConfig(t=0.7), stack_of(b, a)))


@pytest.mark.parametrize("angle", [1e-5, 1e-3, 0.5, 3.0, math.pi - 1e-3])
def test_the_threshold_decides_between_arc_and_line(angle):
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([math.cos(angle), math.sin(angle)])
    line, arc = (a + b) / 2, torch.tensor([math.cos(angle / 2), math.sin(angle / 2)])
    straight = abs(math.cos(angle)) > 0.9995
    assert_close(merged(SLERPConfig(), stack_of(a, b)), line if straight else arc)
    assert_close(merged(TRUE, stack_of(a, b)), line if angle == 1e-5 else arc, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "middle"),
    [
        ([1.0, 2.0], [-1.0, -2.0], [0.0, 0.0]),  # opposite: no arc is the shortest
        ([1.0, 2.0], [3.0, 6.0], [2.0, 4.0]),
        ([0.0, 0.0], [0.0, 2.0], [0.0, 2**0.5]),  # nothing has no direction: it is at a right angle
        ([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]),
        (3.0, 5.0, 4.0),
        (3.0, -1.0, 1.0),
    ],
)
@pytest.mark.parametrize("config", [TRUE, NuSLERPConfig(), NuSLERPConfig(flatten=False)])
def test_where_there_is_no_angle(config, a, b, middle):
    a, b, middle = map(torch.tensor, (a, b, middle))
    assert_close(merged(config, stack_of(a, a, b, has_base=False)), middle)


def test_slerp_is_of_two():
    a, b, c = ({"w": x} for x in tensors(3))
    for base, models in ((a, [b, c]), (None, [a]), (None, [a, b, c])):
        with pytest.raises(ValueError, match="slerp"):
            merge_state_dicts(base, models, SLERPConfig())
    with pytest.raises(ValueError, match="takes no weights"):
        merge_state_dicts(a, [b], SLERPConfig(), weights=[0.5])


def test_nuslerp_is_slerp_of_weights_or_of_task_vectors():
    base, a, b = tensors(3)
    there = merged(NuSLERPConfig(), stack_of(a, a, b, weights=[1.0, 3.0], has_base=False))
    assert_close(there.flatten(), slerp(0.75, a, b).float())
    around = merged(NuSLERPConfig(), stack_of(base, base + a, base + b, weights=[1.0, 3.0]))
    assert_close(around, base + slerp(0.75, a, b).float().view(base.shape))


@pytest.mark.parametrize("row_wise", [False, True])
@pytest.mark.parametrize("shape", [(5,), (4, 3), (2, 5, 3)])
def test_nuslerp_by_runs_along_an_axis(shape, row_wise):
    a, b = tensors(2, shape)
    config = NuSLERPConfig(flatten=False, row_wise=row_wise)
    found = merged(config, stack_of(a, a, b, weights=[0.7, 0.3], has_base=False))
    axis = 0 if row_wise else -1
    runs = (x.movedim(axis, -1).reshape(-1, shape[axis]) for x in (found, a, b))
    for run, one, other in zip(*runs, strict=True):
        assert_close(run, slerp(0.3, one, other).float())


def test_nuslerps_weights_must_not_cancel_out():
    a, b = ({"w": x} for x in tensors(2))
    with pytest.raises(ValueError, match="sum to 0"):
        merge_state_dicts(None, [a, b], NuSLERPConfig(), weights=[1, -1])


@pytest.mark.parametrize("size", [None, 6])
def test_multislerp_is_the_mean_direction_in_the_mean_length(size):
    base, *deltas = tensors(4)
    weights = [0.2, 0.5, 1.3]
    units = [w / 2 * d.double() / d.double().norm() for w, d in zip(weights, deltas, strict=True)]
    length = sum(w / 2 * d.double().norm() for w, d in zip(weights, deltas, strict=True))
    expected = base + (sum(units) / sum(units).norm() * length).float()
    assert_close(
        merged(MultiSLERPConfig(), stack_of(base, *(base + d for d in deltas), weights=weights), size), expected
    )


@pytest.mark.parametrize("config", [MultiSLERPConfig(), KarcherConfig()])
def test_the_middle_of_two_is_that_of_the_arc(config):
    a, b = tensors(2)
    b = b * (a.norm() / b.norm())
    found = merged(config, stack_of(a, a, b, has_base=False))
    assert_close(found.flatten(), slerp(0.5, a, b).float())


@pytest.mark.parametrize("config", [MultiSLERPConfig(), KarcherConfig()])
@pytest.mark.parametrize("models", [[1.0, -3.0], [[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]]])
def test_where_directions_cancel_out_models_are_averaged(config, models):
    found = merged(config, stack_of(torch.tensor(models[0]), *map(torch.tensor, models), has_base=False))
    assert_close(found, torch.tensor(models).mean(dim=0))


@pytest.mark.parametrize("config", [MultiSLERPConfig(), KarcherConfig(), NuSLERPConfig()])
def test_a_geometric_model_of_weight_0_has_no_effect(config):
    a, b = tensors(2)
    others = (0.0,) if isinstance(config, NuSLERPConfig) else (0.0, 0.0)
    found = merged(config, stack_of(a, a, *[b] * len(others), weights=[0.7, *others], has_base=False))
    assert_close(found, a)


def test_zeros_count_in_karchers_length_only():
    a, b = tensors(2)
    zero = torch.zeros_like(a)
    three = merged(KarcherConfig(), stack_of(a, a, zero, b, has_base=False))
    assert_close(three, 2 / 3 * merged(KarcherConfig(), stack_of(a, a, b, has_base=False)))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), n=st.integers(2, 5), size=st.sampled_from([None, 11]))
def test_at_karchers_mean_the_pulls_cancel_out(seed, n, size):
    models = tensors(n, (3, 4), seed)
    weights = torch.rand(n, generator=torch.Generator().manual_seed(seed)) + 0.1
    found = merged(
        KarcherConfig(), stack_of(models[0], *models, weights=weights.tolist(), has_base=False), size
    ).double()
    share = (weights / weights.sum()).double()
    length = sum(w * m.double().norm() for w, m in zip(share, models, strict=True))
    assert_close(found.norm(), length, rtol=1e-5, atol=1e-5)
    mean, pull = found.flatten() / found.norm(), torch.zeros(12, dtype=torch.float64)
    for w, model in zip(share, models, strict=True):
        u = model.double().flatten() / model.double().norm()
        across = u - (u @ mean) * mean
        pull += w * math.acos(float(u @ mean)) * across / across.norm()
    assert pull.norm() < 1e-5


def test_eps_says_when_directions_cancel_out():
    weights = torch.tensor([0.25, 0.75])
    inner = torch.eye(2)
    assert not torch.equal(MultiSLERPConfig().coefficients(inner, weights), weights)
    assert torch.equal(MultiSLERPConfig(eps=0.9).coefficients(inner, weights), weights)


def test_without_a_step_karcher_is_multislerp():
    models = tensors(3)
    stack = stack_of(models[0], *models, weights=[0.5, 0.2, 0.9], has_base=False)
    start = merged(MultiSLERPConfig(), stack)
    assert_close(merged(KarcherConfig(max_iter=0), stack), start)
    assert not torch.allclose(merged(KarcherConfig(), stack), start)


def model_stock(base, deltas):
    n, flat = len(deltas), [d.double().flatten() for d in deltas]
    pairs = [(i, j) for i in range(n) for j in range(i)]
    c = sum(flat[i] @ flat[j] / (flat[i].norm() * flat[j].norm()) for i, j in pairs) / len(pairs)
    t = n * c / (1 + (n - 1) * c)
    return base + (t * sum(deltas) / n).float()


@pytest.mark.parametrize("size", [None, 8])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_model_stock(n, size):
    base, common, *noise = tensors(n + 2)
    deltas = [common + x for x in noise]
    found = merged(ModelStockConfig(), stack_of(base, *(base + d for d in deltas)), size)
    assert_close(found, model_stock(base, deltas))


@pytest.mark.parametrize("shape", [(6,), (4, 6), (3, 2, 5)])
def test_model_stock_by_filter(shape):
    base, common, *noise = tensors(5, shape)
    deltas = [2 * common + x for x in noise]
    found = merged(ModelStockConfig(filter_wise=True, extrapolate=True), stack_of(base, *(base + d for d in deltas)))
    rows = [(base, deltas)] if len(shape) == 1 else [(base[i], [d[i] for d in deltas]) for i in range(shape[0])]
    assert_close(found, torch.stack([model_stock(*row) for row in rows]).view(shape))


def test_model_stock_where_models_agree_or_not():
    base, d = torch.zeros(4), torch.tensor([1.0, 2.0, 0.0, 0.0])
    across = torch.tensor([0.0, 0.0, 3.0, 1.0])
    assert_close(merged(ModelStockConfig(), stack_of(base, d, d, d)), d)
    for others in ((across,), (-d,), (0.5 * across - d,)):
        assert torch.equal(merged(ModelStockConfig(), stack_of(base, d, *others)), base)
    away = merged(ModelStockConfig(extrapolate=True), stack_of(base, d, 0.5 * across - d))
    assert away @ (0.25 * across) < 0
    assert torch.equal(merged(ModelStockConfig(extrapolate=True), stack_of(base, d, -d)), base)


def test_model_stock_is_the_same_however_small_the_changes_and_with_a_floor_is_not():
    base, a, b = torch.zeros(3), torch.tensor([3e-4, 0, 0]), torch.tensor([3e-4, 3e-4, 0])
    assert_close(merged(ModelStockConfig(), stack_of(base, a, b)) * 1e4, model_stock(base, [a, b]) * 1e4)
    assert merged(ModelStockConfig(length_floor=1e-6), stack_of(base, a, b)).norm() < 0.3 * a.norm()


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ({"merge_method": "slerp", "parameters": {"t": 0.3}}, {"t": 0.3, "threshold": 0.9995}),
        ({"merge_method": "nuslerp", "parameters": {"nuslerp_flatten": False}}, {"flatten": False, "row_wise": False}),
        ({"merge_method": "nuslerp", "parameters": {"nuslerp_row_wise": True}}, {"flatten": True, "row_wise": True}),
        ({"merge_method": "karcher"}, {"max_iter": 10, "tol": 1e-5}),
        ({"merge_method": "model_stock"}, {"filter_wise": False, "extrapolate": True, "length_floor": 1e-6}),
        ({"merge_method": "multislerp", "parameters": {"normalize_weights": False}}, {"normalize_weights": False}),
    ],
)
def test_a_recipes_words_are_mergekits(recipe, settings):
    models = [{"model": name} for name in ("m", "n")]
    base = {} if recipe["merge_method"] in ("karcher", "slerp") else {"base_model": "b"}
    method = MergeRecipe.load(recipe | base | {"models": models}).settings.at("w", 0.0).method
    assert {key: getattr(method, key) for key in settings} == settings


@pytest.mark.parametrize("method", [NuSLERPConfig(flatten=False), KarcherConfig(), ModelStockConfig()])
def test_settings_survive_a_recipe_of_the_same_name(method):
    base = None if method.base_model == "unused" else "b"
    assert MergeRecipe.of(method, ["m", "n"], base, None).settings.at("w", 0.0).method == method
