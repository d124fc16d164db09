"""Bringing a method into PEFT: the tuner model, and the registry. The only file that touches PEFT's registry."""

import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy
from enum import Enum
from functools import partial
from typing import Any, cast

import peft
import torch
from accelerate import init_empty_weights
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, PeftType
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.peft_types import register_peft_method
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_modular._version import __version__
from hf_modular.adapters._layer import BASE, AdapterLayer, wrap
from hf_modular.adapters._layout import is_supported
from hf_modular.adapters._method import Adapter, AdapterConfig, Site
from hf_modular.adapters._parameters import FORMER_NAMES, ParameterLayer, bare_name, fused_parameters
from hf_modular.adapters._readme import keep_note_on_cards

# What is usual for LoRA, and for vision transformers, which PEFT's table leaves out.
USUAL_TARGETS = {
    **TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    "vit": ["query", "value", "q_proj", "v_proj"],
}
FSDP_PREFIX = "_fsdp_wrapped_module."  # in the names of modules, not in those of a state dict


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
        self._placed: dict[str, tuple[AdapterLayer, list[str]]] = {}  # with the parameters that are adapted inside it
        self._repeated = _repeated(model)
        config = self.peft_config[adapter_name]
        asked = copy(config)
        if trained := config.modules_to_train(model):
            config.modules_to_save = sorted({*trained, *(config.modules_to_save or [])})
        undo = _remember(model)
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._make_adapters(adapter_name)
            self._check_experts(model, asked)
        except Exception:
            undo()
            self.peft_config.pop(adapter_name, None)
            raise
        finally:
            del self._placed, self._repeated

    def _prepare_adapter_config(self, peft_config: AdapterConfig, model_config: dict[str, Any]) -> AdapterConfig:
        targets = peft_config.targets_for(model_config.get("model_type"))
        given = peft_config.target_modules is not None or bool(peft_config.target_parameters)
        if not given and targets is not None:
            peft_config.target_modules = targets if isinstance(targets, str) else set(targets)  # type: ignore[assignment]
        if given and peft_config.target_modules is None:
            peft_config.target_modules = set()  # type: ignore[assignment]
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        if not given and isinstance(peft_config.target_modules, str) and peft_config.layers_to_transform is not None:
            peft_config.target_modules = set(self._in_chosen_layers(peft_config))  # type: ignore[assignment]
        return peft_config

    def _in_chosen_layers(self, config: AdapterConfig) -> list[str]:
        """The modules that a regular expression finds in the chosen layers; PEFT looks at the layers of lists only."""
        found = [n for n, _ in self.model.named_modules() if re.fullmatch(str(config.target_modules), n)]
        listed = copy(config)
        listed.target_modules = [name.rpartition(".")[2] for name in found]
        return [name for name in found if check_target_module_exists(listed, name)]

    def _create_and_replace(
        self,
        peft_config: AdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        _refuse_attention(parent, current_key)
        if not self._is_ours(target):
            target = self._wrapped(target, target_name, parent, current_key)
        self._placed[current_key] = cast(AdapterLayer, target), []

    def _is_ours(self, layer: nn.Module) -> bool:
        return isinstance(layer, AdapterLayer) and layer.adapter_layer_names == (self.slot,)

    def _wrapped(self, target: nn.Module, target_name: str, parent: nn.Module, key: str) -> AdapterLayer:
        self._refuse_repeated(target, key)
        _refuse_occupied(target, key)
        backend = resolve_quantization_backend(target, **get_quantization_kwargs(self.model))
        _refuse_split(getattr(target, "weight", None), key)
        layer = wrap(target, key, self.slot, backend)
        if isinstance(parent, nn.TransformerEncoderLayer):
            # for inference torch reads the weights of its layers instead of calling them, but not where one has a hook
            layer.register_forward_pre_hook(_refuse_nested)
        self._replace_module(parent, target_name, layer, target)
        return layer

    def _refuse_repeated(self, target: nn.Module, key: str) -> None:
        if id(target) in self._repeated:
            raise TypeError(
                f"Layer '{key}' stands in several places of the model ({', '.join(self._repeated[id(target)])}), and "
                "an adapter would act in one of them only. Name it in `exclude_modules`, or put a layer of its own in "
                "each place, of the same weight."
            )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # What is put in place is complete. PEFT would hand it the weight of what was there before, which in front
        # of an embedding with trained tokens is no parameter.
        setattr(parent, child_name, new_module)

    def _make_adapters(self, adapter_name: str) -> None:
        config = self.peft_config[adapter_name]
        shared = self.adapter_class.share(
            config, [site for layer, p in self._placed.values() for site in layer.sites(p)]
        )
        active = adapter_name in self.active_adapters
        named: set[int] = set()
        for layer, parameters in self._placed.values():
            adapter = layer.made(partial(self._adapter, config, layer, shared), parameters)
            for sharing in [module for module in adapter.modules() if "shared" in module._modules]:
                _name_once(sharing, named)  # type: ignore[arg-type]
            layer.add_adapter(adapter_name, adapter)
            layer.adapters[adapter_name].requires_grad_(active and not config.inference_mode)
            layer._active_adapter = self.active_adapters

    def _adapter(self, config: AdapterConfig, layer: AdapterLayer, shared: Any, site: Site) -> Adapter:
        adapter = self.adapter_class.made(*((config, site) if shared is None else (config, site, shared)))
        backend = layer.quantization_backend
        if backend is not None and not backend.supports_merge and not adapter.direct:
            raise TypeError(
                f"{type(adapter).__name__} reads the weight of the layer it adapts, and the {backend.backend_name} "
                f"weight of '{layer.site.name}' cannot be read."
            )
        return adapter

    def _check_target_module_compatiblity(
        self, peft_config: AdapterConfig, model: nn.Module, target_name: str
    ) -> None:
        model_type = str(self.get_model_config(model).get("model_type"))
        if "mamba" in model_type and target_name in ("conv1d", "out_proj"):
            raise ValueError(
                f"Module '{target_name}' of a {model_type} model is read by a kernel without being called: an adapter "
                "there would have no effect. Leave it out of `target_modules`."
            )

    # -- parameters ------------------------------------------------------------------------------------------

    def _inject_parameters(
        self, peft_config: AdapterConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Put layers in place around the modules whose parameters are asked for."""
        wanted = sorted(peft_config.target_parameters or [])
        asked = _asking_for(peft_config, set(wanted))
        found = [key for key in self._parameter_names(model) if check_target_module_exists(asked, key)]
        if lost := [name for name in wanted if not any(_ends(key, name) for key in found)]:
            raise ValueError(f"`target_parameters` names {lost}, which no parameter that may be adapted is called.")
        for key in found:
            self._place_parameter(peft_config, model, *key.rpartition(".")[::2])
        return found

    def _parameter_names(self, model: nn.Module) -> list[str]:
        """The parameters of the base model, by their names in it."""
        owners = [(name, module) for name, module in model.named_modules() if self.slot not in name.split(".")]
        return [f"{bare_name(n)}.{p}" for n, module in owners for p, _ in module.named_parameters(recurse=False)]

    def _place_parameter(self, peft_config: AdapterConfig, model: nn.Module, name: str, parameter: str) -> None:
        target, (place, _, last) = model.get_submodule(name), name.rpartition(".")
        parent = model.get_submodule(place)
        base = target.base_layer if isinstance(target, AdapterLayer) else target
        if parameter == "weight" and is_supported(base):  # a layer's own: the layer is adapted
            self._create_and_replace(peft_config, "", target, last, parent, name)
            return
        if not (self._is_ours(target) and isinstance(target, ParameterLayer)):
            self._refuse_repeated(target, name)
            _refuse_occupied(target, name)
            _refuse_attention(target, name)
            target = ParameterLayer(base, name, self.slot, None)
            self._replace_module(parent, last, target, base)
        _refuse_split(target.parameter(parameter), f"{name}.{parameter}")
        self._placed.setdefault(name, (target, []))[1].append(parameter)

    def _check_experts(self, model: nn.Module, asked: AdapterConfig) -> None:
        """Fused experts are no modules: what was meant for them must not pass them by without a word."""
        left = self._experts_left(model, asked)
        message = (
            "The experts of this model are parameters and no modules, so `target_modules` does not reach them: "
            f"{_some(left, 'parameters')} are not adapted. Add target_parameters={_last_parts(left)} for them, or "
            f"exclude_modules={_last_parts(key.rpartition('.')[0] for key in left)} to leave them as they are."
        )
        meant = {f"{key.rpartition('.')[0]}.{name}" for key in left for name in FORMER_NAMES} | set(left)
        if lost := [t for t in self._names_without_modules(asked) if any(_ends(key, t) for key in meant)]:
            raise ValueError(f"`target_modules` names {lost}. {message}")
        targets = asked.target_modules
        reached = targets and any(check_target_module_exists(asked, key) for key in meant)
        if left and (reached or targets == "all-linear") and not asked.inference_mode:
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    def _experts_left(self, model: nn.Module, asked: AdapterConfig) -> list[str]:
        """The parameters of experts that are neither adapted nor excluded."""
        everything = _asking_for(asked, ".*")
        adapted = {f"{key}.{name}" for key, (_, names) in self._placed.items() for name in names}
        experts = {
            name: p for name, p in fused_parameters(model).items() if check_target_module_exists(everything, name)
        }
        return [key for name, names in experts.items() for p in names if (key := f"{name}.{p}") not in adapted]

    def _names_without_modules(self, asked: AdapterConfig) -> list[str]:
        targets = [] if isinstance(asked.target_modules, str) else sorted(asked.target_modules or [])
        return [target for target in targets if not any(_ends(key, target) for key in self._placed)]

    # -- merging ---------------------------------------------------------------------------------------------

    def _layers(self) -> Iterator[AdapterLayer]:
        return (module for module in self.model.modules() if isinstance(module, AdapterLayer))

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
        give = partial(_give_names, list(names), self._copies(kwargs))
        with ExitStack() as stack:
            for module in self.modules():
                if isinstance(module, (AdapterLayer, AuxiliaryTrainingWrapper)):
                    stack.callback(module.register_forward_pre_hook(give, with_kwargs=True).remove)
            yield

    def _check_names(self, names: list[str]) -> None:
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode. Call `eval()` first.")
        known = self._sample_names()
        if unknown := sorted(set(names) - known - {BASE}):
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. The model has {sorted(known)}."
            )

    def _sample_names(self) -> set[str]:
        """What a sample of a mixed batch may ask for."""
        return {name for layer in self._layers() for name in layer.adapters}

    def _copies(self, kwargs: dict[str, Any]) -> int:
        """How often `generate` repeats each sample, for beams or for several answers; not in an encoder."""
        config = kwargs.get("generation_config") or getattr(self.model, "generation_config", None)
        asked = [kwargs.get(n) or getattr(config, n, None) or 1 for n in ("num_beams", "num_return_sequences")]
        return max(asked)

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
        _refuse_broken(kept | _trained_whole(model, adapter_name, state_dict))
        own = {key for alias, key in first.items() if f".{cls.slot}.{adapter_name}." in alias}
        if lost := sorted(own - kept.keys()):
            raise ValueError(f"Tensors that the adapter's layers share are not in the state dict: {lost}.")
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
        cls._refuse_misfit(model, adapter_name, set(remapped))
        return remapped

    @classmethod
    def _refuse_misfit(cls, model: nn.Module, adapter_name: str, given: set[str]) -> None:
        """PEFT only warns of what a file lacks, and says nothing of what it has too much."""
        known = set(model.state_dict())
        missing = sorted(key for key in known - given if f".{cls.slot}.{adapter_name}." in key)
        known |= _first_names(model).keys()
        unknown = sorted(key for key in given - known if key.removeprefix("base_model.model.") not in known)
        if missing or unknown:
            raise ValueError(
                f"The saved adapter does not fit this model. It lacks {_some(missing)} and holds {_some(unknown)} too "
                "much: it was saved from another model or with other settings, or its file is damaged."
            )


def _repeated(model: nn.Module) -> dict[int, list[str]]:
    """The names of each module that stands in several others, or under several names in one."""
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, child in module._modules.items():
            names.setdefault(id(child), []).append(f"{prefix}.{name}".removeprefix("."))
    return {child: places for child, places in names.items() if len(places) > 1}


def _asking_for(config: AdapterConfig, targets: set[str] | str) -> AdapterConfig:
    """The same choice of layers, of other targets."""
    asking = copy(config)
    asking.target_modules = targets  # type: ignore[assignment]
    return asking


def _ends(key: str, name: str) -> bool:
    return f".{key}".endswith(f".{name}")


def _last_parts(keys: Iterable[str]) -> list[str]:
    return sorted({key.rpartition(".")[2] for key in keys})


def _refuse_attention(module: nn.Module, name: str) -> None:
    if isinstance(module, nn.MultiheadAttention):
        raise TypeError(
            f"Layer '{name}' belongs to a torch.nn.MultiheadAttention, which reads its weight without calling it: an "
            "adapter there would have no effect. Name it in `exclude_modules`."
        )


def _refuse_occupied(module: nn.Module, name: str) -> None:
    if isinstance(module, BaseTunerLayer):
        raise TypeError(
            f"Layer '{name}' already holds adapters of another type ({type(module).__name__}). Merge or unload them, "
            "or give both adapters different `target_modules`."
        )


def _refuse_split(weight: Any, name: str) -> None:
    if isinstance(weight, DTensor):
        raise TypeError(
            f"The weight of layer '{name}' is split over several devices (a DTensor). Put the adapters in before "
            "the model is sharded; tensor parallelism is not supported."
        )


def _some(keys: list[str], kind: str = "tensors") -> str:
    """The first of them, and how many."""
    return f"{len(keys)} {kind}" + (f" ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else "")


def _refuse_nested(layer: AdapterLayer, args: Any) -> None:
    if args[0].is_nested:
        raise ValueError(
            "Nested tensors, which torch makes of padded batches, cannot be adapted. Make the nn.TransformerEncoder "
            f"with enable_nested_tensor=False, to adapt its layer '{layer.site.name}'."
        )


def _give_names(
    names: list[str], copies: int, module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    x = args[0] if args else next(iter(kwargs.values()))
    if len(x) == len(names) * copies:
        names = [name for name in names for _ in range(copies)]
    return args, {**kwargs, "adapter_names": names}


def _name_once(adapter: Adapter, named: set[int]) -> None:
    """Let a state dict hold a shared module under the first of its names only, as every loader expects."""
    if id(adapter.shared) in named:
        adapter.register_state_dict_post_hook(_leave_shared_out)
        adapter.register_load_state_dict_pre_hook(_put_shared_in)
    named.add(id(adapter.shared))


def _leave_shared_out(adapter: Any, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    if FSDP_PREFIX in prefix:  # FSDP 1 insists on every name of a parameter
        return
    for name in _tensors(adapter.shared):
        state_dict.pop(f"{prefix}shared.{name}", None)


def _put_shared_in(adapter: Any, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name, tensor in _tensors(adapter.shared).items():  # loaded already, under the first name
        state_dict.setdefault(f"{prefix}shared.{name}", tensor.detach())


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _first_names(model: nn.Module) -> dict[str, str]:
    """For each name of a tensor inside `shared` modules, the name under which it comes first."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if prefix.endswith(".shared"):
            prefix = prefix.replace(FSDP_PREFIX, "")  # as in a state dict
            for name, tensor in _tensors(module).items():
                names[f"{prefix}.{name}"] = first.setdefault(id(tensor), f"{prefix}.{name}")
    return names


def _trained_whole(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that PEFT saves beside the adapter: of `modules_to_save`, and of trained tokens."""
    names = (name.replace(FSDP_PREFIX, "") for name, _ in model.named_parameters())
    mine = re.compile(rf".*\.(modules_to_save|trainable_tokens_delta)\.{re.escape(adapter_name)}(\..*)?")
    return {name: state_dict[name] for name in names if name in state_dict and mine.fullmatch(name)}


def _refuse_broken(tensors: dict[str, Tensor]) -> None:
    """Sharded training can hand out empty tensors, and a diverged run non-finite ones: refuse to save them."""
    for key, tensor in tensors.items():
        if isinstance(tensor, DTensor):  # and to look at it would wait for the others
            raise ValueError(
                f"Tensor '{key}' of the adapter is split over the processes of a sharded run. Save it whole: "
                "save_pretrained(folder, state_dict=...) with what accelerator.get_state_dict(model) gives."
            )
        if tensor.numel() == 0:
            raise ValueError(f"Tensor '{key}' of the adapter is empty; was the sharded model gathered before saving?")
        if tensor.device.type != "meta" and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"Tensor '{key}' of the adapter holds NaN or infinity; it is not saved.")


def _remember(model: nn.Module) -> Callable[[], None]:
    """What brings back the modules of a model, what of it is trained, and which adapters are active."""
    children = [(module, dict(module._modules)) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    active = [(module, module._active_adapter) for module in model.modules() if isinstance(module, AdapterLayer)]

    def undo() -> None:
        for module, before in children:
            module._modules.clear()
            module._modules.update(before)
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        for layer, names in active:
            layer._active_adapter = names

    return undo


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
_US = "hf_modular"  # marks the enum members that this package added, also in an earlier and broken import


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
        member.added_by = _US
    member = PeftType.__members__[name]
    same = PeftType(name) is PeftType[name] is getattr(PeftType, name) is member
    if not (same and member in list(PeftType) and hash(member) == hash(name) and member.value == name):
        raise PeftContractError(f"PEFT's enum of types does not take the new member {name!r} on this Python.")
    return member


def register(
    config_class: type[AdapterConfig], adapter_class: type[Adapter], kind: type[AdapterModel] = AdapterModel
) -> type[AdapterModel]:
    """Make the tuner of a method and register it with PEFT; importing again or reloading is harmless.

    `kind` is what the tuner is beside: for adapters that hold several tasks a `TasksModel`.

    Raises:
        PeftContractError: If the installed PEFT is not one that can be extended.
        PeftTypeConflictError: If the type is registered by somebody else.
    """
    check_contract()
    _check_method(adapter_class)
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
    model_class = type(f"{adapter_class.__name__}Model", (kind,), body)
    _refuse_conflict(type_name, config_class)
    member = add_peft_type(type_name)
    if member in PEFT_TYPE_TO_CONFIG_MAPPING:  # a reload: the new classes take the place of the old
        PEFT_TYPE_TO_CONFIG_MAPPING[member] = config_class
        PEFT_TYPE_TO_TUNER_MAPPING[member] = model_class
    else:
        register_peft_method(name=name, config_cls=config_class, model_cls=model_class, prefix=f"{name}_")
    keep_note_on_cards()
    return model_class


def _check_method(adapter_class: type[Adapter]) -> None:
    mathematics = ("delta", "transform", "forward")
    own = {name for name in mathematics if getattr(adapter_class, name) is not getattr(Adapter, name)}
    if not own or own >= {"delta", "transform"}:
        raise TypeError(
            "An adapter method defines one of `delta`, `transform` and `forward`, or `forward` beside one of the "
            f"others, but {adapter_class.__name__} defines {sorted(own) or 'none'}."
        )


def _refuse_conflict(type_name: str, config_class: type[AdapterConfig]) -> None:
    owner = PEFT_TYPE_TO_CONFIG_MAPPING.get(type_name)
    theirs = getattr(PeftType.__members__.get(type_name), "added_by", None) != _US
    if owner is None and type_name in PeftType.__members__ and theirs:
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
