"""Adapters that lie in a model in memory. The only file of this package that knows how PEFT's layers look inside.

What a LoRA adds is read from its matrices. For every other type of PEFT a copy of the layer, one at a time and in
fp32, is merged with that adapter alone, and the difference taken: whatever merging the adapter does is its effect.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_modular.adapter_merging._matrix import Dense, LowRank
from hf_modular.adapter_merging._source import PREFIX, Change, refuse_variants, widest
from hf_modular.adapters._layer import AdapterLayer
from hf_modular.adapters._layout import is_plain, layout_of
from hf_modular.adapters._method import Site

# types that compute indices from their config or read them apart, for which layers must be on the CPU
_COMPUTES = ("OFT", "SHIRA", "UNILORA")
_UNUSED = re.compile(r"\.(?:base_layer|ranknum)\.")  # elsewhere, or in training only
_PLAIN_LORA = ("MiCA", "Velora")  # variants that differ in training only


@dataclass(frozen=True, eq=False)
class LiveAdapter:
    """An adapter of a model in memory; `present` brings the weights of a base layer if they are elsewhere."""

    model: PeftModel
    name: str
    label: str | None = None
    present: Callable[[str, nn.Module], AbstractContextManager[object]] = lambda name, layer: nullcontext()

    @property
    def reference(self) -> str:
        return self.label or f"adapter {self.name!r}"

    @property
    def config(self) -> Any:
        return self.model.peft_config[self.name]

    @cached_property
    def layers(self) -> dict[str, Any]:
        """The layers that hold the adapter."""
        modules = self.model.base_model.model.named_modules()
        return {name: module for name, module in modules if _holds(module, self.name)}

    @cached_property
    def sites(self) -> dict[str, Site]:
        refuse_variants(self.reference, self.config)
        if not self.layers:
            raise ValueError(f"{self.reference} ({self.config.peft_type.value}) changes no layer's weight.")
        return {name: self._site(name, layer) for name, layer in self.layers.items()}

    @cached_property
    def whole(self) -> dict[str, Tensor]:
        if getattr(self.config, "bias", "none") != "none":
            raise ValueError(
                f"{self.reference} has trained biases of the base model itself (bias={self.config.bias!r}), which "
                "stay in a model in memory. Save the adapters and merge them from their folders."
            )
        kept = kept_whole(self.model, self.name).values()
        return {name: tensor for tensors in kept for name, tensor in tensors.items()}

    @property
    def transposed(self) -> bool:
        return any(isinstance(layer.get_base_layer(), Conv1D) for layer in self.layers.values())

    @property
    def dtype(self) -> torch.dtype:
        """The widest of its parameters."""
        state = self.model.state_dict()
        return widest(t.dtype for name, t in state.items() if prefix_of(self.config) in name and self.name in name)

    @torch.no_grad()
    def change(self, name: str) -> Change:
        layer = self.layers[name]
        if getattr(layer, "merged_adapters", None):
            raise ValueError(
                f"Layer '{name}' has merged {layer.merged_adapters} into its weight: call `unmerge_adapter` first."
            )
        found = _factors(layer, self.name)
        if found is not None:
            return found
        if _is_quantised(layer):
            raise ValueError(
                f"What {self.reference} ({self.config.peft_type.value}) adds to layer '{name}' depends on its weight, "
                "which is quantised. Load the model without quantisation."
            )
        with self.present(name, layer.get_base_layer()):
            return self._difference(name, layer)

    def tensors(self) -> dict[str, Tensor]:
        state = get_peft_model_state_dict(self.model, adapter_name=self.name, save_embedding_layers=False)
        beside = {f"{PREFIX}{key}" for key in self.whole}
        return {key: tensor.detach() for key, tensor in state.items() if key not in beside}

    def _site(self, name: str, layer: Any) -> Site:
        base = layer.get_base_layer()
        if isinstance(layer, AdapterLayer):
            return layer.site
        if _is_quantised(layer):
            return Site(name, (layer.out_features, layer.in_features), base.bias is not None)
        layout = layout_of(base, name)
        shape = tuple(layout.to_canonical(base.weight).shape)
        plain, groups = is_plain(base), getattr(base, "groups", 1)
        return Site(name, shape, getattr(base, "bias", None) is not None, layout.kind, plain, groups)

    def _difference(self, name: str, layer: Any) -> Change:
        copied = copy.deepcopy(layer)
        copied = (copied if _dtype(copied) == torch.float64 else copied.float()).eval()
        before = layer_tensors(name, copied.get_base_layer())
        try:
            copied.merge(adapter_names=[self.name])
        except NotImplementedError as error:
            kind = self.config.peft_type.value
            raise ValueError(
                f"{self.reference} ({kind}) cannot be merged: its effect on '{name}' changes no weight. {error}"
            ) from error
        after = layer_tensors(name, copied.get_base_layer())
        weight = Dense((after[0] - before[0]).reshape(len(after[0]), -1))
        if before[1] is None or after[1] is None or torch.equal(before[1], after[1]):
            return Change(weight)
        return Change(weight, after[1] - before[1])


@dataclass(frozen=True, eq=False)
class LiveBase:
    """The base model inside a model with adapters."""

    model: PeftModel

    def layer(self, name: str) -> tuple[Tensor, Tensor | None]:
        return layer_tensors(name, self._module(name))

    def arranged(self, name: str, weight: Tensor) -> Tensor:
        return layout_of(self._module(name), name).canonical(weight)

    def _module(self, name: str) -> nn.Module:
        """The base model's own, inside whatever is around it."""
        module: Any = self.model.base_model.model
        for part in name.split("."):
            module = getattr(module, part)
            if isinstance(module, ModulesToSaveWrapper):
                module = module.original_module
        return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module

    def tensor(self, name: str) -> Tensor | None:
        return self._tensors.get(name)

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, wrapper in _wrappers(self.model).items():
            found.update(_tensors(name, wrapper.original_module))
        return found


def add_adapter(model: PeftModel, name: str, config: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put an adapter into the model, or leave the model as it was."""
    model.add_adapter(name, config)
    try:
        loaded = set_peft_model_state_dict(model, dict(tensors), adapter_name=name)
        if loaded.unexpected_keys:
            raise ValueError(f"The model has no place for {loaded.unexpected_keys[:3]} of the merged adapter.")
    except BaseException:
        model.delete_adapter(name)
        raise


def prefix_of(config: Any) -> str:
    """What the names of a type's parameters begin with."""
    return PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]


def set_up(reference: str, base: nn.Module, config: Any, tensors: Mapping[str, Tensor]) -> PeftModel:
    """A model whose adapter has its tensors, and whose own weights have no memory."""
    kind = config.peft_type.value
    if kind in _COMPUTES:
        _put_in_one_number(base)
    try:
        model = get_peft_model(base, config)
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
        state = tuner._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name="default", state_dict=dict(tensors)
        )
        unexpected = model.load_state_dict(state, strict=False, assign=True).unexpected_keys
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(f"{_unreadable(reference, kind)} {error}") from error
    needed = [(name, tensor) for name, tensor in _held(model) if not _UNUSED.search(name)]
    absent = [name for name, tensor in needed if tensor.is_meta]
    if unexpected or absent:
        raise ValueError(f"{_unreadable(reference, kind)} lacking are {absent[:3]}, unknown are {unexpected[:3]}.")
    return model


def _unreadable(reference: str, kind: str) -> str:
    return (
        f"{reference} ({kind}) does not fit its base model, or is of a type that cannot be read without the model's "
        "weights: load both, and merge the adapters in memory. In detail:"
    )


def _held(model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the layers that are adapted, and of what adapters share."""
    own = {id(module) for module in model.modules() if isinstance(module, BaseTunerLayer)}
    for name, module in model.named_modules():
        if id(module) in own or module is model.base_model:
            for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
                if module is not model.base_model or not key.startswith("model."):
                    yield f"{name}.{key}", tensor


def _put_in_one_number(base: nn.Module) -> None:
    """Weights on the CPU, of which each is one zero that is read again and again."""
    for module in base.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                module._parameters[key] = nn.Parameter(zeros, requires_grad=False)


def layer_tensors(name: str, layer: Any) -> tuple[Tensor, Tensor | None]:
    """The weight (out, in, *kernel) and the bias of a layer, copied, in fp32 or wider."""
    bias = getattr(layer, "bias", None)
    weight = layout_of(layer, name).canonical(_wide(layer.weight))
    return weight.clone(), None if bias is None else _wide(bias).clone()


def _holds(module: nn.Module, adapter: str) -> bool:
    if not isinstance(module, BaseTunerLayer):
        return False
    return any(adapter in getattr(module, slot, ()) for slot in module.adapter_layer_names)


def _factors(layer: Any, adapter: str) -> Change | None:
    """What the adapter adds, if it is a product of matrices that it holds itself."""
    if isinstance(layer, AdapterLayer):
        found = layer.adapters[adapter].lora()  # type: ignore[operator]
        return None if found is None else Change(LowRank(_wide(found[1]) * found[2], _wide(found[0]).flatten(1)))
    if not isinstance(layer, LoraLayer) or type(layer).__name__ in ("MultiheadAttention", "ParamWrapper"):
        return None
    variant = type(layer.lora_variant.get(adapter)).__name__
    if variant != "NoneType" and not variant.startswith(_PLAIN_LORA):
        return None
    if getattr(layer.get_base_layer(), "groups", 1) > 1:
        raise ValueError("A LoRA on a grouped convolution mixes what the groups keep apart and has no merged form.")
    A, B, bias, scaling = _matrices(layer, adapter)
    up = LowRank(_wide(B).flatten(1) * scaling, _wide(A).flatten(1))
    return Change(up, None if bias is None else _wide(bias) * scaling)


def _matrices(layer: Any, adapter: str) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """A, B, the bias and the scaling."""
    scaling = layer.scaling[adapter]
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter], None, scaling
    A, B = layer.lora_A[adapter], layer.lora_B[adapter]
    if hasattr(layer, "lora_E"):  # AdaLoRA
        return A * layer.lora_E[adapter], B, None, scaling / (layer.r[adapter] + 1e-5)
    return A.weight, B.weight, B.bias, scaling


def _is_quantised(layer: Any) -> bool:
    weight = getattr(layer.get_base_layer(), "weight", None)
    return weight is None or not weight.dtype.is_floating_point


def kept_whole(model: PeftModel, adapter: str) -> dict[str, dict[str, Tensor]]:
    """The modules that an adapter has copies of, and their tensors by their names in the base model."""
    wrappers = {name: w for name, w in _wrappers(model).items() if adapter in w.modules_to_save}
    return {name: _tensors(name, wrapper.modules_to_save[adapter]) for name, wrapper in wrappers.items()}


def _wrappers(model: Any) -> dict[str, Any]:
    """What holds the copies of modules that are trained whole, by their names in the base model."""
    modules: Iterator[tuple[str, Any]] = model.base_model.model.named_modules()
    return {name: module for name, module in modules if isinstance(module, ModulesToSaveWrapper)}


def _tensors(name: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.{key}": tensor.detach() for key, tensor in module.state_dict().items()}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _dtype(layer: nn.Module) -> torch.dtype:
    return next((p.dtype for p in layer.parameters() if p.is_floating_point()), torch.float32)
