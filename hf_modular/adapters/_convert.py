"""From an adapter of ours to a LoRA adapter that gives the same model, for whatever serves LoRA."""

from collections import Counter
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_modular.adapters._layer import AdapterLayer
from hf_modular.adapters._method import Adapter

_PREFIX = "base_model.model."  # of every key in the file of a PEFT adapter

LoRA = tuple[Tensor, Tensor, float]  # A (r, in, *kernel), B (out, r), scaling


def to_lora(model: nn.Module, adapter_name: str = "default") -> tuple[LoraConfig, dict[str, Tensor]]:
    """Express an adapter as a LoRA adapter, without loss.

    Each layer keeps its rank and its scaling. What is trained beside the adapter (`modules_to_save`, tokens, biases)
    comes along. To write the folder that PEFT, or a server of LoRA adapters, loads:

        config, state_dict = to_lora(model)
        config.save_pretrained(folder)
        safetensors.torch.save_file(state_dict, folder / "adapter_model.safetensors")

    Args:
        model (`PeftModel` or a model with the adapter injected):
            The model that holds the adapter. It is not changed.
        adapter_name (`str`, defaults to `"default"`):
            The adapter to express.

    Returns:
        `tuple[LoraConfig, dict[str, Tensor]]`: the config and the tensors, named as in PEFT's files.

    Raises:
        ValueError: If there is no such adapter, or its change of a layer is not of the form that LoRA has.
    """
    layers = _adapted_layers(model, adapter_name)
    tensors: dict[str, Tensor] = {}
    loras: dict[str, LoRA] = {}
    replaced: list[str] = []
    for name, layer in layers.items():
        adapter = cast(Adapter, layer.adapters[adapter_name])
        if (own := adapter.replacement()) is not None:
            tensors.update(_stored(name, layer, *own))
            replaced.append(name)
        else:
            A, B, _ = loras[name] = _lora(layer, adapter)
            tensors.update(_named(name, layer, A, B))
    tensors.update(_trained_whole(model, adapter_name))
    config = _config(model, adapter_name, {name: layers[name] for name in loras}, loras)
    if replaced:
        config.modules_to_save = [*(config.modules_to_save or []), *replaced]
    return config, tensors


def _adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, AdapterLayer]:
    held = {name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)}
    layers = {name.removeprefix(_PREFIX): layer for name, layer in held.items() if adapter_name in layer.adapters}
    if not layers:
        names = sorted({name for layer in held.values() for name in layer.adapters})
        raise ValueError(f"The model has no adapter {adapter_name!r} of this package; it has {names}.")
    return layers


@torch.no_grad()
def _lora(layer: AdapterLayer, adapter: Adapter) -> LoRA:
    training, name = adapter.training, layer.site.name
    found = adapter.eval().lora()
    adapter.train(training)
    if found is None:
        raise ValueError(f"{type(adapter).__name__} on layer '{name}' is not a product of two matrices, as LoRA is.")
    if reason := _not_for_lora(layer):
        raise ValueError(f"Layer '{name}' {reason}, where PEFT's LoRA is another function.")
    A, B, scaling = found
    return A.detach().clone().contiguous(), B.detach().clone().contiguous(), scaling


def _not_for_lora(layer: AdapterLayer) -> str | None:
    base = cast(Any, layer.base_layer)
    if layer.site.kind == "Embedding" and hasattr(base, "embed_scale"):
        return None  # PEFT scales what it adds to it, as Gemma's embedding scales the weight
    if not layer.site.plain:
        return "has a forward of its own or is a deconvolution"
    if layer.site.kind != "Conv":
        return None
    usual = base.groups == 1 and base.padding_mode == "zeros" and set(base.dilation) == {1}
    return None if usual else f"has {base.groups=}, {base.dilation=}, {base.padding_mode=}".replace("base.", "")


def _named(name: str, layer: AdapterLayer, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    if layer.site.kind == "Embedding":
        return {f"{_PREFIX}{name}.lora_embedding_A": A, f"{_PREFIX}{name}.lora_embedding_B": B}
    B = B.reshape(*B.shape, *[1] * (A.ndim - 2))
    return {f"{_PREFIX}{name}.lora_A.weight": A, f"{_PREFIX}{name}.lora_B.weight": B}


def _stored(name: str, layer: AdapterLayer, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    """What replaces a layer's weight and bias, as the layer stores them."""
    tensors = {"weight": layer.layout.stored(weight)} | ({} if bias is None else {"bias": bias})
    return {f"{_PREFIX}{name}.{part}": t.detach().clone().contiguous() for part, t in tensors.items()}


def _trained_whole(model: Any, adapter_name: str) -> dict[str, Tensor]:
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    slots = {f".{layer.adapter_layer_names[0]}." for layer in model.modules() if isinstance(layer, AdapterLayer)}
    rest = {key: tensor for key, tensor in state.items() if not any(slot in key for slot in slots)}
    return {f"{_PREFIX}{key.removeprefix(_PREFIX)}": tensor for key, tensor in rest.items()}


def _config(model: Any, adapter_name: str, layers: dict[str, AdapterLayer], loras: dict[str, LoRA]) -> LoraConfig:
    ours = model.peft_config[adapter_name]
    ranks = {name: len(A) for name, (A, _, _) in loras.items()}
    alphas = {name: _whole(scaling * len(A)) for name, (A, _, scaling) in loras.items()}
    r, alpha = _most(ranks), _most(alphas)
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        rank_pattern=_others(ranks, r),
        alpha_pattern=_others(alphas, alpha),
        lora_dropout=getattr(ours, "dropout", 0.0),
        target_modules=_targets(model, set(layers)),
        fan_in_fan_out=all(isinstance(layer.base_layer, Conv1D) for layer in layers.values()),
        modules_to_save=ours.modules_to_save,
        trainable_token_indices=ours.trainable_token_indices,
        bias="lora_only" if ours.bias.endswith("_only") else ours.bias,
        task_type=ours.task_type,
        base_model_name_or_path=ours.base_model_name_or_path,
        inference_mode=ours.inference_mode,
    )


def _whole(alpha: float) -> float:
    """16 rather than 16.000000000000004: PEFT divides by the rank again."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha


def _most(values: dict[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _others(values: dict[str, Any], usual: Any) -> dict[str, Any]:
    """The layers with another value than the usual one, as PEFT's patterns; `^` keeps them from matching elsewhere."""
    return {f"^{name}": value for name, value in values.items() if value != usual}


def _targets(model: nn.Module, names: set[str]) -> list[str]:
    """The last parts of the names if they say enough, else the whole names."""
    ends = {name.rpartition(".")[2] for name in names}
    bare = {name.replace(".base_layer", "").removeprefix(_PREFIX) for name, _ in model.named_modules()}
    return sorted(ends if {name for name in bare if name.rpartition(".")[2] in ends} == names else names)
