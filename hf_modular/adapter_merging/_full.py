"""Full fine-tunes among adapters: what fine-tuning has added to matrices, and the layers that are kept as they are."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_modular.adapter_merging._extract import FineTuned
from hf_modular.adapter_merging._files import BaseFolder, NoBase, locate_adapter, open_adapters
from hf_modular.adapter_merging._source import Base, Source
from hf_modular.adapters._layout import layout_of
from hf_modular.merging.sources._adapter_folder import ADAPTER_CONFIG


def open_models(references: list[str], base_model: str | None) -> tuple[list[Source], Base]:
    """Adapters and full fine-tunes from their folders or repositories, and the base model."""
    full = [name for name in references if not (locate_adapter(name) / ADAPTER_CONFIG).is_file()]
    if full and base_model is None:
        raise ValueError(f"{full} are no adapters. If they are fine-tuned models, state the `base_model`.")
    adapters = [name for name in references if name not in full]
    found, base = open_adapters(adapters, base_model) if adapters else ([], NoBase())
    tuned = {name: FullFineTune.of_model(str(base_model), name) for name in full}
    sources = dict(zip(adapters, found, strict=True)) | tuned
    return [sources[name] for name in references], next(iter(tuned.values())).base if tuned else base


@dataclass(frozen=True, eq=False)
class FullFineTune(FineTuned):
    """A fine-tuned model: the linear layers and convolutions that it has changed are matrices to reduce.

    Norms, and heads of a size of their own, are kept whole. Embeddings, and what is no layer's, are left to `lost`.
    """

    @classmethod
    def of_model(cls, base: str, fine_tuned: str) -> "FullFineTune":
        tuned = BaseFolder.located(fine_tuned, LoraConfig())
        kind = type(tuned.model)
        start = BaseFolder(base, BaseFolder.located(base, LoraConfig()).folder, kind.__name__)  # it may lack the head
        layers = [*_changed(start, tuned)]
        if not layers:
            raise ValueError(f"{fine_tuned} has the linear layers of {base}: there is nothing to reduce.")
        mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        config = LoraConfig(target_modules=layers, base_model_name_or_path=base, auto_mapping=mapping)
        config.fan_in_fan_out = any(isinstance(tuned.model.get_submodule(layer), Conv1D) for layer in layers)
        return cls(fine_tuned, start, tuned, config)

    @cached_property
    def whole(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, layer in self.tuned.model.named_modules():
            if (_is_norm(layer) and self._differs(name)) or (_is_matrix(layer) and _shapes_differ(name, *self.models)):
                found |= {f"{name}.{key}": self.tuned.read(f"{name}.{key}") for key in _own(layer)}
        return found

    @property
    def models(self) -> tuple[BaseFolder, BaseFolder]:
        return self.base, self.tuned

    def _differs(self, name: str) -> bool:
        keys = _own(self.tuned.model.get_submodule(name))
        return not all(torch.equal(*(model.read(f"{name}.{key}") for model in self.models)) for key in keys)


def _changed(base: BaseFolder, tuned: BaseFolder) -> Iterator[str]:
    """The layers that can be reduced, and that fine-tuning has changed."""
    model: Any = tuned.model
    tied = model.get_output_embeddings() if getattr(model.config, "tie_word_embeddings", False) else None
    for name, layer in model.named_modules():
        if _is_matrix(layer) and layer is not tied and not _shapes_differ(name, base, tuned):
            weights = [each.tensor(f"{name}.weight") for each in (base, tuned)]
            if weights[0] is not None and weights[1] is not None and not torch.equal(weights[0], weights[1]):
                yield name


def _shapes_differ(name: str, base: BaseFolder, tuned: BaseFolder) -> bool:
    """Whether a layer of the fine-tuned model is of another size than the base's, which may have none."""
    before, after = (each.find(f"{name}.weight") for each in (base, tuned))
    if before is None or after is None:
        return after is not None
    return base.weights.tensors[before].shape != tuned.weights.tensors[after].shape


def _is_matrix(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and getattr(layer, "groups", 1) == 1


def _is_norm(layer: nn.Module) -> bool:
    try:
        return layout_of(layer, "").kind == "Norm"
    except TypeError:
        return False


def _own(layer: nn.Module) -> list[str]:
    return [key for key, parameter in layer.named_parameters(recurse=False)]
