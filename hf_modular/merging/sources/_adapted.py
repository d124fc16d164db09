"""A model and an adapter of any PEFT type as one source of tensors, without the model in memory.

The adapter is set up on an outline of the model, whose weights take no memory. What it makes of a layer is found when
the layer's turn comes: a copy of the layer gets its stored weights, in fp32, and is merged with the adapter in the way
of its type; the weights are then taken out of it.
"""

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hf_modular.merging.sources._adapter_folder import AdapterFolder
from hf_modular.merging.sources._outline import Outline, Reader

_NAME = "default"
_WRAPPERS = re.compile(r"\b(base_layer|token_adapter)\.")  # what PEFT puts between the names of a layer and a weight
_MISFITS = (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RuntimeError)  # that PEFT raises


@dataclass(frozen=True, eq=False)
class Adapted:
    """A model with an adapter, layer by layer.

    Args:
        adapter: The adapter.
        outline: The model, into which the adapter is put.
        reader: Gives a tensor of the model's checkpoint.
    """

    adapter: AdapterFolder
    outline: Outline
    reader: Reader
    notes: list[str] = field(default_factory=list)

    @cached_property
    def whole(self) -> dict[str, str]:
        """What the adapter's file holds of the model's own weights: the name in the model -> the name in the file."""
        return {name: stored for stored, name in self.adapter.names.items() if name in self.outline.shapes}

    @cached_property
    def layers(self) -> dict[str, list[tuple[str, str, str]]]:
        """The layers that hold the adapter, outermost only, each with the model's weights in it.

        Of each weight: its path in the layer, its name in the model, and that of the weight which it is or is tied to.
        """
        names = self._named_in_file() if self.adapter.starts_from_weights else self._set_up_in_outline()
        return {name: [*self._weights(name)] for name in names}

    @torch.no_grad()
    def merged(self, name: str) -> dict[str, Tensor]:
        """The weights of a layer with the adapter merged into them, by their names in the model."""
        return self._merged(name, self._read)

    @torch.no_grad()
    def refusals(self) -> Iterator[str]:
        """What would go wrong with any kind of layer, found on the smallest one of it."""
        smallest: dict[object, tuple[int, str]] = {}
        for name in self.layers:
            layer: Any = self.outline.model.get_submodule(name)
            size = sum(weight.numel() for weight in layer.parameters())
            base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
            kind = (type(layer), type(base), getattr(base, "bias", None) is None)
            smallest[kind] = min(smallest.get(kind, (size, name)), (size, name))
        for _, name in smallest.values():
            try:
                self._merged(name, self._stand_in)
            except _MISFITS as error:
                yield f"{self.adapter.reference} ({self.adapter.kind}) cannot be merged into layer '{name}': {error}"

    def _named_in_file(self) -> list[str]:
        prefix = prefix_of(self.adapter.config)
        names = dict.fromkeys(
            name.partition(f".{prefix}")[0] for name in self.adapter.names.values() if prefix in name
        )
        modules = dict(self.outline.model.named_modules())
        if unknown := [name for name in names if name not in modules]:
            raise self._misfit(f"it has no layer {unknown[:3]}")
        return [*names]

    def _set_up_in_outline(self) -> list[str]:
        model, config = self.outline.model, self._config()
        try:
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                _set_up(model, config, self._own)
        except _MISFITS as error:
            raise self._misfit(error) from error
        self.notes.extend(str(warning.message) for warning in heard if warning.category is RuntimeWarning)
        found: list[str] = []
        for name, module in model.named_modules():
            if _holds(module) and not any(name.startswith(f"{outer}.") for outer in found[-1:]):
                found.append(name)
        return found

    def _misfit(self, why: object) -> ValueError:
        reason = " ".join(str(why).split())
        return ValueError(
            f"{self.adapter.reference} ({self.adapter.kind}) does not fit {self.outline.label}: {reason}"
        )

    def _config(self) -> Any:
        """The adapter's config without what is done here."""
        config = copy.deepcopy(self.adapter.config)
        config.inference_mode, config.modules_to_save, config.task_type = True, None, None
        return config

    def _weights(self, layer: str) -> Iterator[tuple[str, str, str]]:
        known = self.outline.names
        for path, weight in self.outline.model.get_submodule(layer).named_parameters(remove_duplicate=False):
            if id(weight) in known:
                yield path, _WRAPPERS.sub("", f"{layer}.{path}"), known[id(weight)]

    def _read(self, weight: str) -> Tensor:
        if weight in self.whole:
            return _wide(self.adapter.weights.read(self.whole[weight]))
        return _wide(self.outline.read(weight, self.reader))

    def _stand_in(self, weight: str) -> Tensor:
        rng = torch.Generator().manual_seed(0)
        return torch.randn(self.outline.shapes[weight], generator=rng)

    def _merged(self, name: str, read: Reader) -> dict[str, Tensor]:
        layer, weights = self.outline.model.get_submodule(name), self.layers[name]
        real = {origin: nn.Parameter(read(origin), requires_grad=False) for _, _, origin in weights}
        merged = self._rebuilt(name, layer, real) if self.adapter.starts_from_weights else self._copy(layer, real)
        merged = merged.double() if any(w.dtype == torch.float64 for w in real.values()) else merged.float()
        biased = _biased(merged)
        for part in [*merged.modules()]:
            if _holds(part):
                part.merge(adapter_names=[_NAME])  # type: ignore[operator]
        if new := _biased(merged) - biased:
            raise ValueError(f"it would give a bias to {sorted(new)}, which transformers would drop when it loads it")
        found = {_WRAPPERS.sub("", path): w.detach() for path, w in merged.named_parameters(remove_duplicate=False)}
        return {own: found[_WRAPPERS.sub("", path)] for path, own, _ in weights}

    def _copy(self, layer: nn.Module, real: Mapping[str, nn.Parameter]) -> nn.Module:
        """The layer with real weights; what is the outline's is not copied."""
        known = self.outline.names
        memo: dict[int, Any] = {id(w): real[known[id(w)]] for w in layer.parameters() if id(w) in known}
        return copy.deepcopy(layer, memo)

    def _rebuilt(self, name: str, layer: nn.Module, real: Mapping[str, nn.Parameter]) -> nn.Module:
        """The layer set up anew, alone in a model, because its adapter starts from the weights."""
        model = parent = nn.Module()
        *path, last = name.split(".")
        for part in path:
            parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, self._copy(layer, real))
        config = self._config()
        config.target_modules, config.exclude_modules, config.layers_to_transform = [name], None, None
        own = {
            stored: tensor
            for stored, tensor in self._own.items()
            if f"{self.adapter.names[stored]}.".startswith(f"{name}.")
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of patterns for other layers
            _set_up(model, config, own)
        return model.get_submodule(name)

    @cached_property
    def _own(self) -> dict[str, Tensor]:
        """The adapter's own tensors, by their names in its file."""
        whole = {*self.whole.values()}
        weights = self.adapter.weights
        return {stored: weights.read(stored) for stored in weights.tensors if stored not in whole}


def prefix_of(config: Any) -> str:
    """What the names of a type's parameters begin with."""
    return PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]


def _set_up(model: nn.Module, config: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put an adapter with its tensors into a model."""
    with torch.random.fork_rng(devices=[]):  # what is drawn here is written over
        peft = PeftModel(model, config, _NAME)
    loaded = set_peft_model_state_dict(peft, dict(tensors), _NAME)
    prefix = prefix_of(config)
    lacking = {name for name in loaded.missing_keys if prefix in name and _NAME in name}
    named = dict(peft.named_parameters(remove_duplicate=False))
    there = {id(weight) for name, weight in named.items() if name not in lacking}  # others may be the same weight
    lacking = {name for name in lacking if name not in named or id(named[name]) not in there}
    if loaded.unexpected_keys or lacking:
        raise ValueError(f"its file lacks {sorted(lacking)[:3]}, and has unknown {loaded.unexpected_keys[:3]}")
    peft.eval()


def _holds(module: nn.Module) -> bool:
    if not isinstance(module, BaseTunerLayer):
        return False
    return any(_NAME in getattr(module, slot, ()) for slot in module.adapter_layer_names)


def _biased(layer: nn.Module) -> set[str]:
    """The paths of the biases of the model in a layer."""
    return {path for path, _ in layer.named_parameters() if path.endswith("base_layer.bias")}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
