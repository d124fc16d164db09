"""MoS: pools, routing, and being LoRA once assembled."""

import copy
from itertools import pairwise

import hypothesis
import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close

from adapters.tiny import blocks, model, move, on_meta, run, trainable
from hf_modular import MoSConfig
from hf_modular.adapters import MoS, Site

TARGETS = ["wide", "narrow"]


def adapted(base: nn.Module | None = None, **choices: object) -> PeftModel:
    torch.manual_seed(2)
    config = MoSConfig(**{"target_modules": TARGETS, "shards": 2, **choices})
    return get_peft_model(blocks() if base is None else base, config).eval()


def adapters(model: nn.Module, kind: str = "wide") -> list[MoS]:
    return [m for name, m in model.named_modules() if isinstance(m, MoS) and f".{kind}." in name]


def parts(adapter: MoS, config: MoSConfig, letter: str) -> tuple[list[int], list[int]]:
    """The public and the private indices."""
    index = getattr(adapter, f"index_{letter}").tolist()
    cut = len(index) - config.private_r * config.shards
    return index[:cut], index[cut:]


# -- how many -------------------------------------------------------------------------------------------------------


@hypothesis.settings(deadline=None, max_examples=30)
@given(
    layers=st.integers(1, 5),
    budget=st.integers(1, 4),
    data=st.data(),
    shards=st.sampled_from([1, 2, 4]),
)
def test_as_many_parameters_as_lora_at_the_budget_rank(layers: int, budget: int, data: st.DataObject, shards: int):
    private = data.draw(st.integers(0, budget))
    highest = private + (budget - private) * layers
    r = None if highest == 0 else data.draw(st.sampled_from([None, *range(max(private, 1), highest + 1)]))
    r = budget if private == budget and r is not None else r
    base = blocks(layers, 12, 20)
    ours = trainable(adapted(base, r=r, budget_r=budget, private_r=private, shards=shards))
    assert ours == trainable(get_peft_model(blocks(layers, 12, 20), LoraConfig(r=budget, target_modules=TARGETS)))


@pytest.mark.parametrize(("budget", "published"), [(2, 4_997_120), (8, 19_988_480)])
def test_the_published_count_on_llama2_7b(budget: int, published: int):
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    with on_meta():
        base = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=32000, **sizes))
    assert trainable(get_peft_model(base, MoSConfig(budget_r=budget, target_modules="all-linear"))) == published


@pytest.mark.parametrize(("layers", "rank"), [(1, 2), (4, 5), (9, 8)])
def test_the_default_rank_is_the_largest_up_to_8_that_the_pool_allows(layers: int, rank: int):
    assert {a.rank for a in adapters(adapted(blocks(layers, 12, 20)))} == {rank}


def test_a_rank_of_its_own_for_a_layer():
    model = adapted(r=3, rank_pattern={"blocks.1.wide": 4})
    assert [a.rank for a in adapters(model)] == [3, 4, 3]
    assert [a.scaling for a in adapters(model)] == [16 / 3, 16 / 4, 16 / 3]


# -- which -----------------------------------------------------------------------------------------------------------


@hypothesis.settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), shards=st.sampled_from([1, 2, 4]), private=st.integers(0, 2))
def test_the_indices_follow_the_rules(seed: int, shards: int, private: int):
    config = {"seed": seed, "shards": shards, "private_r": private, "budget_r": 4, "r": 7}
    model = adapted(blocks(4, 12, 20), **config)
    held, config = adapters(model), MoSConfig(**config)
    publics = (4 - private) * 4 * shards
    for adapter in held:
        for letter in "AB":
            public, own = parts(adapter, config, letter)
            assert len(public) == (7 - private) * shards == len(set(public)), "a shard twice in one matrix"
            assert all(0 <= i < publics for i in public)
            assert len(own) == private * shards
        assert parts(adapter, config, "A")[1] == parts(adapter, config, "B")[1]
    owned = [set(parts(adapter, config, "A")[1]) for adapter in held]
    assert set().union(*owned) == set(range(publics, 4 * 4 * shards)), "private shards, each of one layer"
    assert sum(map(len, owned)) == private * shards * 4


def test_a_and_b_are_routed_apart():
    config = MoSConfig(r=5, budget_r=3, shards=2)
    for adapter in adapters(adapted(r=5, budget_r=3)):
        assert parts(adapter, config, "A")[0] != parts(adapter, config, "B")[0]


def test_the_indices_depend_on_seed_and_name_alone():
    def indices(model: nn.Module) -> list[list[int]]:
        return [getattr(a, f"index_{x}").tolist() for kind in TARGETS for a in adapters(model, kind) for x in "AB"]

    first = indices(adapted())
    torch.manual_seed(123)
    reordered = blocks()
    reordered.blocks = nn.ModuleList(nn.ModuleDict(dict(reversed(list(b.items())))) for b in reordered.blocks)
    assert indices(adapted(reordered)) == first
    assert indices(adapted(seed=1)) != first
    publics = [parts(adapter, MoSConfig(shards=2), "A")[0] for adapter in adapters(adapted())]
    assert all(one != other for one, other in pairwise(publics)), "layers of one type use different shards"


def test_the_matrices_are_shards_side_by_side():
    model = move(adapted(r=5, budget_r=3))
    for kind, sides in (("wide", (20, 12)), ("narrow", (12, 20))):
        for adapter in adapters(model, kind):
            up, core, down = adapter.factors()
            rows = []
            for j in range(5):
                shards = [adapter.shared.A[int(i)] for i in adapter.index_A[2 * j : 2 * j + 2]]
                rows.append(torch.cat(shards))
            assert core is None
            assert torch.equal(down, torch.stack(rows))
            columns = [
                torch.cat([adapter.shared.B[int(i)] for i in adapter.index_B[2 * j : 2 * j + 2]]) for j in range(5)
            ]
            assert torch.equal(up, torch.stack(columns, dim=1))
            assert adapter.delta().shape == sides
            assert_close(adapter.delta(), 16 / 5 * torch.stack(columns, 1) @ torch.stack(rows))


def test_without_shards_and_private_parts_every_layer_can_use_the_whole_pool():
    for adapter in adapters(adapted(r=6, budget_r=2, private_r=0, shards=1)):
        assert sorted(adapter.index_A.tolist()) == sorted(adapter.index_B.tolist()) == list(range(6))


def test_all_private_is_lora_in_training_too():
    """At p = e = r the assembled matrices are a partition of the pool, and training is LoRA's."""
    torch.manual_seed(0)
    ours = adapted(r=3, budget_r=3, private_r=3, alpha=6)
    theirs = get_peft_model(blocks(), LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS)).eval()
    for name, layer in theirs.base_model.model.named_modules():
        if hasattr(layer, "lora_A"):
            up, _, down = ours.base_model.model.get_submodule(name).adapters["default"].factors()
            layer.lora_A["default"].weight.data.copy_(down)
            layer.lora_B["default"].weight.data.copy_(up)
    for kind in TARGETS:
        used = [i for adapter in adapters(ours, kind) for i in adapter.index_A.tolist()]
        assert sorted(used) == list(range(len(adapters(ours, kind)[0].shared.A)))
    x = torch.randn(5, 12)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.01) for m in (ours, theirs)]
    for _ in range(4):
        for trained, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            trained(x).square().sum().backward()
            optimizer.step()
    assert not torch.equal(ours(x), blocks()(x))
    assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_shard_is_the_sum_over_its_uses():
    model = move(adapted(blocks().double(), r=5, budget_r=3, target_modules=["wide"]).double())
    held = adapters(model)
    pool = held[0].shared
    x = torch.randn(5, 12, dtype=torch.float64)
    model(x).square().sum().backward()
    for adapter in held:
        adapter.shared = copy.deepcopy(pool)
        adapter.shared.zero_grad()
    model(x).square().sum().backward()
    for name in "AB":
        alone = [getattr(adapter.shared, name).grad for adapter in held]
        assert_close(getattr(pool, name).grad, sum(alone))


# -- refusals --------------------------------------------------------------------------------------------------------

LAW = r"\(r - private_r\) <= \(budget_r - private_r\) \* layers must hold, but r=5, private_r=1, budget_r=2, and 3 lay"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"r": 5}, LAW + r".*'blocks.0.wide'.*r <= 4"),
        ({"rank_pattern": {"narrow": 5}}, LAW + ".*'blocks.0.narrow'"),
        ({"shards": 5}, "shards=5 does not divide the input side of 'blocks.0.wide', 12"),
        ({"shards": 3}, "shards=3 does not divide the output side of 'blocks.0.wide', 20"),
        ({"r": 0}, "`r` must be a positive integer, but got r=0"),
        ({"shards": 0}, "`shards` must be a positive integer"),
        ({"private_r": 3}, r"`private_r` must be in \[0, 2\]"),
        ({"private_r": 2, "r": 1}, "`r` must not be below `private_r`, but got r=1"),
        ({"private_r": 2, "r": 4}, "every shard is private, and `r` must be the same, but got r=4"),
        ({"dropout": 1.0}, r"`dropout` must be in \[0.0, 1.0\), but got dropout=1.0"),
    ],
)
def test_settings_that_break_a_law_are_refused_with_the_values(wrong: dict[str, object], message: str):
    base = blocks()
    with pytest.raises(ValueError, match=message):
        adapted(base, **wrong)
    assert [type(m) for m in base.modules()] == [type(m) for m in blocks().modules()]


def test_a_norm_is_refused():
    with pytest.raises(TypeError, match="MoS needs a weight with two sides, but layer 'norm' is a norm"):
        MoS.share(MoSConfig(shards=1), [Site("norm", (8,), has_bias=True, kind="Norm")])


# -- what is saved ---------------------------------------------------------------------------------------------------


def test_the_saved_indices_count_not_the_seed(tmp_path):
    ours = move(get_peft_model(model("llama"), MoSConfig(shards=2, target_modules="all-linear"))).eval()
    ours.save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"seed": 0', '"seed": 7'))
    loaded = PeftModel.from_pretrained(model("llama"), tmp_path).eval()
    assert loaded.peft_config["default"].seed == 7
    assert torch.equal(run(loaded), run(ours))


def test_dropout_acts_in_training_only():
    model = move(adapted(dropout=0.5))
    x = torch.ones(4, 12)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
