"""A model of transformers whose weights take no memory, and how a checkpoint stores them.

Every weight is one zero that stands for all of its elements. transformers renames, splits and stacks some tensors of a
checkpoint when it loads them; the outline knows which stored tensors make a weight of the model, and goes both ways.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

Reader = Callable[[str], Tensor]  # a stored tensor by its name


@dataclass
class Origin:
    """The stored tensors that a weight of the model is made of."""

    stored: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)  # by which the converter takes each of them
    converter: WeightConverter | None = None


class Outline:
    """A model without memory.

    Args:
        model: The model. An adapter may be put into it later.
        stored: The names of the tensors in the checkpoint.
        label: What the checkpoint is called in messages.
    """

    def __init__(self, model: Any, stored: Iterable[str], label: str) -> None:
        self.model, self.label = model, label
        self.stored = list(stored)
        self.names = _first_names(model)  # of each weight, by its identity
        self.shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
        self.origins = self._origins()

    def _origins(self) -> dict[str, Origin]:
        """What each weight of the model is made of, as transformers finds it when it loads the checkpoint."""
        transforms = get_model_conversion_mapping(self.model)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        places, prefix = self.model.state_dict(), self.model.base_model_prefix
        found: dict[str, Origin] = {}
        for stored in sorted(self.stored, key=dot_natural_key):
            name, pattern = rename_source_key(stored, renamings, converters, prefix, places)
            if name not in places and stored in places:
                name, pattern = rename_source_key(stored, [], [], prefix, places)
            if name in places:
                origin = found.setdefault(name, Origin(converter=by_pattern[pattern] if pattern else None))
                origin.stored.append(stored)
                origin.patterns.append(pattern or stored)
        return found

    @cached_property
    def unknown(self) -> list[str]:
        """The stored tensors that are no part of the model."""
        known = {name for origin in self.origins.values() for name in origin.stored}
        return [name for name in self.stored if name not in known]

    @cached_property
    def tied(self) -> dict[str, str]:
        """For each weight that is not stored but shared: the one that is stored."""
        keys: Mapping[str, str] = self.model.all_tied_weights_keys
        pairs = [*keys.items(), *((other, name) for name, other in keys.items())]
        return {name: other for name, other in pairs if name not in self.origins and other in self.origins}

    def origin(self, name: str) -> Origin | None:
        """What a weight of the model is made of; None if the checkpoint has nothing for it."""
        return self.origins.get(self.tied.get(name, name))

    def read(self, name: str, reader: Reader) -> Tensor:
        """A weight of the model from what is stored."""
        origin = self.origin(name)
        if origin is None:
            raise ValueError(f"{self.label} has no tensor {name}, which the adapter changes")
        if origin.converter is None:
            return reader(origin.stored[0])
        converter = copy.deepcopy(origin.converter)
        for stored, pattern in zip(origin.stored, origin.patterns, strict=True):
            converter.add_tensor(name, stored, pattern, reader(stored))
        made = converter.convert(name, model=self.model, config=self.model.config)
        if name not in made:
            raise ValueError(f"{self.label}: {name} cannot be made of {origin.stored[:3]}")
        value = made[name]
        return value[0] if isinstance(value, list) else value

    def restore(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """The stored tensors that a weight of the model is made of, from the weight."""
        origin = self.origin(name)
        if origin is None or origin.converter is None:
            return {origin.stored[0] if origin else name: weight}
        made = revert_weight_conversion(self.model, {self.tied.get(name, name): weight})
        named = {self._stored_name(key): tensor for key, tensor in made.items()}
        if named.keys() != set(origin.stored):
            raise ValueError(
                f"{self.label} stores {name} as {origin.stored[:3]}, and transformers cannot take it apart like that "
                f"({[*named][:3]}): merge the adapter in memory"
            )
        return named

    def _stored_name(self, name: str) -> str:
        prefix = f"{self.model.base_model_prefix}."
        names = (name, name.removeprefix(prefix), f"{prefix}{name}")
        return next((found for found in names if found in self.stored), name)


def outline(folder: Path, kind: type, stored: Iterable[str], changes: Mapping[str, Any], label: str) -> Outline:
    """The outline of a model of a class of transformers, with some settings changed."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, **changes)
    with torch.device("meta"):
        model: Any = kind.from_config(config) if kind.__name__.startswith("AutoModel") else kind(config)  # type: ignore[attr-defined]
    model.eval().requires_grad_(False)
    _make_weightless(model)
    return Outline(model, stored, label)


def _make_weightless(model: nn.Module) -> None:
    """Put one zero in the place of every tensor, for whatever wants to look at its device, shape or numbers."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = (_zero(tensor), tensor)  # keeps the old one: its identity must stay its own
                held[key] = made[id(tensor)][0]


def _zero(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    zero = torch.zeros((), dtype=dtype, device="cpu").expand(tensor.shape)
    return nn.Parameter(zero, requires_grad=False) if isinstance(tensor, nn.Parameter) else zero


def _first_names(model: nn.Module) -> dict[int, str]:
    found: dict[int, str] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(weight), name)
    return found
