"""merge_state_dicts: the formulas, by hand, and what it refuses."""

import pytest
import torch
from torch.testing import assert_close

from hf_modular.merging import METHODS, DAREConfig, LinearConfig, TaskArithmeticConfig, merge_state_dicts


def state(seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(3, 5, generator=g).to(dtype),
        "a.bias": torch.randn(3, generator=g).to(dtype),
        "scale": torch.randn((), generator=g).to(dtype),
        "position_ids": torch.arange(4),
    }


BASE, ONE, TWO = state(0), state(1), state(2)


def test_linear_is_the_weighted_mean():
    merged = merge_state_dicts(None, [ONE, TWO], LinearConfig(), weights=[3, 1])
    torch.testing.assert_close(merged["a.weight"], (3 * ONE["a.weight"] + TWO["a.weight"]) / 4)
    merged = merge_state_dicts(None, [ONE, TWO], LinearConfig(normalize=False), weights=[3, 1])
    torch.testing.assert_close(merged["a.bias"], 3 * ONE["a.bias"] + TWO["a.bias"])


def test_task_arithmetic_adds_the_task_vectors():
    merged = merge_state_dicts(BASE, [ONE, TWO], TaskArithmeticConfig(scale=0.5), weights=[1, -0.2])
    for name in ("a.weight", "a.bias", "scale"):
        expected = BASE[name] + 0.5 * (ONE[name] - BASE[name]) - 0.1 * (TWO[name] - BASE[name])
        torch.testing.assert_close(merged[name], expected)
    merged = merge_state_dicts(BASE, [ONE, TWO], TaskArithmeticConfig(normalize=True))
    torch.testing.assert_close(merged["scale"], (ONE["scale"] + TWO["scale"]) / 2)


@pytest.mark.parametrize(("rescale", "factor"), [("inverse", 4.0), ("none", 1.0)])
def test_dare_drops_and_rescales(rescale, factor):
    base, model = {"w": torch.zeros(40_000)}, {"w": torch.ones(40_000)}
    merged = merge_state_dicts(base, [model], DAREConfig(drop=0.75, rescale=rescale, scale=2.0))["w"]
    assert set(merged.tolist()) == {0.0, 2.0 * factor}
    kept = (merged != 0).float().mean()
    assert abs(kept - 0.25) < 5 * (0.25 * 0.75 / 40_000) ** 0.5


def test_dare_norm_keeps_the_l1_norm_of_each_tensor():
    base, model = {"w": torch.zeros(999)}, {"w": torch.randn(999)}
    merged = merge_state_dicts(base, [model], DAREConfig(drop=0.5, rescale="norm"))["w"]
    torch.testing.assert_close(merged.abs().sum(), model["w"].abs().sum())
    assert (merged == 0).sum() > 400


def test_dare_with_drop_0_is_task_arithmetic():
    dare = merge_state_dicts(BASE, [ONE, TWO], DAREConfig(drop=0.0, scale=0.7))
    plain = merge_state_dicts(BASE, [ONE, TWO], TaskArithmeticConfig(scale=0.7))
    assert_close(dare, plain)  # which is in fp64


def test_arithmetic_is_fp32_and_rounded_once():
    base, one, two = (state(i, torch.bfloat16) for i in range(3))
    merged = merge_state_dicts(base, [one, two], TaskArithmeticConfig(scale=0.3))
    wide = [{k: v.float() if v.is_floating_point() else v for k, v in s.items()} for s in (base, one, two)]
    expected = merge_state_dicts(wide[0], wide[1:], TaskArithmeticConfig(scale=0.3))
    assert torch.equal(merged["a.weight"], expected["a.weight"].bfloat16())


def test_fp64_inputs_are_merged_in_fp64():
    models = [state(i, torch.float64) for i in range(2)]
    merged = merge_state_dicts(None, models, LinearConfig())
    torch.testing.assert_close(
        merged["a.weight"], (models[0]["a.weight"] + models[1]["a.weight"]) / 2, rtol=1e-15, atol=0
    )


def test_tied_tensors_stay_tied():
    def tied(seed):
        w = torch.randn(50, 4, generator=torch.Generator().manual_seed(seed))
        return {"embed.weight": w, "head.weight": w}

    merged = merge_state_dicts(tied(0), [tied(1), tied(2)], DAREConfig(drop=0.5))
    assert merged["head.weight"] is merged["embed.weight"]
    untied = merge_state_dicts(tied(0), [tied(1), {k: v.clone() for k, v in tied(2).items()}], DAREConfig(drop=0.5))
    assert not torch.equal(untied["head.weight"], untied["embed.weight"])


def test_integer_tensors_are_the_bases_and_a_difference_is_said():
    other = {**ONE, "position_ids": torch.arange(4) + 1}
    with pytest.warns(UserWarning, match="position_ids .*int64.* that of the base is kept"):
        merged = merge_state_dicts(BASE, [other], TaskArithmeticConfig())
    assert torch.equal(merged["position_ids"], BASE["position_ids"])


def test_all_problems_are_named_at_once():
    bad = {**ONE, "a.weight": torch.zeros(5, 3), "extra": torch.zeros(1)}
    bad.pop("a.bias")
    with pytest.raises(ValueError, match="cannot begin") as error:
        merge_state_dicts(BASE, [TWO, bad], TaskArithmeticConfig())
    for part in (
        "model 1 has no tensor a.bias",
        "extra",
        "a.weight must have the base's shape (3, 5), but has (5, 3)",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("base", "models", "config", "weights", "message"),
    [
        (None, [ONE], TaskArithmeticConfig(), None, "needs a base"),
        (BASE, [], TaskArithmeticConfig(), None, "merges from 1 to inf models .* but got 0"),
        (BASE, [ONE], TaskArithmeticConfig(), [1, 2], "one weight"),
        (BASE, [ONE, TWO], LinearConfig(), [1, -1], "sum to 0"),
        (
            {"w": torch.ones(2)},
            [{"w": torch.tensor([1, float("nan")])}],
            TaskArithmeticConfig(),
            None,
            "w .*model 0",
        ),
        (
            {"w": torch.ones(2)},
            [{"w": torch.full((2,), 3e38)}],
            TaskArithmeticConfig(scale=9),
            None,
            "overflow",
        ),
        ({"w": torch.ones(2).to(torch.float8_e4m3fn)},) * 2 + (TaskArithmeticConfig(), None, "dequantise"),
    ],
)
def test_refuses(base, models, config, weights, message):
    models = [models] if isinstance(models, dict) else models
    with pytest.raises(ValueError, match=message):
        merge_state_dicts(base, models, config, weights=weights)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method().needs])
def test_inputs_are_left_alone(method):
    before = [{k: v.clone() for k, v in s.items()} for s in (BASE, ONE, TWO)]
    merge_state_dicts(BASE, [ONE, TWO][: METHODS[method].model_counts[0]], METHODS[method]())
    assert all(torch.equal(s[k], b[k]) for s, b in zip((BASE, ONE, TWO), before, strict=True) for k in b)
