"""An adapter as a LoRA adapter that plain PEFT loads."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

import hf_modular
from adapters.tiny import blocks, model, move, run
from hf_modular import CompacterConfig, FLoRAConfig, HUTConfig, MoSConfig, SSFConfig, to_lora
from hf_modular.adapters import AdapterConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
]


def exported(ours: nn.Module, base: nn.Module, folder, adapter_name: str = "default") -> PeftModel:
    config, state_dict = to_lora(ours, adapter_name)
    config.save_pretrained(folder)
    save_file(state_dict, folder / "adapter_model.safetensors")
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    return PeftModel.from_pretrained(base, folder).eval()


MODELS = {
    "llama": {"target_modules": "all-linear"},
    "t5": {"target_modules": ["q", "wi", "wo"]},
    "gpt2": {"target_modules": ["c_attn", "c_fc"]},
    "bert": {"target_modules": ["word_embeddings", "query", "value"]},
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "config",
    [
        MoSConfig(shards=2, alpha=10),
        MoSConfig(r=2, private_r=0, shards=2),
        FLoRAConfig(r=3),
        FLoRAConfig(ranks=[4, 2]),
    ],
    ids=["mos", "mos-public", "flora", "flora-ranks"],
)
def test_plain_peft_gives_the_same_outputs(config: AdapterConfig, kind: str, tmp_path):
    config = type(config)(**{**config.to_dict(), **MODELS[kind]})
    ours = move(get_peft_model(model(kind), config)).eval()
    lora = exported(ours, model(kind), tmp_path)
    assert isinstance(lora.peft_config["default"], LoraConfig)
    assert set(lora.peft_config["default"].target_modules) <= {*MODELS[kind]["target_modules"], *LLAMA}
    assert not torch.allclose(run(ours), run(model(kind)), atol=1e-3)
    assert_close(run(lora), run(ours), rtol=1e-5, atol=1e-5)
    assert_close(run(lora.merge_and_unload()), run(ours), rtol=1e-4, atol=1e-4)


LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


class Convs(nn.Module):
    def __init__(self, **choices: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, (3, 2), stride=2, padding=1, **choices)
        self.last = nn.Conv2d(8, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.conv(x)))


@pytest.mark.parametrize("config", [MoSConfig(shards=2), FLoRAConfig()], ids=["mos", "flora"])
def test_convolutions_too(config: AdapterConfig):
    torch.manual_seed(0)
    base, x = Convs(), torch.randn(2, 4, 9, 8)
    config.target_modules, config.init_weights = {"conv", "last"}, False
    ours = get_peft_model(base, config).eval()
    expected, (lora_config, state) = ours(x), to_lora(ours)
    lora = get_peft_model(ours.unload(), lora_config)
    lora.load_state_dict({name.replace(".weight", ".default.weight"): t for name, t in state.items()}, strict=False)
    assert sum("lora_" in name for name in lora.state_dict()) == len(state) == 4
    assert_close(lora.eval()(x), expected)


def test_layers_keep_their_ranks_and_scalings(tmp_path):
    """Types with more layers assemble a higher rank, so their scaling is another."""
    patterns = {"target_modules": "all-linear", "rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 2}}
    ours = move(get_peft_model(model("llama"), MoSConfig(**patterns))).eval()
    config, _ = to_lora(ours)
    queries = {f"^model.layers.{i}.self_attn.q_proj": 3 for i in range(3)}
    assert (config.r, config.lora_alpha) == (4, 16)
    assert config.rank_pattern == {**queries, "^model.layers.1.mlp.up_proj": 2}
    assert config.alpha_pattern == {}
    assert_close(run(exported(ours, model("llama"), tmp_path)), run(ours), rtol=1e-5, atol=1e-5)


def test_the_matrices_are_the_assembled_ones():
    ours = move(get_peft_model(blocks(), MoSConfig(target_modules=["wide"], shards=2)))
    _, state = to_lora(ours)
    for i in range(3):
        up, _, down = ours.base_model.model.blocks[i]["wide"].adapters["default"].factors()
        assert torch.equal(state[f"base_model.model.blocks.{i}.wide.lora_A.weight"], down)
        assert torch.equal(state[f"base_model.model.blocks.{i}.wide.lora_B.weight"], up)
        assert not state[f"base_model.model.blocks.{i}.wide.lora_A.weight"].requires_grad


def test_what_is_trained_beside_comes_along(tmp_path):
    config = MoSConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM", dropout=0.1)
    ours = move(get_peft_model(model("llama"), config)).eval()
    lora = exported(ours, model("llama"), tmp_path)
    settings = lora.peft_config["default"]
    assert (settings.modules_to_save, settings.task_type, settings.lora_dropout) == (["lm_head"], "CAUSAL_LM", 0.1)
    assert_close(run(lora), run(ours), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", ["all", "hfm_flora_only"])
def test_trained_biases_and_tokens_come_along(bias: str, tmp_path):
    config = FLoRAConfig(r=2, target_modules=["query"], bias=bias, trainable_token_indices={"word_embeddings": [1, 3]})
    ours = move(get_peft_model(model("bert"), config)).eval()
    lora = exported(ours, model("bert"), tmp_path)
    assert lora.peft_config["default"].bias == bias.replace("hfm_flora", "lora")
    assert_close(run(lora), run(ours), rtol=1e-5, atol=1e-5)


def test_an_adapter_on_a_bare_transformers_model_and_one_of_several(tmp_path):
    ours = model("llama")
    ours.add_adapter(FLoRAConfig(r=2, target_modules=["q_proj"]), "one")
    ours.add_adapter(FLoRAConfig(r=4, target_modules=["v_proj"]), "two")
    ours.set_adapter("two")
    move(ours).train()
    lora = exported(ours, model("llama"), tmp_path, "two")
    assert set(lora.peft_config["default"].target_modules) == {"v_proj"}
    assert all(module.training for module in ours.modules())
    assert_close(run(lora), run(ours), rtol=1e-5, atol=1e-5)


def test_names_are_given_in_full_where_their_ends_say_too_much():
    ours = get_peft_model(blocks(), FLoRAConfig(r=2, target_modules=["0.wide", "2.wide"]))
    assert to_lora(ours)[0].target_modules == {"blocks.0.wide", "blocks.2.wide"}


@pytest.mark.parametrize("config", [HUTConfig, SSFConfig])
def test_what_is_no_product_of_two_matrices_is_refused(config: type[AdapterConfig]):
    ours = get_peft_model(blocks(), config(target_modules=["wide"]))
    with pytest.raises(ValueError, match=r"on layer 'blocks\.0\.wide' is not a product of two matrices"):
        to_lora(ours)


def test_a_bottleneck_is_refused():
    ours = get_peft_model(blocks(), CompacterConfig(target_modules=["wide"], reduction_factor=5))
    with pytest.raises(ValueError, match="Compacter on layer"):
        to_lora(ours)


@pytest.mark.parametrize(
    ("choices", "reason"),
    [({"groups": 2}, "groups=2"), ({"dilation": 2}, r"dilation=\(2, 2\)"), ({"padding_mode": "circular"}, "circular")],
)
def test_convolutions_that_pefts_lora_computes_otherwise_are_refused(choices: dict[str, object], reason: str):
    ours = get_peft_model(Convs(**choices), FLoRAConfig(target_modules=["conv"]))
    with pytest.raises(ValueError, match=rf"Layer 'conv' has .*{reason}.*PEFT's LoRA is another function"):
        to_lora(ours)


def test_a_name_that_no_adapter_has_is_refused():
    ours = get_peft_model(blocks(), FLoRAConfig(target_modules=["wide"]))
    with pytest.raises(ValueError, match=r"no adapter 'other' .* it has \['default'\]"):
        hf_modular.to_lora(ours, "other")
