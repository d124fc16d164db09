"""The experts of a mixture are parameters of three axes: adapted by `target_parameters`, or refused by name."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from adapters import tiny
from adapters.table import METHODS
from hf_modular import CompacterConfig, FLoRAConfig, HUTConfig, MoSConfig, SSFConfig, to_lora
from hf_modular.adapters import RMMAdapterConfig
from hf_modular.adapters._parameters import ParameterLayer, is_transposed
from hf_modular.testing import AdapterCase

EXPERTS = 3
PARAMETERS = ["gate_up_proj", "down_proj"]
_SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
_SIZES |= {"num_key_value_heads": 2, "num_experts_per_tok": 2}
_QWEN = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "num_experts": EXPERTS}
_MAKERS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**_SIZES, intermediate_size=24, num_local_experts=EXPERTS)
    ),
    # stored as (experts, in, out), and with biases
    "gpt_oss": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(**_SIZES, head_dim=8, intermediate_size=24, num_local_experts=EXPERTS)
    ),
    # has a linear down_proj too, for an expert that all tokens share
    "qwen2_moe": lambda: tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**_SIZES, **_QWEN)),
}

REWRITING = [case for case in METHODS if case.config_class not in (CompacterConfig, RMMAdapterConfig)]
rewriting = pytest.mark.parametrize("case", REWRITING, ids=str)


def mixture(kind: str = "mixtral") -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _MAKERS[kind]().eval()


def adapted(case: AdapterCase, kind: str = "mixtral", **choices: object) -> PeftModel:
    torch.manual_seed(3)
    choices = {"target_modules": ["q_proj"], "target_parameters": PARAMETERS, **choices}
    return tiny.move(get_peft_model(mixture(kind), case.config(**choices))).eval()


def experts(model: nn.Module) -> ParameterLayer:
    return next(module for module in model.modules() if isinstance(module, ParameterLayer))


@rewriting
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_each_expert_has_the_adapter_of_a_layer(case: AdapterCase, kind: str) -> None:
    """Rewritten all at once as each would be alone."""
    layer = experts(adapted(case, kind))
    held = layer.adapters["default"]
    turn = (lambda w: w.T) if kind == "gpt_oss" else (lambda w: w)
    for name in PARAMETERS:
        all_at_once, before = getattr(layer, name), layer.base_layer.get_parameter(name)
        assert all_at_once.shape == before.shape
        tensors = [*held.get_submodule(name).named_parameters(), *held.get_submodule(name).named_buffers()]
        for i in range(EXPERTS):
            of_one = {f"{name}.{key}": t[i] for key, t in tensors if "shared." not in key}
            alone = torch.func.functional_call(held, of_one, (name, turn(before[i])))
            assert_close(turn(all_at_once[i]), alone, rtol=1e-5, atol=1e-6)
            assert (alone - turn(before[i])).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("config", "of_an_expert"),
    [
        (HUTConfig(r=4), 4 * (32 + 48) + 48 + 4 * (24 + 32) + 32),
        (FLoRAConfig(r=4), 16 + 4 * (32 + 48) + 16 + 4 * (24 + 32)),
        (MoSConfig(budget_r=2), 2 * (32 + 48) + 2 * (24 + 32)),
        (SSFConfig(), 48 + 32),
    ],
    ids=lambda value: getattr(value, "type_name", ""),
)
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_as_many_parameters_as_for_layers(config: HUTConfig, of_an_expert: int, kind: str) -> None:
    """gate_up_proj leads from 32 to 48 and down_proj from 24 to 32, however they are stored."""
    config = copy.deepcopy(config)
    config.target_parameters = PARAMETERS
    assert tiny.trainable(get_peft_model(mixture(kind), config)) == 2 * EXPERTS * of_an_expert


@rewriting
def test_it_starts_where_the_method_does(case: AdapterCase) -> None:
    model = get_peft_model(mixture(), case.config(target_parameters=PARAMETERS))
    same = torch.equal(tiny.run(model), tiny.run(mixture()))
    assert same == case.identity
    with model.disable_adapter():
        assert torch.equal(tiny.run(model), tiny.run(mixture()))


@rewriting
def test_training_reaches_every_expert(case: AdapterCase) -> None:
    model = adapted(case).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for step in range(5):
        loss = model(input_ids=tiny.TOKENS, labels=tiny.TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            empty = [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.any()]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not empty


@rewriting
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_saving_loading_and_copying(case: AdapterCase, kind: str, tmp_path: Path) -> None:
    model = adapted(case, kind)
    output = tiny.run(model)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(mixture(kind), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(tiny.run(loaded.eval()), output)
    native = mixture(kind)
    report = native.load_adapter(tmp_path)
    assert (report.missing_keys, report.unexpected_keys) == (set(), set())
    for same in (native.eval(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(tiny.run(same), output)


@rewriting
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_merging(case: AdapterCase, kind: str) -> None:
    model, base = adapted(case, kind), mixture(kind)
    output, before = tiny.run(model), {n: p.clone() for n, p in experts(model).base_layer.named_parameters()}
    model.merge_adapter(safe_merge=True)
    assert_close(tiny.run(model), output, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in experts(model).base_layer.named_parameters())
    merged = model.merge_and_unload()
    assert_close(tiny.run(merged), output, rtol=1e-4, atol=1e-5)
    assert list(merged.state_dict()) == list(base.state_dict())
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]


@rewriting
def test_a_second_adapter_on_one_of_them(case: AdapterCase) -> None:
    model = adapted(case)
    one = tiny.run(model)
    model.add_adapter("two", case.config(target_parameters=["down_proj"]))
    model.set_adapter("two")
    two = tiny.run(tiny.move(model, seed=7).eval())
    assert not torch.equal(one, two)
    model.set_adapter("default")
    assert torch.equal(tiny.run(model), one)
    model.base_model.set_adapter(["default", "two"])
    both = tiny.run(model)
    assert_close(tiny.run(model.merge_and_unload(adapter_names=["default", "two"])), both, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@rewriting
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_half_precision_and_checkpointing(case: AdapterCase, kind: str) -> None:
    model = get_peft_model(mixture(kind).bfloat16(), case.config(target_parameters=PARAMETERS)).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(input_ids=tiny.TOKENS, labels=tiny.TOKENS).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients)


def test_whoever_takes_the_parameter_from_outside_gets_the_adapted_one() -> None:
    model = adapted(REWRITING[0])
    layer = experts(model)
    own = layer.base_layer.gate_up_proj
    assert not torch.equal(layer.gate_up_proj, own)
    with model.disable_adapter():
        assert torch.equal(layer.gate_up_proj, own)
    rewritten = layer.gate_up_proj
    model.merge_adapter()
    assert_close(layer.gate_up_proj, rewritten)
    assert layer.num_experts == EXPERTS


def test_dropout_differs_from_expert_to_expert() -> None:
    model = adapted(AdapterCase(HUTConfig, {"dropout": 0.5, "scale_shift": False}, len)).train()
    layer = experts(model)
    mask = layer.gate_up_proj / layer.base_layer.gate_up_proj
    assert not torch.equal(mask[0].isclose(torch.tensor(1.0)), mask[1].isclose(torch.tensor(1.0)))
    model.eval()
    assert torch.equal(layer.gate_up_proj, layer.gate_up_proj)


def test_they_compile_without_a_break() -> None:
    ours = adapted(REWRITING[0]).base_model.model
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert_close(tiny.run(compiled), tiny.run(ours))


def test_they_are_told_of_in_the_summary() -> None:
    model = adapted(REWRITING[0])
    status = model.get_model_status()
    assert (status.num_adapter_layers, status.enabled, status.merged_adapters) == (4, True, [])
    assert "gate_up_proj" in repr(experts(model))
    with pytest.raises(ValueError, match="not a product of two matrices"):
        to_lora(model)


def test_a_router_and_a_layers_own_weight() -> None:
    model = get_peft_model(mixture(), HUTConfig(target_parameters=["mlp.gate.weight", "k_proj.weight"]))
    block = model.base_model.model.model.layers[0]
    assert type(block.mlp.gate) is ParameterLayer
    assert type(block.self_attn.k_proj).__name__ == "AdapterLinear"
    assert torch.equal(tiny.run(model), tiny.run(mixture()))
    changed = tiny.run(tiny.move(model))
    assert not torch.equal(changed, tiny.run(mixture()))
    assert_close(tiny.run(model.merge_and_unload()), changed, rtol=1e-4, atol=1e-5)


def test_layers_to_transform_and_excluded_modules() -> None:
    config = HUTConfig(target_parameters=PARAMETERS, layers_to_transform=[1])
    model = get_peft_model(mixture(), config)
    assert model.targeted_parameter_names == [f"model.layers.1.mlp.experts.{name}" for name in PARAMETERS]
    config = HUTConfig(target_parameters=PARAMETERS, exclude_modules=r".*layers\.1\..*")
    model = get_peft_model(mixture(), config)
    assert model.targeted_parameter_names == [f"model.layers.0.mlp.experts.{name}" for name in PARAMETERS]


def test_how_experts_are_stored_is_seen() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_local_experts": EXPERTS}
    assert is_transposed(Llama4TextExperts(tf.Llama4TextConfig(**sizes)))  # says nothing of it
    assert is_transposed(mixture("gpt_oss").model.layers[0].mlp.experts)
    assert not is_transposed(mixture().model.layers[0].mlp.experts)


# -- what cannot be done is refused, and nothing passes by silently ---------------------------------------------------


@pytest.mark.parametrize("case", [case for case in METHODS if case not in REWRITING], ids=str)
def test_other_methods_refuse_them_by_name(case: AdapterCase) -> None:
    base = mixture()
    with pytest.raises(
        TypeError, match=r"cannot adapt the bare parameter 'model\.layers\.0\.mlp\.experts\.gate_up_proj'"
    ):
        get_peft_model(base, case.config(target_parameters=["gate_up_proj"]))
    assert not any("hfm_" in name for name in base.state_dict())


REFUSED = {
    "no such parameter": (
        HUTConfig(target_parameters=["gate_up_proj", "nothing"]),
        "mixtral",
        r"`target_parameters` names \['nothing'\]",
    ),
    "experts by the name of a module": (
        HUTConfig(target_modules=["q_proj", "down_proj"]),
        "mixtral",
        r"`target_modules` names \['down_proj'\].*experts\.gate_up_proj.*target_parameters=\['down_proj', 'gate_up_p",
    ),
    "experts by the name that they had": (
        HUTConfig(target_modules=["q_proj", "w1", "w2", "w3"]),
        "mixtral",
        r"`target_modules` names \['w1', 'w2', 'w3'\]",
    ),
    "one rank for all experts": (
        HUTConfig(target_parameters=["down_proj"], form="low_rank", rank_pattern={r".*experts\.1\..*": 2}),
        "mixtral",
        "All experts of a parameter need the same rank",
    ),
    "dropout of an input that is not seen": (
        FLoRAConfig(target_parameters=["down_proj"], dropout=0.1),
        "mixtral",
        r"`dropout` acts on the input.*experts\.0\.down_proj",
    ),
}


@pytest.mark.filterwarnings(
    "ignore:The following rank_pattern keys did not match:RuntimeWarning"
)  # PEFT's, of modules
@pytest.mark.parametrize(("config", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(config: HUTConfig, kind: str, message: str) -> None:
    base = mixture(kind)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, copy.deepcopy(config))
    assert list(base.state_dict()) == list(mixture(kind).state_dict())


def test_a_list_of_letters_is_refused() -> None:
    with pytest.raises(TypeError, match="`target_parameters` must be a list of names"):
        HUTConfig(target_parameters="gate_up_proj")


def test_mixed_batches_are_refused() -> None:
    model = adapted(REWRITING[0])
    with pytest.raises(ValueError, match=r"experts' .*tokens, not samples"):
        tiny.run(model, adapter_names=["default", "__base__"])


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q_proj|down_proj)", ["q_proj", "down_proj"]], ids=str)
def test_experts_that_are_passed_by_are_named(kind: str, targets: str | list[str], tmp_path: Path) -> None:
    if kind == "mixtral" and isinstance(targets, list):
        return  # refused, above
    with pytest.warns(
        RuntimeWarning, match=r"4 parameters \(model\.layers\.0\.mlp\.experts\.gate_up_proj, .* are not"
    ):
        model = get_peft_model(mixture(kind), HUTConfig(target_modules=targets))
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(mixture(kind), tmp_path)  # it says so once, and not whenever the adapter is loaded


def test_nothing_is_said_where_nothing_was_meant() -> None:
    for config in (
        HUTConfig(),
        HUTConfig(target_modules=["q_proj"]),
        HUTConfig(target_modules="all-linear", target_parameters=PARAMETERS),
        HUTConfig(target_modules="all-linear", exclude_modules=["experts"]),
    ):
        get_peft_model(mixture(), config)
