"""Adapters that lie in folders or repositories of the Hub, read without the model that they were trained on.

A LoRA's file says all that it does. For other types the layers are set up without memory, from the config of the base
model; where the adapter rewrites weights, each layer's weight is read when its turn comes, from the base's checkpoint.
"""

import copy
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftType
from torch import Tensor, nn

from hf_modular.adapter_merging._live import LiveAdapter, layer_tensors, prefix_of, set_up
from hf_modular.adapter_merging._matrix import LowRank
from hf_modular.adapter_merging._source import PREFIX, Base, Change, Source, refuse_variants, widest
from hf_modular.adapters._layout import layout_of
from hf_modular.adapters._method import Site, pattern_value
from hf_modular.checkpoints import Checkpoint
from hf_modular.merging.sources._adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterFolder, model_class
from hf_modular.merging.sources._outline import Outline
from hf_modular.merging.sources._sources import locate, open_source

_LORA = re.compile(r"^(?P<layer>.+?)\.(?P<part>lora_(?:embedding_)?[AB](?:\.(?:weight|bias))?)$")


def locate_adapter(reference: str) -> Path:
    """The folder of an adapter, or of a repository given as `name` or `name@revision`, downloaded unless cached."""
    return locate(reference, (ADAPTER_CONFIG, ADAPTER_WEIGHTS))[0]


def open_adapters(references: list[str], base_model: str | None) -> tuple[list[Source], Base]:
    """Adapters from their folders or repositories, and the base model if it was stated or is needed."""
    files = [_File.open(reference) for reference in references]
    if base_model is None and all(file.is_bare for file in files):
        return [LoRAFile(*file) for file in files], NoBase()
    base = BaseFolder.of(next((file for file in files if not file.is_bare), files[0]), base_model)
    return [LoRAFile(*file) if file.is_bare else FolderAdapter(*file, base) for file in files], base


class _File(NamedTuple):
    """An adapter's config, and the tensors of its file by their names in the base model."""

    reference: str
    config: Any
    weights: Checkpoint

    @classmethod
    def open(cls, reference: str) -> "_File":
        found = AdapterFolder(reference, locate_adapter(reference))
        return cls(reference, found.config, found.weights)

    @property
    def is_bare(self) -> bool:
        """Whether the file alone says what the adapter does."""
        return self.config.peft_type == PeftType.LORA and not self.config.use_dora


@dataclass(frozen=True, eq=False)
class _FileAdapter:
    """What adapters in files have in common."""

    reference: str
    config: Any
    weights: Checkpoint

    @cached_property
    def own(self) -> list[str]:
        """The names of its parameters in the file, those among them that its layers share and the tuner has."""
        part = f".{prefix_of(self.config)}"
        return [name for name in self.weights.tensors if part in name or _is_tuners(name)]

    @cached_property
    def whole(self) -> dict[str, Tensor]:
        beside = [name for name in self.weights.tensors if name not in set(self.own)]
        return {self._in_base(name): self.weights.read(name) for name in beside}

    def _in_base(self, name: str) -> str:
        """PEFT saves trained biases of adapted layers by the names that they have inside of these."""
        name = name.removeprefix(PREFIX)
        trained = getattr(self.config, "bias", "none") != "none"
        return name.replace(".base_layer.bias", ".bias") if trained else name

    @property
    def dtype(self) -> torch.dtype:
        return widest(self.weights.tensors[name].dtype for name in self.own)

    def tensors(self) -> dict[str, Tensor]:
        full = {name: name if _is_tuners(name) else f"{PREFIX}{name.removeprefix(PREFIX)}" for name in self.own}
        return {name: self.weights.read(stored) for stored, name in full.items()}


@dataclass(frozen=True, eq=False)
class LoRAFile(_FileAdapter):
    """A LoRA adapter, from its config and its file alone."""

    @cached_property
    def parts(self) -> dict[str, dict[str, str]]:
        """The names in the file of each layer's tensors, by what they are."""
        refuse_variants(self.reference, self.config)
        found: dict[str, dict[str, str]] = {}
        for name in self.own:
            match = _LORA.match(name)
            if match is None:
                raise ValueError(f"{self.reference} holds {name}, which is no part of a LoRA that can be merged.")
            part = match["part"].removesuffix(".weight").replace("embedding_", "")
            found.setdefault(match["layer"].removeprefix(PREFIX), {})[part] = name
        if not found:
            raise ValueError(f"{self.reference} is a LoRA adapter, but its file holds no lora_A and lora_B.")
        return found

    @cached_property
    def sites(self) -> dict[str, Site]:
        return {layer: self._site(layer, parts) for layer, parts in self.parts.items()}

    def change(self, name: str) -> Change:
        parts = {part: _wide(self.weights.read(stored)) for part, stored in self.parts[name].items()}
        scaling = self._scaling(name, len(parts["lora_A"]))
        bias = parts["lora_B.bias"] * scaling if "lora_B.bias" in parts else None
        return Change(LowRank(parts["lora_B"].flatten(1) * scaling, parts["lora_A"].flatten(1)), bias)

    @property
    def transposed(self) -> bool:
        return bool(self.config.fan_in_fan_out)

    def _scaling(self, name: str, rank: int) -> float:
        alpha = pattern_value(self.config.alpha_pattern or {}, name, self.config.lora_alpha)
        return alpha / (math.sqrt(rank) if self.config.use_rslora else rank)

    def _site(self, layer: str, parts: Mapping[str, str]) -> Site:
        if not {"lora_A", "lora_B"} <= parts.keys():
            raise ValueError(f"{self.reference} must hold lora_A and lora_B of layer '{layer}', but has {[*parts]}.")
        A, B = (self.weights.tensors[parts[side]].shape for side in ("lora_A", "lora_B"))
        rank = pattern_value(self.config.rank_pattern or {}, layer, self.config.r)
        if len(A) != len(B) or not A[0] == B[1] == rank:
            raise ValueError(
                f"The matrices of a layer must be (r, in) and (out, r) with the config's r, but for layer '{layer}' "
                f"{self.reference} has {A} and {B} with r={rank}. LoRA on grouped convolutions has no merged form."
            )
        embedding = "lora_embedding_A" in parts["lora_A"]
        kind = "Embedding" if embedding else "Linear" if len(A) == 2 else "Conv"
        return Site(layer, (B[0], *A[1:]), has_bias=False, kind=kind)


@dataclass(frozen=True, eq=False)
class FolderAdapter(_FileAdapter):
    """An adapter of any other type, set up on a base model without memory."""

    base: "BaseFolder"

    @cached_property
    def live(self) -> LiveAdapter:
        config = copy.deepcopy(self.config)
        config.inference_mode, config.modules_to_save = True, None
        model = set_up(self.reference, copy.deepcopy(self.base.model), config, self.tensors())
        return LiveAdapter(model, "default", self.reference, self.base.present)

    @property
    def sites(self) -> Mapping[str, Site]:
        return self.live.sites

    @property
    def transposed(self) -> bool:
        return self.live.transposed

    def change(self, name: str) -> Change:
        return self.live.change(name)


class NoBase:
    """A base model that nobody has stated."""

    def layer(self, name: str) -> tuple[Tensor, Tensor | None]:
        raise ValueError(f"The result depends on the base model's layer '{name}': state the `base_model`.")

    def tensor(self, name: str) -> Tensor | None:
        return None

    def arranged(self, name: str, weight: Tensor) -> Tensor:
        raise ValueError(f"How the base model stores '{name}' is not known: state the `base_model`.")


@dataclass(frozen=True, eq=False)
class BaseFolder:
    """The base model in a folder or repository: its config, and its weights as they are asked for."""

    reference: str
    folder: Path
    architecture: str | None  # of transformers, where the adapters name one

    @classmethod
    def of(cls, adapter: _File, reference: str | None) -> "BaseFolder":
        """The one that was stated, or that an adapter names."""
        config = adapter.config
        reference = reference or config.base_model_name_or_path
        if not reference:
            raise ValueError(
                f"{adapter.reference} is of type {config.peft_type.value}, which cannot be read without the base "
                "model, and does not name one. State it as `base_model`."
            )
        return cls.located(reference, config)

    @classmethod
    def located(cls, reference: str, config: PeftConfig) -> "BaseFolder":
        return cls(reference, locate(reference)[0], model_class(config))

    @cached_property
    def weights(self) -> Checkpoint:
        return open_source(self.reference).weights  # which a quantised model has none of

    @cached_property
    def outline(self) -> Outline:
        """What is stored for each of the model's weights, where that goes by other names."""
        return Outline(self.model, self.weights.tensors, self.reference)

    @cached_property
    def model(self) -> nn.Module:
        """The model without memory."""
        import transformers

        if not (self.folder / "config.json").is_file():
            raise ValueError(
                f"{self.reference} is no model of transformers: load it, and merge the adapters in memory."
            )
        settings = transformers.AutoConfig.from_pretrained(self.folder)
        names = [name for name in (self.architecture, *(settings.architectures or [])) if name]
        kind = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
        if kind is None:
            raise ValueError(f"transformers has none of the architectures {names} of {self.reference}.")
        with torch.device("meta"):
            return kind.from_config(settings) if kind.__name__.startswith("AutoModel") else kind(settings)

    @contextmanager
    def present(self, name: str, layer: nn.Module) -> Iterator[nn.Module]:
        """The layer with its weights, for a while."""
        before = dict(layer._parameters)
        for key, parameter in before.items():
            if parameter is not None:
                layer._parameters[key] = nn.Parameter(self.read(f"{name}.{key}"), requires_grad=False)
        try:
            yield layer
        finally:
            layer._parameters.update(before)

    def layer(self, name: str) -> tuple[Tensor, Tensor | None]:
        with self.present(name, self.model.get_submodule(name)) as layer:
            return layer_tensors(name, layer)

    def arranged(self, name: str, weight: Tensor) -> Tensor:
        return layout_of(self.model.get_submodule(name), name).canonical(weight)

    def tensor(self, name: str) -> Tensor | None:
        if (stored := self.find(name)) is not None:
            return self.weights.read(stored)
        return self.outline.read(name, self.weights.read) if self.outline.origin(name) else None

    def read(self, name: str) -> Tensor:
        found = self.tensor(name)
        if found is None:
            raise ValueError(f"The base model {self.reference} has no tensor '{name}', which an adapter changes.")
        return found

    def find(self, name: str) -> str | None:
        """The name in the checkpoint: a model with a head has a prefix where one without has none."""
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        candidates = (name, name.removeprefix(prefix), f"{prefix}{name}")
        return next((found for found in candidates if found in self.weights.tensors), None)


def _is_tuners(name: str) -> bool:
    return name.startswith("base_model.") and not name.startswith(PREFIX)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
