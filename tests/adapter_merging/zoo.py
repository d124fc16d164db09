"""A model with a layer of every kind that LoRA can be on, and the weights that adapters give it."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

CONVOLUTIONS = ["conv1", "conv2", "conv3", "point"]
MATRICES = ["embed", "fc", "free", "gpt", *CONVOLUTIONS]
NAMES = ("first", "second", "third")
TOKENS = torch.arange(15).reshape(3, 5)


class Zoo(nn.Module):
    """No two sides are equal, so that no transposition can go unseen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(15, 12)
        self.fc = nn.Linear(12, 24)
        self.free = nn.Linear(24, 18, bias=False)
        self.gpt = Conv1D(30, 18)
        self.conv1 = nn.Conv1d(30, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 6, (1, 2), padding=(0, 1))
        self.point = nn.Conv2d(6, 7, 1)
        self.conv3 = nn.Conv3d(7, 5, (1, 2, 2), padding=(0, 1, 1))
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.gpt(self.free(torch.tanh(self.fc(self.embed(tokens))))))
        x = self.conv1(x.transpose(1, 2)).unsqueeze(2)
        x = self.conv3(self.point(torch.tanh(self.conv2(x))).unsqueeze(2))
        return self.head(self.norm(x.flatten(2).mean(2)))


def zoo() -> Zoo:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Zoo().eval()


def adapted(*configs: PeftConfig, base: nn.Module | None = None) -> PeftModel:
    """The model with an adapter for each config, all far from where they start."""
    model = get_peft_model(base or zoo(), configs[0], NAMES[0])
    for name, config in zip(NAMES[1:], configs[1:], strict=False):
        model.add_adapter(name, config)
    rng = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(f".{adapter}" in name for adapter in NAMES):
            with torch.no_grad():
                parameter += torch.randn(parameter.shape, generator=rng) * 0.3
    return model.eval()


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": MATRICES, "init_lora_weights": True, **settings})


def merged_weights(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """The weights of the base model with one adapter merged into it, by PEFT."""
    model = copy.deepcopy(model)
    model.set_adapter(adapter)
    return {name: tensor.detach() for name, tensor in model.merge_and_unload().state_dict().items()}


def expected(model: PeftModel, base: nn.Module, coefficients: Mapping[str, float]) -> dict[str, Tensor]:
    """W₀ + Σ cᵢ (Wᵢ - W₀) of whole models."""
    start = base.state_dict()
    models = {name: merged_weights(model, name) for name in coefficients}
    return {
        name: value + sum(c * (models[adapter][name] - value) for adapter, c in coefficients.items())
        for name, value in start.items()
    }


def difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], base: nn.Module) -> float:
    """‖found - wanted‖ / ‖wanted - base‖ over all weights."""
    start = base.state_dict()
    assert found.keys() == wanted.keys()
    far = sum(float((found[name] - wanted[name]).double().square().sum()) for name in wanted)
    change = sum(float((wanted[name] - start[name]).double().square().sum()) for name in wanted)
    return (far / change) ** 0.5


def names(count: int) -> Sequence[str]:
    return NAMES[:count]
