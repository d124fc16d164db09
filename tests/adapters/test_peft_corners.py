"""Where adapters meet parts of PEFT and torch that look inside layers; each was found by PEFT's own tests."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, convert_to_lora, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import BertConfig, BertModel

from hf_modular.adapters import AdapterConfig, CompacterConfig, FLoRAConfig, HUTConfig, SSFConfig


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 8)
        self.convolution = nn.Conv1d(8, 4, 1)
        self.last = nn.Linear(4, 3)

    def forward(self, words: Tensor) -> Tensor:
        x = self.first(self.words(words))
        return self.last(self.convolution(x.transpose(1, 2)).transpose(1, 2))


def small() -> Small:
    torch.manual_seed(0)
    return Small().eval()


def bert() -> BertModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 20}
    return BertModel(BertConfig(**sizes, num_hidden_layers=3)).eval()


WORDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.fixture
def one_process():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*NO_SHARD.*:UserWarning")  # there is one process
@pytest.mark.filterwarnings("ignore:.*FSDP.*:FutureWarning")
@pytest.mark.parametrize(
    "config",
    [
        HUTConfig(target_modules=["convolution", "words"], init_weights=False),
        CompacterConfig(target_modules=["first", "convolution"], phm_dim=2, reduction_factor=1, init_weights=False),
    ],
    ids=["rewritten weights", "a shared rule"],
)
@torch.no_grad()
def test_fsdp_1_computes_and_saves_what_the_model_does(one_process: None, config: AdapterConfig) -> None:
    model = get_peft_model(small(), config).eval()
    expected, saved = model(WORDS), {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    torch.testing.assert_close(sharded(WORDS), expected)
    again = get_peft_model_state_dict(sharded)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[key], saved[key]) for key in saved)


def adapted_layers(model: nn.Module) -> set[str]:
    return {name.partition("hfm_")[0].split("encoder.")[1] for name, p in model.named_parameters() if p.requires_grad}


def test_layers_to_transform_holds_for_default_targets(tmp_path: Path) -> None:
    config = CompacterConfig(reduction_factor=4, layers_to_transform=[0, 2])
    model = get_peft_model(bert(), config)
    expected = {f"layer.{i}.{place}output.dense." for i in (0, 2) for place in ("", "attention.")}
    assert adapted_layers(model) == expected
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(bert(), str(tmp_path), is_trainable=True)
    assert adapted_layers(loaded) == expected


@torch.no_grad()
def test_unloading_beside_trained_tokens() -> None:
    expected = small()(WORDS)
    config = SSFConfig(target_modules=["first"], trainable_token_indices={"words": [1, 2]}, init_weights=False)
    model = get_peft_model(small(), config).eval()
    assert not torch.allclose(model(WORDS), expected)
    unloaded = model.unload()
    assert type(unloaded.first) is nn.Linear
    assert type(unloaded.words) is nn.Embedding
    torch.testing.assert_close(unloaded(WORDS), expected)


@torch.no_grad()
def test_merging_beside_trained_tokens() -> None:
    config = SSFConfig(target_modules=["first"], trainable_token_indices={"words": [1, 2]}, init_weights=False)
    model = get_peft_model(small(), config).eval()
    model.base_model.model.words.token_adapter.trainable_tokens_delta["default"].fill_(0.5)
    expected = model(WORDS)
    torch.testing.assert_close(model.merge_and_unload()(WORDS), expected)


@torch.no_grad()
def test_disabled_adapters_stay_disabled_in_a_mixed_batch() -> None:
    model = get_peft_model(small(), SSFConfig(target_modules=["first"], init_weights=False)).eval()
    with model.disable_adapter():
        torch.testing.assert_close(model(WORDS, adapter_names=["default", "__base__"]), small()(WORDS))


def test_only_one_adapter_may_train_biases() -> None:
    model = get_peft_model(small(), HUTConfig(target_modules=["first"], bias="all"))
    assert model.base_model.model.last.bias.requires_grad
    with pytest.raises(ValueError, match="only 1 adapter with bias"):
        model.add_adapter("other", HUTConfig(target_modules=["first"], bias="hfm_hut_only"))
    with pytest.raises(ValueError, match="`bias` must be one of"):
        HUTConfig(bias="lora_only")


@pytest.mark.parametrize(("layer", "sides"), [("first", (6, 8)), ("convolution", (8, 4)), ("words", (11, 6))], ids=str)
def test_every_adapted_layer_says_its_sides(layer: str, sides: tuple[int, int]) -> None:
    adapted = get_peft_model(small(), HUTConfig(target_modules=[layer])).get_submodule(f"base_model.model.{layer}")
    assert (adapted.in_features, adapted.out_features) == sides


@torch.no_grad()
def test_peft_converts_what_adds_to_a_matrix() -> None:
    model = get_peft_model(small(), FLoRAConfig(target_modules=["first", "last"], r=2, init_weights=False)).eval()
    config, state_dict = convert_to_lora(model, rank=2)
    converted = get_peft_model(small(), config).eval()
    set_peft_model_state_dict(converted, state_dict)
    torch.testing.assert_close(converted(WORDS), model(WORDS))


@pytest.mark.parametrize(
    "config",
    [
        CompacterConfig(target_modules=["first"], phm_dim=2, reduction_factor=1),
        FLoRAConfig(target_modules=["convolution"]),
        HUTConfig(target_modules=["first"]),
        SSFConfig(target_modules=["first"]),
    ],
    ids=["not linear", "not a matrix", "the bias too", "scale and shift"],
)
def test_peft_refuses_to_convert_what_lora_has_no_place_for(config: AdapterConfig) -> None:
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(get_peft_model(small(), config), rank=2)
