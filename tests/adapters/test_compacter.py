"""Compacter: PHM layers, the rule that they share, the published counts, places, norms."""

import copy
from collections import OrderedDict
from collections.abc import Iterator

import hypothesis
import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from adapters.tiny import blocks, model, move, on_meta, reference, run, trainable
from hf_modular import CompacterConfig
from hf_modular.adapters import Compacter
from hf_modular.adapters.compacter import PHM

TARGETS = ["wide", "narrow"]
SMALL = {"phm_dim": 2, "reduction_factor": 2}


def adapted(base: nn.Module | None = None, **choices: object) -> PeftModel:
    torch.manual_seed(2)
    config = CompacterConfig(**{"target_modules": TARGETS, **SMALL, **choices})
    return get_peft_model(blocks() if base is None else base, config).eval()


def adapters(model: nn.Module) -> dict[str, Compacter]:
    return {name.split(".hfm_")[0]: m for name, m in model.named_modules() if isinstance(m, Compacter)}


# -- the PHM layer ---------------------------------------------------------------------------------------------------


def kronecker(layer: PHM, A: Tensor) -> Tensor:  # (in, out)
    W = layer.S @ layer.T if layer.factorized else layer.W
    return sum(torch.kron(A[i], W[i]) for i in range(len(A)))


@pytest.mark.parametrize("case", ["16x48.n4.r1", "48x16.n4.r1", "48x32.n8.r3"])
@pytest.mark.parametrize("fast", [True, False])
def test_the_reference_implementation_gives_the_same(case: str, fast: bool):
    given = {k.removeprefix(f"phm.{case}."): v for k, v in reference().items() if k.startswith(f"phm.{case}.")}
    (in_features, out_features), n = map(int, case.split(".")[0].split("x")), len(given["rule"])
    layer = PHM(CompacterConfig(phm_dim=n, phm_rank=given["w_left"].shape[2], fast=fast), in_features, out_features)
    layer.S.data, layer.T.data, layer.bias.data = given["w_left"], given["w_right"], given["bias"]
    assert layer.fast is fast
    assert_close(layer(given["x"], given["rule"]), given["expected_y"])


@hypothesis.settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 5), rows=st.integers(1, 4), columns=st.integers(1, 4), rank=st.integers(1, 3))
def test_fast_or_not_it_is_the_kronecker_product(n: int, rows: int, columns: int, rank: int):
    for choices in ({"fast": True}, {"fast": False}, {"fast": False, "factorized": False, "shared_rule": False}):
        config = CompacterConfig(phm_dim=n, phm_rank=rank, init_weights=False, **choices)
        layer = PHM(config, n * rows, n * columns).double()
        nn.init.normal_(layer.bias)
        rule = torch.randn(n, n, n, dtype=torch.float64) if config.shared_rule else None
        x = torch.randn(2, 3, n * rows, dtype=torch.float64)
        assert_close(layer(x, rule), x @ kronecker(layer, layer.A if rule is None else rule) + layer.bias)


@pytest.mark.parametrize(
    ("sides", "choices", "fast"),
    [
        ((768, 24), {}, True),
        ((24, 768), {}, True),
        ((4096, 128), {}, True),
        ((48, 32), {"phm_dim": 8, "phm_rank": 3}, False),  # 7,296 multiplications a token against 1,536
        ((48, 32), {"phm_dim": 8, "phm_rank": 3, "fast": True}, True),
        ((768, 24), {"fast": False}, False),
        ((768, 24), {"factorized": False}, False),
    ],
)
def test_auto_chooses_by_the_number_of_multiplications(sides: tuple[int, int], choices: dict[str, object], fast: bool):
    assert PHM(CompacterConfig(**choices), *sides).fast is fast


def test_the_fast_way_makes_nothing_of_the_products_size():
    layer = PHM(CompacterConfig(init_weights=False), 768, 24)
    made: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor))
            return out

    with Watch():
        layer(torch.randn(1, 768), torch.randn(4, 4, 4)).sum().backward()
    assert max(made) < 768 * 24 // 4


# -- the bottleneck --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu", "silu", "swish", "tanh"])
def test_the_output_is_passed_through_a_bottleneck(activation: str):
    model, base, x = move(adapted(non_linearity=activation, init_weights=False)), blocks(), torch.randn(5, 12)
    adapter = adapters(model)["base_model.model.blocks.0.wide"]
    H = [kronecker(layer, adapter.shared.A) for layer in (adapter.down, adapter.up)]
    act = tf.activations.ACT2FN[activation]
    y = base.blocks[0]["wide"](x)
    expected = y + act(y @ H[0] + adapter.down.bias) @ H[1] + adapter.up.bias
    assert_close(model.base_model.model.blocks[0]["wide"](x), expected)


def test_the_published_start_is_close_to_the_identity_and_learns_everything_at_once():
    model, x = adapted(init_weights="paper"), torch.randn(5, 12)
    assert not torch.equal(model(x), blocks()(x))
    assert_close(model(x), blocks()(x), rtol=0, atol=1e-4)
    model(x).square().sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_the_published_start_has_the_published_spread():
    shared = PHM(CompacterConfig(phm_dim=10, shared_rule=True), 400, 200)
    own = PHM(CompacterConfig(phm_dim=10, shared_rule=False), 400, 200)
    rule = Compacter.share(CompacterConfig(phm_dim=10), [])
    assert shared.A is None
    assert_close(rule.A.std().item(), 1e-4, rtol=0.1, atol=0)
    assert_close(own.A.std().item(), 0.01, rtol=0.1, atol=0)
    assert not shared.bias.any()
    bound = (2 * 6 / (40 + 1)) ** 0.5  # Xavier with gain √2, for each (in/n, rank)
    assert bound * 0.98 < shared.S.abs().max().item() <= bound


def test_true_starts_at_the_identity_and_can_leave_it():
    for choices in ({}, {"factorized": False}, {"shared_rule": False}):
        model, x = adapted(init_weights=True, **choices), torch.randn(5, 12)
        assert torch.equal(model(x), blocks()(x))
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_it_cannot_be_merged():
    model = adapted()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            ValueError, match=r"blocks\.0\.wide: Compacter acts on the layer's output and has no weight"
        ):
            merge()


# -- the rule --------------------------------------------------------------------------------------------------------


def test_one_rule_for_all_layers_and_another_for_another_adapter():
    model = adapted()
    model.add_adapter("second", CompacterConfig(target_modules=TARGETS, **SMALL))
    rules: dict[str, set[int]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.endswith("shared.A"):
            rules.setdefault(name.split(".")[-3], set()).add(id(parameter))
    assert {name: len(ids) for name, ids in rules.items()} == {"default": 1, "second": 1}
    assert not rules["default"] & rules["second"]


def test_the_gradient_of_the_rule_is_the_sum_over_the_layers():
    model, x = move(adapted(blocks().double(), init_weights=False).double()), torch.randn(5, 12, dtype=torch.float64)
    model(x).square().sum().backward()
    held = list(adapters(model).values())
    together = held[0].shared.A.grad
    for adapter in held:
        adapter.shared = copy.deepcopy(adapter.shared)
        adapter.shared.zero_grad()
    model(x).square().sum().backward()
    assert_close(together, sum(adapter.shared.A.grad for adapter in held))


def test_without_sharing_each_phm_layer_has_its_own():
    model = adapted(shared_rule=False)
    rules = {id(layer.A) for adapter in adapters(model).values() for layer in (adapter.down, adapter.up)}
    assert len(rules) == 2 * len(adapters(model))


# -- published counts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choices", "published"),
    [
        ({}, 161_728),
        ({"after": "feed_forward"}, 104_704),
        ({"phm_dim": 12, "factorized": False, "shared_rule": False}, 398_976),
    ],
    ids=["Compacter", "Compacter++", "PHM-adapter"],
)
def test_the_published_count_on_t5_base(choices: dict[str, object], published: int):
    with on_meta():
        sizes = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "d_kv": 64}
        base = tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=32128, **sizes))
        model = get_peft_model(base, CompacterConfig(train_layer_norm=True, **choices))
    assert trainable(model) == published


@hypothesis.settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 4), rank=st.integers(1, 3), half=st.integers(1, 2), other=st.integers(1, 2), data=st.data())
def test_the_count_is_the_closed_form(n: int, rank: int, half: int, other: int, data: st.DataObject):
    factorized, shared = data.draw(st.booleans()), data.draw(st.booleans())
    narrow, wide = 2 * n * half, 2 * n * other
    choices = {"phm_dim": n, "phm_rank": rank, "factorized": factorized, "shared_rule": shared}
    expected = n**3 if shared else 0
    for width in (narrow, wide):
        m = width // 2
        one = (2 * rank * (width + m) if factorized else 2 * width * m // n) + width + m
        expected += 3 * (one + (0 if shared else 2 * n**3))
    assert trainable(adapted(blocks(3, narrow, wide), **choices)) == expected


def test_a_reduction_factor_of_its_own_for_a_layer():
    found = adapters(adapted(reduction_pattern={"1.wide": 5, "narrow": 3}))
    widths = {name.partition("blocks.")[2]: len(adapter.down.bias) for name, adapter in found.items()}
    assert {widths[f"{i}.narrow"] for i in range(3)} == {4}
    assert [widths[f"{i}.wide"] for i in range(3)] == [10, 4, 10]


# -- places ----------------------------------------------------------------------------------------------------------


def config(kind: str, **more: object) -> tf.PretrainedConfig:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    sizes |= {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, **more}
    return tf.AutoConfig.for_model(kind, **sizes)


BART = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4}
PLACES = {
    "t5": ({"d_model": 64, "num_layers": 2, "num_heads": 4, "d_kv": 16}, "SelfAttention.o", "DenseReluDense.wo", 4),
    "mt5": ({"d_model": 64, "num_layers": 2, "num_heads": 4, "d_kv": 16}, "SelfAttention.o", "DenseReluDense.wo", 4),
    "bart": (BART, "self_attn.out_proj", "fc2", 4),
    "mbart": (BART, "self_attn.out_proj", "fc2", 4),
    "whisper": (BART, "self_attn.out_proj", "fc2", 4),
    "opt": ({"ffn_dim": 128, "word_embed_proj_dim": 64}, "self_attn.out_proj", "fc2", 2),
    "bert": ({"is_decoder": True, "add_cross_attention": True}, "attention.output.dense", "output.dense", 2),
    "roberta": ({}, "attention.output.dense", "output.dense", 2),
    "xlm-roberta": ({}, "attention.output.dense", "output.dense", 2),
    "electra": ({}, "attention.output.dense", "output.dense", 2),
    "deberta": ({}, "attention.output.dense", "output.dense", 2),
    "deberta-v2": ({}, "attention.output.dense", "output.dense", 2),
    "distilbert": ({"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}, "attention.out_lin", "ffn.lin2", 2),
    "modernbert": ({}, "attn.Wo", "mlp.Wo", 2),
    "vit": ({}, "attention.o_proj", "mlp.fc2", 2),
    "dinov2": ({}, "attention.o_proj", "mlp.fc2", 2),
    "clip_vision_model": ({}, "self_attn.out_proj", "mlp.fc2", 2),
    "siglip_vision_model": ({}, "self_attn.out_proj", "mlp.fc2", 2),
    "gpt2": (GPT, "attn.c_proj", "mlp.c_proj", 2),
    "gptj": ({**GPT, "rotary_dim": 8}, "attn.out_proj", "mlp.fc_out", 2),
    "gpt_neo": (
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
        "attention.out_proj",
        "mlp.c_proj",
        2,
    ),
    "gpt_neox": ({}, "attention.dense", "mlp.dense_4h_to_h", 2),
    "bloom": ({"n_layer": 2, "n_head": 4}, "self_attention.dense", "mlp.dense_4h_to_h", 2),
    "falcon": ({}, "self_attention.dense", "mlp.dense_4h_to_h", 2),
    **{kind: ({}, "self_attn.o_proj", "mlp.down_proj", 2) for kind in ("llama", "olmo", "stablelm", "granite")},
    **{
        kind: ({"num_key_value_heads": 2}, "self_attn.o_proj", "mlp.down_proj", 2)
        for kind in ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "cohere", "smollm3")
    },
    "phi": ({}, "self_attn.dense", "mlp.fc2", 2),
    "starcoder2": ({"num_key_value_heads": 2}, "self_attn.o_proj", "mlp.c_proj", 2),
}


@pytest.mark.parametrize("kind", PLACES)
def test_the_default_places_are_the_ends_of_the_sub_layers(kind: str):
    settings, attention, feed_forward, count = PLACES[kind]
    for after, ends in (
        ("both", {attention, feed_forward}),
        ("attention", {attention}),
        ("feed_forward", {feed_forward}),
    ):
        with on_meta():
            base = tf.AutoModel.from_config(config(kind, **settings))
            model = get_peft_model(base, CompacterConfig(after=after, reduction_factor=4))
        names = [name.removeprefix("base_model.model.") for name in adapters(model)]
        assert len(names) == count * len(ends), names
        assert {max((end for end in ends if name.endswith(end)), key=len) for name in names} == ends
        assert not any("cross" in name or "EncDec" in name or "encoder_attn" in name for name in names)


def test_every_place_of_the_table_is_tested_or_a_twin():
    twins = {
        "umt5",
        "pegasus",
        "marian",
        "blenderbot",
        "m2m_100",
        "camembert",
        "ernie",
        "deit",
        "beit",
        "swin",
        "clip",
    }
    assert set(CompacterConfig.default_targets) == set(PLACES) | twins | {"clip_text_model", "olmo2"}


def test_another_architecture_needs_targets():
    with pytest.raises(ValueError, match="specify `target_modules`"):
        adapted(target_modules=None)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"phm_dim": 3},
            r"phm_dim=3 does not for layer 'blocks.0.wide': its width is 20.*reduction_factor=2, is 10",
        ),
        ({"phm_dim": 4}, "phm_dim=4 does not for layer 'blocks.0.wide': .* is 10"),
        ({"reduction_factor": 32}, "for layer 'blocks.0.wide'.*reduction_factor=32, is 0"),
        ({"reduction_pattern": {"narrow": 4}}, "for layer 'blocks.0.narrow': its width is 12.* is 3"),
        ({"phm_dim": 0}, "`phm_dim` must be a positive integer, but got phm_dim=0"),
        ({"phm_rank": -1}, "`phm_rank` must be a positive integer"),
        ({"non_linearity": "sine"}, "`non_linearity` must be one of .*gelu_new.* but got non_linearity='sine'"),
        ({"init_weights": "zero"}, "`init_weights` must be one of"),
        ({"after": "cross_attention"}, "`after` must be one of"),
        ({"fast": "yes"}, "`fast` must be one of"),
        ({"fast": True, "factorized": False}, "`fast=True` needs `factorized=True`"),
    ],
)
def test_settings_that_break_a_law_are_refused_with_the_values(wrong: dict[str, object], message: str):
    base = blocks()
    with pytest.raises(ValueError, match=message):
        adapted(base, **wrong)
    assert [type(m) for m in base.modules()] == [type(m) for m in blocks().modules()]


# -- norms -----------------------------------------------------------------------------------------------------------


def norms(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((n, p) for n, p in model.named_parameters() if "norm" in n.lower() and p.requires_grad)


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_norms_are_trained_saved_and_switched_with_their_adapter(kind: str, tmp_path):
    with_norms = CompacterConfig(train_layer_norm=True, init_weights=True, reduction_factor=4)
    ours = move(get_peft_model(model(kind), with_norms)).eval()
    base, expected = run(model(kind)), run(ours)
    expected_count = sum(n.weight.numel() for n in model(kind).modules() if "norm" in type(n).__name__.lower())
    assert sum(p.numel() for n, p in norms(ours) if n.endswith("weight")) == expected_count
    with ours.disable_adapter():
        assert_close(run(ours), base)

    ours.save_pretrained(tmp_path)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(model(kind), tmp_path, low_cpu_mem_usage=low).eval()
        assert_close(run(loaded), expected)

    ours.add_adapter("plain", CompacterConfig(init_weights=True, reduction_factor=4))
    ours.set_adapter("plain")
    assert_close(run(ours), base)
    ours.add_adapter("other", CompacterConfig(train_layer_norm=True, init_weights=True, reduction_factor=4))
    ours.set_adapter("other")
    assert_close(run(ours), base)
    ours.set_adapter("default")
    assert_close(run(ours), expected)
    ours.delete_adapter("other")
    assert_close(run(ours), expected)


def layered(*names: str) -> nn.Sequential:
    """Two blocks of a linear layer and a norm, under these names."""
    first, second = names
    return nn.Sequential(
        *(nn.Sequential(OrderedDict({first: nn.Linear(8, 8), second: nn.LayerNorm(8)})) for _ in "12")
    )


@pytest.mark.parametrize(
    ("names", "saved"),
    [
        (("linear", "norm"), ["norm"]),
        (("0", "1"), ["0.1", "1.1"]),  # `1` is a block too
        (("down", "n"), ["0.n", "1.n"]),  # and `n` the end of `down`
    ],
)
def test_norms_are_named_by_their_ends_if_nothing_else_ends_so(names: tuple[str, str], saved: list[str]):
    model = adapted(layered(*names), target_modules=[f"{i}.{names[0]}" for i in range(2)], train_layer_norm=True)
    assert model.peft_config["default"].modules_to_save == saved
    assert list(adapters(model)) == [f"base_model.model.{i}.{names[0]}" for i in range(2)]
    assert sum("modules_to_save" in name for name, _ in model.named_parameters()) == 4


def test_what_the_user_saves_beside_is_kept():
    config = CompacterConfig(train_layer_norm=True, modules_to_save=["lm_head"], reduction_factor=4)
    get_peft_model(model("llama"), config)
    assert config.modules_to_save == ["input_layernorm", "lm_head", "norm", "post_attention_layernorm"]
