"""Putting the weights of another adapter into the place of those in use."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import (
    PeftConfig,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import Tensor, nn

from hf_modular.adapters._layer import AdapterLayer
from hf_modular.adapters._method import AdapterConfig

# Settings that say how an adapter is made, found or trained, and not what its tensors do to a layer.
_ELSEWHERE = {field.name for field in fields(AdapterConfig)} | {"init_weights", "init_std", "seed", "dropout", "fast"}


def hotswap_adapter(model: nn.Module, adapter: str | Path, adapter_name: str = "default", **kwargs: Any) -> None:
    """Put the weights of a saved adapter into the place of those that a model has, without adding a layer or a tensor.

    The tensors stay where they are in memory, so that a compiled model needs no new compilation. PEFT's function of
    the same name does this for LoRA only.

    Args:
        model (`PeftModel`, a model with the adapter injected, or either of them compiled):
            The model that holds the adapter. Nothing of it is changed unless everything fits.
        adapter (`str | Path`):
            The folder or the Hub id of the adapter that comes in. It must be of the same type and settings, and on
            the same layers.
        adapter_name (`str`, defaults to `"default"`):
            The adapter that goes out; its name stays.
        kwargs (`dict`, *optional*):
            For PEFT's loading of a config and of weights: `revision`, `subfolder`, `token`, ...

    Raises:
        ValueError: If the two adapters are not alike, or the one that goes out is merged.
        TypeError: If it is not of a type of this package.
    """
    model = getattr(model, "_orig_mod", model)
    old, new = _config(model, adapter_name), PeftConfig.from_pretrained(str(adapter), **kwargs)
    _require_alike(old, new)
    _require_unmerged(model, adapter_name)
    state = load_peft_weights(str(adapter), device="cpu", **kwargs)
    _require_same_shapes(get_peft_model_state_dict(model, adapter_name=adapter_name), state)
    set_peft_model_state_dict(model, state, adapter_name)


def _config(model: Any, adapter_name: str) -> AdapterConfig:
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"The model has no adapter {adapter_name!r} to be swapped out; it has {[*configs]}.")
    if not isinstance(configs[adapter_name], AdapterConfig):
        raise TypeError(
            f"Adapter {adapter_name!r} is a {configs[adapter_name].peft_type.value} of PEFT, whose own "
            "`hotswap_adapter` is for LoRA."
        )
    return configs[adapter_name]


def _require_alike(old: AdapterConfig, new: PeftConfig) -> None:
    if old.peft_type != new.peft_type:
        raise ValueError(f"A {new.peft_type.value} adapter cannot take the place of a {old.peft_type.value}.")
    before, after = old.to_dict(), new.to_dict()
    different = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    if changed := {name: pair for name, pair in different.items() if name not in _ELSEWHERE}:
        lines = "; ".join(f"{name} is {was!r} and would be {would!r}" for name, (was, would) in changed.items())
        raise ValueError(f"The adapter cannot be swapped, for the settings of the two differ: {lines}.")


def _require_unmerged(model: nn.Module, adapter_name: str) -> None:
    layers = (module for module in model.modules() if isinstance(module, AdapterLayer))
    if merged := [layer.site.name for layer in layers if adapter_name in layer.merged_adapters]:
        raise ValueError(f"Adapter {adapter_name!r} is merged into '{merged[0]}': call `unmerge_adapter` first.")


def _require_same_shapes(old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    old, new = ({key.removeprefix("base_model.model."): t for key, t in state.items()} for state in (old, new))
    different = sorted(key for key in old.keys() | new.keys() if _shape(old, key) != _shape(new, key))
    if different:
        key = different[0]
        raise ValueError(
            f"The adapter cannot be swapped, for {len(different)} of its tensors differ in shape or are in one of the "
            f"two only: '{key}' is {_shape(old, key)} and would be {_shape(new, key)}."
        )


def _shape(state: dict[str, Tensor], key: str) -> tuple[int, ...] | None:
    return tuple(state[key].shape) if key in state else None
