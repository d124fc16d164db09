"""NearSwap, Arcee Fusion and passthrough: the methods of one model."""

import pytest
import torch
from chunks import merged, stack_of
from torch.testing import assert_close

from hf_modular.merging import ArceeFusionConfig, NearSwapConfig, PassthroughConfig, merge_state_dicts


def test_nearswap_goes_to_the_model_where_it_is_near_and_a_step_where_not():
    stack = stack_of([0.0, 1.0, 2.0, -3.0], [0.05, 1.0, 5.0, -9.0])
    assert_close(merged(NearSwapConfig(t=0.1), stack), torch.tensor([0.05, 1.0, 2.1, -3.1]))
    assert torch.equal(merged(NearSwapConfig(t=0.0), stack), stack.base)
    assert_close(merged(NearSwapConfig(t=100.0), stack), stack.models[0])


def test_nearswaps_step_does_not_hide_an_infinity():
    with pytest.raises(ValueError, match="model 0 has them"):
        merge_state_dicts({"w": torch.zeros(2)}, [{"w": torch.tensor([0.0, float("inf")])}], NearSwapConfig())


@pytest.mark.parametrize("scale", [1.0, -0.5, 0.0])
def test_passthrough(scale):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(merged(PassthroughConfig(scale=scale), stack_of(x, x, has_base=False)), scale * x)


def test_passthrough_changes_no_bit_of_16():
    x = torch.randn(500, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(merge_state_dicts(None, [{"w": x}], PassthroughConfig())["w"], x)


def fusion(base, model):
    """The formula, row by row."""
    rows = [x.double().reshape(-1, x.shape[-1] if x.dim() else 1) for x in (base, model)]
    importance = []
    for q, p in zip(*rows, strict=True):
        divergence = sum(
            (b + 1e-8) * float(torch.log((b + 1e-8) / (a + 1e-8)))
            for a, b in zip(q.softmax(0), p.softmax(0), strict=True)
        )
        importance += [float(d) * float(divergence) for d in (p - q).abs()]
    order = sorted(importance)
    q1, q2, q3 = (order[int(quarter / 4 * (len(order) - 1))] for quarter in (1, 2, 3))
    chosen = torch.tensor([x >= q2 + 1.5 * (q3 - q1) for x in importance]).view(base.shape)
    return torch.where(chosen, model, base), int(chosen.sum())


@pytest.mark.parametrize("scale", [0.1, 1e-3])
@pytest.mark.parametrize("shape", [(8, 9), (40,), (3, 4, 5)])
def test_arcee_fusion(shape, scale):
    g = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=g)
    model = base + scale * torch.randn(shape, generator=g) ** 3
    expected, count = fusion(base, model)
    assert 0 < count < base.numel() / 2
    assert_close(merged(ArceeFusionConfig(), stack_of(base, model)), expected)


@pytest.mark.parametrize(
    "x", [torch.tensor(2.0), torch.tensor([2.0]), torch.zeros(0, 3), torch.zeros(3, 0), torch.ones(2, 3)]
)
def test_arcee_fusion_of_next_to_nothing(x):
    assert torch.equal(merged(ArceeFusionConfig(), stack_of(x, x)), x)


@pytest.mark.parametrize("config", [NearSwapConfig(), ArceeFusionConfig(), PassthroughConfig()])
def test_one_model_is_one(config):
    base, one, two = ({"w": torch.full((2,), x)} for x in (0.0, 1.0, 2.0))
    with pytest.raises(ValueError, match="1 to 1 models"):
        merge_state_dicts(base, [one, two], config)
