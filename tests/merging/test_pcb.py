"""PCB-Merging: the authors' numbers, the formula written out, and what follows from it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chunks import merged, stack_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hf_modular.merging import PCBConfig, merge_state_dicts

REFERENCE = load_file(Path(__file__).parents[1] / "data" / "reference.safetensors")
AUTHORS = [
    ("raw", 1e-4, "0.05", "1.0"),
    ("raw", 1e-4, "0.2", "1.0"),
    ("scale_invariant", 0.01, "0.05", "1.2"),
    ("scale_invariant", 0.01, "0.2", "1.2"),
]
TASKS = [
    [0.30, -0.20, 0.05, 0, 0.10, -0.40, 0.02, 0.25, 0.01, -0.15],
    [-0.10, -0.30, 0.20, 0.05, -0.02, -0.35, 0.03, 0.20, -0.05, 0.40],
    [0.20, 0.10, 0.15, -0.05, 0.12, 0.30, 0.04, -0.10, 0.02, 0.35],
]


def part(prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in REFERENCE.items() if name.startswith(prefix)}


def merged_delta(deltas, config, **options):
    """The merge of flat task vectors."""
    models = [{"w": torch.as_tensor(delta)} for delta in deltas]
    return merge_state_dicts({"w": torch.zeros_like(models[0]["w"])}, models, config, **options)["w"]


def reference(deltas, config):
    """The formula on a matrix of flat task vectors, each quantile by sorting."""
    n, size = deltas.shape

    def normalized(x):
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        return torch.where(high > low, (x - low) / (high - low), 0.0)

    ordered = deltas.abs().sort(1).values
    first = int(size * config.winsor)
    last = max(int(size * (1 - config.winsor)) - 1, first)
    clipped = deltas.abs().clamp(ordered[:, first, None], ordered[:, last, None])
    u = deltas.sign() * normalized(clipped)
    similar = torch.tanh(u[:, None] * u[None]).sum(1)
    inter = torch.tanh(deltas * deltas.sum(0)) if config.variant == "raw" else similar
    score = torch.exp(n * normalized(clipped) ** 2) * inter
    threshold = score.sort(1).values[:, min(int(size * (1 - config.density)), size - 1), None]
    share = normalized(score.maximum(threshold))
    return config.scale * (deltas.sign() * clipped * share).sum(0) / share.sum(0).clamp(min=1e-12)


@pytest.mark.parametrize(("variant", "winsor", "density", "scale"), AUTHORS)
def test_the_authors_numbers(variant, winsor, density, scale):
    base, models = part("pcb.base."), [part(f"pcb.model{i}.") for i in range(3)]
    config = PCBConfig(density=float(density), scale=float(scale), variant=variant, winsor=winsor)
    merged = merge_state_dicts(base, models, config)
    delta = torch.cat([(merged[name] - base[name]).flatten() for name in sorted(base)])
    expected = REFERENCE[f"pcb.expected_delta.{variant}.ratio{density}.lambda{scale}"]
    torch.testing.assert_close(delta, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PCBConfig(variant="raw", winsor=1e-4), [0.293666, -0.318132, 0.325]),
        (PCBConfig(variant="raw", winsor=1e-2), [0.293666, -0.318132, 0.325]),
        (PCBConfig(scale=1.2), [0.350471, -0.389538, 0.39]),
    ],
)
def test_three_tasks_of_ten_numbers(config, expected, scope):
    delta = merged_delta(TASKS, replace(config, density=0.3, scope=scope))
    assert delta.nonzero().flatten().tolist() == [0, 5, 9]
    torch.testing.assert_close(delta[delta != 0], torch.tensor(expected), rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 4),
    st.integers(1, 60),
    st.integers(0, 10**6),
    st.sampled_from([0.05, 0.3, 1.0]),
    st.sampled_from([0.0, 0.1, 0.49]),
    st.sampled_from(["raw", "scale_invariant"]),
)
def test_the_formula(n, size, seed, density, winsor, variant):
    generator = torch.Generator().manual_seed(seed)
    deltas = torch.randn(n, size, generator=generator, dtype=torch.float64)
    deltas[torch.rand(n, size, generator=generator) < 0.1] = 0
    config = PCBConfig(density=density, winsor=winsor, variant=variant, scale=0.7)
    torch.testing.assert_close(merged_delta(deltas, config), reference(deltas, config), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("config", [PCBConfig(), PCBConfig(variant="raw"), PCBConfig(drop=0.5, density=0.9)])
def test_where_an_element_lies_in_a_block_changes_no_bit(config, dtype):
    base, *models = torch.randn(4, 500, generator=torch.Generator().manual_seed(5), dtype=dtype).unbind()
    stack = stack_of(base, *models)
    assert all(torch.equal(merged(config, stack, size), merged(config, stack)) for size in (1, 7, 33, 250))


def test_elements_compete_within_the_model_or_within_each_tensor():
    deltas = torch.randn(3, 600, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 600)
    models = [{"a": delta[:200], "b": delta[200:]} for delta in deltas]
    base = {"a": torch.zeros(200), "b": torch.zeros(400)}
    config = PCBConfig(density=0.2)
    whole = merge_state_dicts(base, models, config)
    torch.testing.assert_close(torch.cat([whole["a"], whole["b"]]), reference(deltas, config))
    apart = merge_state_dicts(base, models, replace(config, scope="tensor"))
    torch.testing.assert_close(apart["a"], reference(deltas[:, :200], config))
    torch.testing.assert_close(apart["b"], reference(deltas[:, 200:], config))
    assert (apart["a"] != 0).sum() > 2 * (whole["a"] != 0).sum()


def test_weights_scale_the_models_but_not_the_competition():
    deltas = torch.randn(2, 500, generator=torch.Generator().manual_seed(1))
    one, other = (merged_delta(deltas, PCBConfig(), weights=w) for w in ([1, 0], [0, 1]))
    both = merged_delta(deltas, PCBConfig(scale=0.5), weights=[3, -1])
    torch.testing.assert_close(both, 0.5 * (3 * one - other))


@pytest.mark.parametrize("n", [2, 200])
def test_many_models_do_not_overflow(n):
    deltas = torch.randn(n, 50, generator=torch.Generator().manual_seed(2)).abs()
    config = PCBConfig(density=0.5)
    expected = reference(deltas.double(), config) if n == 2 else None
    found = merged_delta(deltas, config)
    assert torch.isfinite(found).all()
    assert expected is None or torch.allclose(found.double(), expected, atol=1e-6)
    assert (found != 0).sum() >= 24


def test_a_constant_task_vector_wins_nothing():
    assert merged_delta([[0.5] * 9, [0.5] * 9], PCBConfig()).eq(0).all()


def test_scaling_one_model_does_not_change_who_wins():
    deltas = torch.randn(3, 400, generator=torch.Generator().manual_seed(3))
    scaled = deltas * torch.tensor([1.0, 8.0, 0.25])[:, None]
    kept = [merged_delta(d, PCBConfig()) != 0 for d in (deltas, scaled)]
    assert torch.equal(*kept)
    kept = [merged_delta(d, PCBConfig(variant="raw")) != 0 for d in (deltas, scaled)]
    assert not torch.equal(*kept)


def test_the_share_that_survives():
    """With one model, all positive: all that is above the quantile, and nothing that is clipped to the lowest."""
    delta = merged_delta(
        torch.rand(1, 2000, generator=torch.Generator().manual_seed(4)) + 0.1, PCBConfig(density=0.25)
    )
    assert (delta != 0).sum() == 2000 - 1500 - 1
