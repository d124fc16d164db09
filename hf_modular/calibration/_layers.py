"""The linear layers of a model, and what goes into them while it runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_modular._batches import LABELS, Rows, batches, evaluating

See = Callable[[str, nn.Module, Tensor], None]  # of a layer's name, the layer and its input (rows, features)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """By their paths; those of GPT-2 have a type of their own."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, (nn.Linear, Conv1D))}


def as_rows(layer: nn.Module, weight: Tensor) -> Tensor:  # (out, in)
    """A layer's weight, or what has its shape, with a row for each output."""
    return weight.T if isinstance(layer, Conv1D) else weight


@torch.no_grad()
def run_through(model: nn.Module, dataset: Rows, batch_size: int, see: See) -> None:
    """Run the model on all examples and show what goes into its linear layers."""
    if len(dataset) == 0:
        raise ValueError("a calibration needs at least one example, but the data set is empty")
    layers = linear_layers(model)
    if not layers:
        raise ValueError(f"a {type(model).__name__} must have linear layers, but has none")
    with evaluating(model), ExitStack() as stack:
        for path, layer in layers.items():
            hook = layer.register_forward_pre_hook(_shown(path, see))
            stack.callback(hook.remove)
        for batch in inputs(model, dataset, batch_size):
            model(**batch)


def inputs(model: nn.Module, dataset: Rows, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Batches without labels."""
    for batch in batches(dataset, batch_size, next(model.parameters()).device):
        yield {name: tensor for name, tensor in batch.items() if name not in LABELS}


def state_of(model: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return model.state_dict() if isinstance(model, nn.Module) else model


def _shown(path: str, see: See) -> Callable[[nn.Module, Any], None]:
    def hook(layer: nn.Module, given: Any) -> None:
        x = given[0].detach()
        see(path, layer, x.reshape(-1, x.shape[-1]).float())

    return hook
