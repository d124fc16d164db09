"""HUT against loops written from its formula, and the identities between its forms."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import HiraConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from adapters import tiny
from hf_modular import HUTConfig
from hf_modular.adapters import HUT, Site

FORMS = ["tile", "row_column", "low_rank"]
side = st.integers(1, 9)


def adapter(config: HUTConfig, *shape: int, bias: bool = True, seed: int = 0) -> HUT:
    """In fp64, with no parameter at its start."""
    made = HUT(config, Site("layer", shape, bias)).double()
    rng = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64), alpha=0.5)
    return made.eval()


def weights(*shape: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(*size, generator=rng, dtype=torch.float64) for size in (shape, shape[:1]))


@given(rows=side, columns=side, r=side, kernel=st.sampled_from([(), (2,), (3, 2)]))
@settings(max_examples=60, deadline=None)
def test_tiles_as_the_formula_says_however_uneven(rows: int, columns: int, r: int, kernel: tuple[int, ...]) -> None:
    """W'[o, i] = γ[o] · A[⌊o·a/out⌋, i] · W[o, i] · B[o, ⌊i·b/in⌋], and b' = γ b + β."""
    made = adapter(HUTConfig(r=r), rows, columns, *kernel)
    weight, bias = weights(rows, columns, *kernel)
    after, after_bias = made.transform(weight, bias)
    over_rows, over_columns = len(made.A), made.B.shape[1]
    assert (over_rows, over_columns) == (min(r, rows), min(r, columns))
    for o, i in product(range(rows), range(columns)):
        mask = made.scale[o] * made.A[o * over_rows // rows, i] * made.B[o, i * over_columns // columns]
        assert_close(after[o, i], mask * weight[o, i])
    assert_close(after_bias, made.scale * bias + made.shift)


@given(size=st.integers(1, 40), count=st.integers(1, 40))
def test_tiles_are_contiguous_and_differ_by_one_at_most(size: int, count: int) -> None:
    made = adapter(HUTConfig(r=count, scale_shift=False), size, 1)
    made.A.data = torch.arange(float(len(made.A))).unsqueeze(1)
    made.B.data = torch.ones(size, 1)
    tiles = made.transform(torch.ones(size, 1), None)[0].flatten().tolist()
    assert tiles == sorted(tiles)
    sizes = [tiles.count(tile) for tile in range(len(made.A))]
    assert sum(sizes) == size
    assert max(sizes) - min(sizes) <= 1


@given(rows=side, columns=side, r=side)
@settings(max_examples=30, deadline=None)
def test_row_and_column_products_are_diagonal_matrices(rows: int, columns: int, r: int) -> None:
    """R1 and R4: diag(Π B[:, k]) W diag(Π A[k, :]), whatever r is."""
    made = adapter(HUTConfig(r=r, form="row_column", scale_shift=False), rows, columns)
    weight, _ = weights(rows, columns)
    expected = torch.diag(made.B.prod(1)) @ weight @ torch.diag(made.A.prod(0))
    assert_close(made.transform(weight, None)[0], expected)


@given(rows=side, columns=side)
@settings(max_examples=30, deadline=None)
def test_one_tile_is_the_diagonal_form(rows: int, columns: int) -> None:
    tile = adapter(HUTConfig(r=1), rows, columns)
    diagonal = HUT(HUTConfig(r=1, form="row_column"), Site("layer", (rows, columns), True)).double()
    diagonal.load_state_dict(tile.state_dict())
    for one, other in zip(
        tile.transform(*weights(rows, columns)), diagonal.transform(*weights(rows, columns)), strict=True
    ):
        assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rank_is_pefts_hira(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 5)).to(dtype)
    x = torch.randn(7, 12).to(dtype)
    ours = get_peft_model(base, HUTConfig(r=3, form="low_rank", scale_shift=False, target_modules=["0", "2"]))
    tiny.move(ours)
    factors = [ours.base_model.model[i].adapters["default"] for i in (0, 2)]
    output = ours.eval()(x)
    theirs = get_peft_model(ours.unload(), HiraConfig(r=3, hira_dropout=0.0, target_modules=["0", "2"])).eval()
    for i, factor in zip((0, 2), factors, strict=True):
        theirs.base_model.model[i].hira_A["default"].data = factor.A.data
        theirs.base_model.model[i].hira_B["default"].data = factor.B.data
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert_close(output, theirs(x), rtol=tolerance, atol=tolerance)


@given(r=st.integers(1, 3), seed=st.integers(0, 5))
@settings(max_examples=15, deadline=None)
def test_the_ranks_of_the_masks(r: int, seed: int) -> None:
    """1 for products of rows and columns, r + 1 for 1 + BA, and up to r² for tiles: there the rank pays."""
    for form, bound in {"row_column": 1, "low_rank": r + 1, "tile": r * r}.items():
        made = adapter(HUTConfig(r=r, form=form, scale_shift=False), 16, 15, seed=seed)
        mask = made.transform(torch.ones(16, 15, dtype=torch.float64), None)[0]
        assert torch.linalg.matrix_rank(mask, rtol=1e-9) == bound


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("r", "shape"), [(3, (7, 5)), (1, (7, 5)), (2, (4, 6))])
@pytest.mark.parametrize(("bias", "scale_shift"), [(True, True), (False, True), (True, False)])
def test_gradients_of_the_matrix_products(
    form: str, r: int, shape: tuple[int, int], bias: bool, scale_shift: bool
) -> None:
    """The hand-written backward and its own, against finite differences; sides that r divides, and does not."""
    made = adapter(HUTConfig(r=r, form=form, scale_shift=scale_shift), *shape, bias=bias)
    weight, before = weights(*shape)
    x = torch.randn(2, 3, shape[1], dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*made.named_parameters(), strict=True)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        given = (x, weight, before if bias else None)
        return torch.func.functional_call(made, dict(zip(names, parameters, strict=True)), given)

    made.forward = made.linear  # type: ignore[method-assign]
    assert torch.autograd.gradcheck(run, (x, *parameters))
    for inputs in (x, x.detach()):  # whether or not something before the layer is trained
        assert torch.autograd.gradgradcheck(run, (inputs, *parameters))


def test_a_base_weight_that_is_trained_too_gets_its_gradient() -> None:
    torch.manual_seed(0)
    model = tiny.move(get_peft_model(nn.Sequential(nn.Linear(6, 4)), HUTConfig(target_modules=["0"])))
    layer = model.base_model.model[0].base_layer
    layer.weight.requires_grad_(True)
    model(torch.randn(3, 6)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.any()


@pytest.mark.parametrize("form", FORMS)
def test_dropout_leaves_changes_out_in_training_only(form: str) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(40, 30))
    model = get_peft_model(base, HUTConfig(r=4, form=form, dropout=0.5, target_modules=["0"], scale_shift=False))
    x = torch.randn(3, 40)
    assert torch.equal(model.train()(x), base(x)), "there is nothing to leave out at the start"
    tiny.move(model)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))
    model.train().merge_adapter()
    merged = model(x)
    model.unmerge_adapter()
    assert_close(merged, model.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_starts_at_random_only_where_asked(form: str) -> None:
    for init_weights in (True, False):
        made = HUT(HUTConfig(r=3, form=form, init_weights=init_weights), Site("layer", (8, 6), True))
        weight, bias = made.transform(torch.ones(8, 6), torch.zeros(8))
        assert bool((weight == 1).all() and (bias == 0).all()) is init_weights


def test_no_shift_where_there_is_no_bias() -> None:
    assert HUT(HUTConfig(), Site("layer", (8, 6), False)).shift is None
    made = HUT(HUTConfig(scale_shift=False), Site("layer", (8, 6), True))
    assert made.scale is made.shift is None


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_rounds_once(form: str) -> None:
    """The rewritten weight is made in fp32 and rounded at the end, in the matrix products as in the merge."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(48, 32)).bfloat16()
    model = tiny.move(get_peft_model(base, HUTConfig(r=3, form=form, target_modules=["0"]))).eval()
    x = torch.randn(5, 48).bfloat16()
    layer = model.base_model.model[0]
    made = layer.adapters["default"]
    weight, bias = made.transform(layer.weight.double(), layer.bias.double())
    exact = nn.functional.linear(x.double(), weight, bias)
    error = (model(x).double() - exact).norm() / exact.norm()
    plain = (nn.functional.linear(x, weight.bfloat16(), bias.bfloat16()).double() - exact).norm() / exact.norm()
    assert error < 2 * plain
