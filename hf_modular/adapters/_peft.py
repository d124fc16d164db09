"""Bringing a method into PEFT: the tuner model, and the registry. The only file that touches PEFT's registry."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from enum import Enum
from functools import partial
from typing import Any

import peft
import torch
from accelerate import init_empty_weights
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, PeftType
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.peft_types import register_peft_method
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn

from hf_modular._version import __version__
from hf_modular.adapters._layer import BASE, AdapterLayer, wrap
from hf_modular.adapters._method import Adapter, AdapterConfig

# What is usual for LoRA, and for vision transformers, which PEFT's table leaves out.
USUAL_TARGETS = {
    **TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    "vit": ["query", "value", "q_proj", "v_proj"],
}


class AdapterModel(BaseTuner):
    """Puts the adapters of one method into a model. Made for each method by `register`."""

    tuner_layer_cls = AdapterLayer
    slot: str  # the name of the `ModuleDict` in each layer
    adapter_class: type[Adapter]

    # -- putting adapters in place ---------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """First all layers are put in place, then what they share is made, then each adapter.

        Whatever fails on the way, the model is afterwards as it was before.
        """
        self._placed: dict[str, AdapterLayer] = {}
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._make_adapters(adapter_name)
        except Exception:
            self._take_back(model, adapter_name)
            raise
        finally:
            del self._placed

    def _create_and_replace(
        self,
        peft_config: AdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(parent, nn.MultiheadAttention):
            raise TypeError(
                f"Layer '{current_key}' belongs to a torch.nn.MultiheadAttention, which reads its weight without "
                "calling it: an adapter there would have no effect. Name it in `exclude_modules`."
            )
        if not (isinstance(target, AdapterLayer) and target.adapter_layer_names == (self.slot,)):
            target = self._wrapped(target, target_name, parent, current_key)
        self._placed[current_key] = target

    def _wrapped(self, target: nn.Module, target_name: str, parent: nn.Module, key: str) -> AdapterLayer:
        if isinstance(target, BaseTunerLayer):
            raise TypeError(
                f"Layer '{key}' already holds adapters of another type ({type(target).__name__}). Merge or unload "
                "them, or give both adapters different `target_modules`."
            )
        backend = resolve_quantization_backend(target, **get_quantization_kwargs(self.model))
        layer = wrap(target, key, self.slot, backend)
        self._replace_module(parent, target_name, layer, target)
        return layer

    def _make_adapters(self, adapter_name: str) -> None:
        config = self.peft_config[adapter_name]
        shared = self.adapter_class.share(config, [layer.site for layer in self._placed.values()])
        active = adapter_name in self.active_adapters
        for layer in self._placed.values():
            layer.add_adapter(adapter_name, self._adapter(config, layer, shared))
            layer.adapters[adapter_name].requires_grad_(active and not config.inference_mode)
            layer._active_adapter = self.active_adapters

    def _adapter(self, config: AdapterConfig, layer: AdapterLayer, shared: Any) -> Adapter:
        given = (config, layer.site) if shared is None else (config, layer.site, shared)
        adapter = self.adapter_class(*given)
        backend = layer.quantization_backend
        if backend is not None and not backend.supports_merge and not adapter.direct:
            raise TypeError(
                f"{type(adapter).__name__} reads the weight of the layer it adapts, and the {backend.backend_name} "
                f"weight of '{layer.site.name}' cannot be read."
            )
        return adapter

    def _take_back(self, model: nn.Module, adapter_name: str) -> None:
        for key, layer in self._placed.items():
            if adapter_name in layer.adapters:
                del layer.adapters[adapter_name]
            if not layer.adapters:
                parent, _, name = key.rpartition(".")
                setattr(model.get_submodule(parent), name, layer.base_layer)
        self.peft_config.pop(adapter_name, None)

    def _check_target_module_compatiblity(
        self, peft_config: AdapterConfig, model: nn.Module, target_name: str
    ) -> None:
        model_type = str(self.get_model_config(model).get("model_type"))
        if "mamba" in model_type and target_name in ("conv1d", "out_proj"):
            raise ValueError(
                f"Module '{target_name}' of a {model_type} model is read by a kernel without being called: an adapter "
                "there would have no effect. Leave it out of `target_modules`."
            )

    # -- merging ---------------------------------------------------------------------------------------------

    def _layers(self) -> Iterator[AdapterLayer]:
        return (module for module in self.model.modules() if isinstance(module, AdapterLayer))

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        self._refuse_unmergeable(None)

    def _refuse_unmergeable(self, adapter_names: list[str] | None) -> None:
        reasons = {
            layer.site.name: reason
            for layer in self._layers()
            if (reason := layer.unmergeable(layer.active_adapters if adapter_names is None else adapter_names))
        }
        if reasons:
            lines = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
            raise ValueError(f"These layers cannot be merged, and nothing was:\n{lines}")

    def _check_safe(self, adapter_names: list[str] | None) -> None:
        """Compute every merged weight once before the first is written: all layers are merged, or none."""
        for layer in self._layers():
            layer.check_merge(adapter_names)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._refuse_unmergeable(adapter_names)
        if safe_merge:
            self._check_safe(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=False)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._refuse_unmergeable(adapter_names)
            if safe_merge:
                self._check_safe(adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, False, adapter_names)

    # -- mixed batches ---------------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names`, one name per sample, to every layer for the time of one call."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        self._check_names(names)
        with ExitStack() as stack:
            for module, repeated in self._modules_for_mixed_batches():
                beams = kwargs.get("num_beams") or 1
                here = [name for name in names for _ in range(beams)] if repeated else list(names)
                hook = module.register_forward_pre_hook(partial(_give_names, here), with_kwargs=True)
                stack.callback(hook.remove)
            yield

    def _check_names(self, names: list[str]) -> None:
        if self.training:
            raise ValueError("`adapter_names` is for inference; call `model.eval()` first.")
        known = {name for layer in self._layers() for name in layer.adapters}
        if unknown := sorted(set(names) - known - {BASE}):
            raise ValueError(f"`adapter_names` holds unknown adapters {unknown}; the model has {sorted(known)}.")

    def _modules_for_mixed_batches(self) -> Iterator[tuple[nn.Module, bool]]:
        """The modules that take the names, and whether beam search repeats their samples (not in an encoder)."""
        find = getattr(self.model, "get_encoder", None)
        encoder = find() if find is not None and getattr(self.model.config, "is_encoder_decoder", False) else None
        once = set() if encoder is None else {id(module) for module in encoder.modules()}
        for module in self.modules():
            if isinstance(module, (AdapterLayer, AuxiliaryTrainingWrapper)):
                yield module, id(module) not in once

    # -- saved files -----------------------------------------------------------------------------------------

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT looks at the last two parts of a key only; parameters of nested modules lie deeper
        return key.replace(f".{cls.slot}.{adapter_name}.", f".{cls.slot}.", 1)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: AdapterConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """What is saved: a shared tensor once, and nothing that could not be loaded again."""
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        first = _first_names(model)
        kept = {key: value for key, value in found.items() if first.get(key, key) == key}
        _refuse_broken(kept)
        return kept

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: AdapterConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The inverse: each name of a shared tensor gets the one that was saved."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for alias, first in _first_names(model).items():
            if first in remapped and alias not in remapped:
                remapped[alias] = remapped[first]
        return remapped


def _give_names(names: list[str], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


def _first_names(model: nn.Module) -> dict[str, str]:
    """For each name of a tensor inside `shared` modules, the name under which it comes first."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if prefix.endswith(".shared"):
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                names[f"{prefix}.{name}"] = first.setdefault(id(tensor), f"{prefix}.{name}")
    return names


def _refuse_broken(tensors: dict[str, Tensor]) -> None:
    """Sharded training can hand out empty tensors, and a diverged run non-finite ones: refuse to save them."""
    for key, tensor in tensors.items():
        if tensor.numel() == 0:
            raise ValueError(f"Tensor '{key}' of the adapter is empty; was the sharded model gathered before saving?")
        if tensor.device.type != "meta" and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"Tensor '{key}' of the adapter holds NaN or infinity; it is not saved.")


# -- the registry ------------------------------------------------------------------------------------------------


class PeftContractError(ImportError):
    """The installed PEFT is not one that this version of the package can extend."""


class PeftTypeConflictError(ImportError):
    """Somebody else has registered a PEFT type of the same name."""


_REGISTER_ARGUMENTS = {"name", "config_cls", "model_cls", "prefix", "is_mixed_compatible"}
_NEEDED = {
    BaseTuner: [
        "inject_adapter",
        "_create_and_replace",
        "_replace_module",
        "_check_merge_allowed",
        "_get_adapter_state_dict",
        "_remove_adapter_name_from_key",
        "_remap_adapter_state_dict_for_load",
        "_unload_and_optionally_merge",
        "uses_shared_state",
    ],
    BaseTunerLayer: [
        "get_base_weight",
        "set_base_weight",
        "quantization_backend",
        "_move_adapter_to_device_of_base_layer",
        "_cast_input_dtype",
    ],
}
_ours: set[str] = set()  # the enum members that this package added


def check_contract() -> None:
    """Refuse a PEFT that lacks what this package builds on.

    Raises:
        PeftContractError: It names what is missing and the versions.
    """
    problems = [f"{c.__name__} has no {n}" for c, names in _NEEDED.items() for n in names if not hasattr(c, n)]
    if not (issubclass(PeftType, str) and issubclass(PeftType, Enum)):
        problems.append("PeftType is no string enum")
    if not set(inspect.signature(register_peft_method).parameters) >= _REGISTER_ARGUMENTS:
        problems.append(f"register_peft_method does not take {sorted(_REGISTER_ARGUMENTS)}")
    if problems:
        raise PeftContractError(
            f"hf_modular {__version__} was written for peft 0.21, and peft {peft.__version__} is installed: "
            f"{'; '.join(problems)}. Install a matching pair: pip install 'peft>=0.21.2,<0.22'."
        )


def add_peft_type(name: str) -> PeftType:
    """The member `name` of PEFT's closed enum `PeftType`, added if it is not there.

    Raises:
        PeftContractError: If the new member would not behave like PEFT's own.
    """
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_, member._value_ = name, name
        member.__objclass__ = PeftType
        member._sort_order_ = len(PeftType)
        PeftType._member_map_[name] = member
        PeftType._member_names_.append(name)
        PeftType._value2member_map_[name] = member
        if hasattr(PeftType, "_hashable_values_"):  # Python 3.12 and later
            PeftType._hashable_values_.append(name)
        type.__setattr__(PeftType, name, member)
        _ours.add(name)
    member = PeftType.__members__[name]
    same = PeftType(name) is PeftType[name] is getattr(PeftType, name) is member
    if not (same and member in list(PeftType) and hash(member) == hash(name) and member.value == name):
        raise PeftContractError(f"PEFT's enum of types does not take the new member {name!r} on this Python.")
    return member


def register(config_class: type[AdapterConfig], adapter_class: type[Adapter]) -> type[AdapterModel]:
    """Make the tuner of a method and register it with PEFT; importing again or reloading is harmless.

    Raises:
        PeftContractError: If the installed PEFT is not one that can be extended.
        PeftTypeConflictError: If the type is registered by somebody else.
    """
    check_contract()
    type_name = config_class.type_name
    name = type_name.lower()
    body = {
        "__doc__": f"Puts {adapter_class.__name__} adapters into a model.",
        "__module__": "hf_modular.adapters",
        "prefix": f"{name}_",
        "slot": f"{name}_adapter",
        "adapter_class": adapter_class,
        "target_module_mapping": config_class.default_targets or USUAL_TARGETS,
    }
    model_class = type(f"{adapter_class.__name__}Model", (AdapterModel,), body)
    _refuse_conflict(type_name, config_class)
    member = add_peft_type(type_name)
    if member in PEFT_TYPE_TO_CONFIG_MAPPING:  # a reload: the new classes take the place of the old
        PEFT_TYPE_TO_CONFIG_MAPPING[member] = config_class
        PEFT_TYPE_TO_TUNER_MAPPING[member] = model_class
    else:
        register_peft_method(name=name, config_cls=config_class, model_cls=model_class, prefix=f"{name}_")
    return model_class


def _refuse_conflict(type_name: str, config_class: type[AdapterConfig]) -> None:
    owner = PEFT_TYPE_TO_CONFIG_MAPPING.get(type_name)
    if owner is None and type_name in PeftType.__members__ and type_name not in _ours:
        raise PeftTypeConflictError(
            f"PEFT has a type {type_name} of its own, which this package would have to replace."
        )
    same = owner is None or (owner.__module__, owner.__qualname__) == (
        config_class.__module__,
        config_class.__qualname__,
    )
    if not same:
        raise PeftTypeConflictError(
            f"The PEFT type {type_name} is registered by {owner.__module__}.{owner.__qualname__}."
        )
