"""The layer that holds adapters: what every method shares, written once.

The base layer stays inside, untouched. A rewritten weight is put into it for one call with
`torch.func.functional_call`, so stride, padding, groups and hooks are the base layer's own; merging puts the very
same tensors there for good. Forward and merge therefore cannot disagree.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import QuantizationBackend, quantization_extra_repr
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_modular.adapters._layout import LINEAR, Layout, is_plain, layout_of
from hf_modular.adapters._method import Adapter, Site
from hf_modular.adapters._quantised import Taken, dequantised

BASE = "__base__"  # PEFT's name, in `adapter_names`, for samples without an adapter

Weights = tuple[Tensor, Tensor | None]


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A layer with adapters of one method, kept by name in one `ModuleDict`."""

    def __init__(self, base_layer: nn.Module, name: str, slot: str, backend: QuantizationBackend | None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = backend
        self._describe(name)
        self.adapter_layer_names = (slot,)
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._originals: Taken | None = None  # the base layer and its own parameters, while merged
        self.add_module(slot, nn.ModuleDict())

    def _describe(self, name: str) -> None:
        base, backend = self.base_layer, self.quantization_backend
        self.layout = layout_of_base(base, name, backend)
        self.site = Site(
            name,
            self._weight_shape(),
            getattr(base, "bias", None) is not None,
            self.layout.kind,
            backend is not None or is_plain(base),
            getattr(base, "groups", 1),
        )
        self.out_features, self.in_features = self.site.weight_shape[0], self._in_features()

    # -- adapters --------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> nn.ModuleDict:
        return getattr(self, self.adapter_layer_names[0])

    def sites(self, parameters: list[str]) -> list[Site]:
        """What a method makes an adapter for; `parameters` are those of a layer that is adapted inside."""
        return [self.site]

    def made(self, make: Callable[[Site], Adapter], parameters: list[str]) -> Adapter:
        """The adapter of all its sites."""
        return make(self.site)

    def add_adapter(self, adapter_name: str, adapter: Adapter) -> None:
        self.adapters[adapter_name] = adapter
        super()._move_adapter_to_device_of_base_layer(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """What PEFT calls when an adapter was loaded: it keeps the dtype in which it was saved."""
        target = device or self._get_base_layer_device_and_dtype(self.base_layer)[0]
        if adapter_name in self.adapters and target is not None and target.type != "meta":
            self.adapters[adapter_name].to(target)

    def _chosen(self, names: Iterable[str]) -> list[Adapter]:
        """The adapters of these names; the name of a task stands for the active adapter at that task."""
        found = [self._named(name) for name in names]
        return [adapter for adapter in found if adapter is not None]

    def _named(self, name: str) -> Adapter | None:
        adapters = self.adapters
        if name in adapters:
            return adapters[name]  # type: ignore[return-value]
        active = (adapters[adapter] for adapter in self.active_adapters if adapter in adapters)
        return next((adapter.at_task(name) for adapter in active if name in adapter.tasks), None)  # type: ignore

    # -- forward ---------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed_forward(x, args, kwargs, adapter_names)
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        return self._adapted(self._chosen(self.active_adapters), x, args, kwargs)

    def _adapted(self, adapters: list[Adapter], x: Tensor, args: Any, kwargs: Any) -> Tensor:
        if not adapters or any(adapter.direct for adapter in adapters):
            return self._act_on_output(adapters, x, self.base_layer(x, *args, **kwargs))
        self._check_present(x)
        if len(adapters) == 1 and adapters[0].on_linear and self._is_plain_linear():
            weight, bias = self._base_tensors()
            return adapters[0].linear(x, self.layout.to_canonical(weight), bias)
        return self._call_base(self._fold(adapters), x, args, kwargs)

    def _act_on_output(self, adapters: list[Adapter], x: Tensor, y: Tensor) -> Tensor:
        """Run the adapters one after the other on the output, the channels moved to the last axis."""
        if not adapters:
            return y
        dtype, channel = y.dtype, self.layout.channel
        out = y if channel == -1 else y.movedim(channel, -1)
        convolve = self._convolve if self.site.kind == "Conv" and self.site.plain else None
        for adapter in adapters:
            out = adapter(self._cast_input(x, adapter), out, convolve)
        return (out if channel == -1 else out.movedim(-1, channel)).to(dtype)

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.base_layer._conv_forward(x, weight, None)  # type: ignore[operator]

    def _cast_input(self, x: Tensor, adapter: Adapter) -> Tensor:
        parameter = first_parameter(adapter)
        if parameter is None or parameter.dtype == x.dtype or not x.is_floating_point():
            return x
        return self._cast_input_dtype(x, parameter.dtype)

    def _mixed_forward(self, x: Tensor, args: Any, kwargs: Any, names: list[str]) -> Tensor:
        """Each sample of the batch with the adapter of its name; the first axis of `x` is the batch."""
        self._check_mixed(x, names)
        groups = self._groups(names)
        if all(adapter.direct for chosen, _ in groups for adapter in chosen):
            y = self.base_layer(x, *args, **kwargs)
            if len(groups) == 1:  # and so all samples in their order
                return self._act_on_output(groups[0][0], x, y)
            for chosen, index in groups:
                y[index] = self._act_on_output(chosen, x[index], y[index])
            return y
        parts = [self._adapted(chosen, x[index], args, kwargs) for chosen, index in groups]
        y = parts[0].new_empty((len(names), *parts[0].shape[1:]))
        for (_, index), part in zip(groups, parts, strict=True):
            y[index] = part.to(y.dtype)
        return y

    def _groups(self, names: list[str]) -> list[tuple[list[Adapter], list[int]]]:
        """The samples that are treated in one go: those of one name, or of several tasks of an adapter that mixes."""
        mixing = next((adapter for adapter in self._chosen(self.active_adapters) if adapter.mixes), None)
        tasks = set() if mixing is None else {name for name in names if name in mixing.tasks}
        rows: dict[str | None, list[int]] = {}  # None: of all tasks
        for i, name in enumerate(names):
            rows.setdefault(None if len(tasks) > 1 and name in tasks else name, []).append(i)
        return [(self._of_samples(name, mixing, [names[i] for i in index]), index) for name, index in rows.items()]

    def _of_samples(self, name: str | None, mixing: Any, names: list[str]) -> list[Adapter]:
        if name is None:
            return [mixing.at_tasks(names)]
        return [] if name == BASE else self._chosen([name])

    def _check_mixed(self, x: Tensor, names: list[str]) -> None:
        # the first sentences are PEFT's, which callers know
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first. "
                f"Layer '{self.site.name}' has merged {self.merged_adapters}."
            )
        if x.shape[0] != len(names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} names for an input of shape {tuple(x.shape)} in layer '{self.site.name}'."
            )

    def _is_plain_linear(self) -> bool:
        """Whether calling the base layer is no more than a frozen matrix product: no quantisation, no hooks."""
        base = self.base_layer
        hooked = base._forward_hooks or base._forward_pre_hooks
        return type(base) in (nn.Linear, Conv1D) and not hooked and not base.weight.requires_grad

    # -- the rewritten weight --------------------------------------------------------------------------------

    def _check_present(self, x: Tensor) -> None:
        """Offloading and ZeRO-3 bring a weight when its layer is called, and here it is read before."""
        if any(weight.numel() == 0 or (weight.is_meta and not x.is_meta) for weight in self._read_in_forward()):
            raise ValueError(
                f"The weight of layer '{self.site.name}' is not in memory (offloaded or partitioned), but its adapter "
                "has to read it. Load the model without offloading or ZeRO-3, or use a method that acts on the output."
            )

    def _read_in_forward(self) -> list[Tensor]:
        weight = self.base_layer._parameters.get("weight")
        return [] if weight is None else [weight]

    def _fold(self, adapters: Iterable[Adapter], base: Weights | None = None) -> Weights:
        """The layer's weight (as the layer stores it) and bias after the adapters in their order."""
        weight, bias = self._base_tensors() if base is None else base
        dtype, bias_dtype = weight.dtype, weight.dtype if bias is None else bias.dtype
        weight, bias = self.layout.canonical(at_least_fp32(weight)), at_least_fp32(bias)
        for adapter in adapters:
            weight, bias = adapter.transform(weight, bias)
        return self.layout.stored(weight).to(dtype), None if bias is None else bias.to(bias_dtype)

    def _base_tensors(self) -> Weights:
        bias = getattr(self.base_layer, "bias", None)
        if self.quantization_backend is not None:
            return dequantised(self.base_layer, self.quantization_backend), bias
        return self.base_layer.weight, bias  # type: ignore[return-value]

    def _weight_shape(self) -> tuple[int, ...]:
        if self.quantization_backend is not None:
            return (self.base_layer.out_features, self.base_layer.in_features)  # type: ignore[return-value]
        return tuple(self.layout.canonical(self.base_layer.weight.detach()).shape)  # type: ignore[operator]

    def _in_features(self) -> int:
        shape = self.site.weight_shape
        return shape[0] if self.site.is_norm else shape[1] * self.site.groups

    def _call_base(self, tensors: Weights, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        weight, bias = tensors
        if self.quantization_backend is not None:
            return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        if bias is None or self.site.has_bias:
            named = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
            return call_with(self.base_layer, named, (x, *args), kwargs)
        y = call_with(self.base_layer, {"weight": weight}, (x, *args), kwargs)
        return (y.movedim(self.layout.channel, -1) + bias).movedim(-1, self.layout.channel).to(y.dtype)

    # -- merging ---------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the rewritten weight into the base layer.

        The layer's own parameters are set aside and come back, bit for bit, with `unmerge`.

        Raises:
            ValueError: If an adapter cannot be merged, or, with `safe_merge`, if the merged weight would hold NaN
                or infinity. Nothing is changed then.
        """
        names = self._to_merge(adapter_names)
        if not names:
            return
        tensors = self._merged_tensors(names, safe_merge)
        if self._originals is None:
            self._originals = Taken.of(self.base_layer)
        self._put(tensors, self._originals)
        self.merged_adapters.extend(names)

    def check_merge(self, adapter_names: list[str] | None = None, *, finite: bool = True) -> None:
        """Raise what a merge of these adapters would raise, changing nothing."""
        if names := self._to_merge(adapter_names):
            self._merged_tensors(names, finite)

    def unmergeable(self, adapter_names: Iterable[str]) -> str | None:
        """Why one of these adapters cannot be merged into this layer; None if all can."""
        if self.quantization_backend is not None and not self.quantization_backend.supports_merge:
            return f"its {self.quantization_backend.backend_name} weight cannot be written"
        reasons = (adapter.unmergeable() for adapter in self._chosen(adapter_names))
        return next((reason for reason in reasons if reason), None)

    def _to_merge(self, adapter_names: list[str] | None) -> list[str]:
        return [n for n in check_adapters_to_merge(self, adapter_names) if n in self.adapters]

    @torch.no_grad()
    def _merged_tensors(self, names: list[str], finite: bool) -> Weights:
        if reason := self.unmergeable(names):
            raise ValueError(f"Layer '{self.site.name}' cannot be merged: {reason}.")
        adapters = self._chosen([*self.merged_adapters, *names])
        training = [(a, a.training) for a in adapters]
        try:
            for adapter in adapters:
                adapter.eval()  # no dropout in a merged weight
            # from the original weight, not from the one already merged: one rounding however many steps
            tensors = self._fold(adapters, self._original_tensors())
        finally:
            for adapter, mode in training:
                adapter.train(mode)
        if finite:
            self._check_finite(names, tensors)
        return tensors

    def _original_tensors(self) -> Weights | None:
        if self._originals is None:
            return None
        merged = Taken.of(self.base_layer)
        self.base_layer = self._originals.put_back()
        try:
            return self._base_tensors()
        finally:
            self.base_layer = merged.put_back()

    def _check_finite(self, names: list[str], tensors: Weights) -> None:
        if not all(t is None or bool(torch.isfinite(t).all()) for t in tensors):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken: merging it "
                f"into layer '{self.site.name}' would give NaN or infinity. Nothing was merged."
            )

    def _put(self, tensors: Weights, old: Taken) -> None:
        weight, bias = tensors
        if self.quantization_backend is not None:
            self.set_base_weight(weight)  # which may make another base layer (HQQ)
        else:
            self.base_layer.weight = parameter_like(old.parameters["weight"], weight)
        if bias is not None and self.site.has_bias:
            self.base_layer.bias = parameter_like(old.parameters["bias"], bias)

    def unmerge(self) -> None:
        """Put the base layer's own parameters back: the same objects, so the same bits and the same ties."""
        if self._originals is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.base_layer = self._originals.put_back()
        self._originals = None
        self.merged_adapters.clear()

    def get_delta_weight(self, adapter_name: str) -> Tensor:  # as the layer stores it
        """What merging this adapter alone would add to the weight, in fp32 or better."""
        with torch.no_grad():
            weight, bias = self._original_tensors() or self._base_tensors()
            weight = self.layout.canonical(at_least_fp32(weight))
            after, _ = self._chosen([adapter_name])[0].transform(weight, at_least_fp32(bias))
            return self.layout.to_stored(after - weight)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` can approximate the adapter: it changes a matrix, and nothing else."""
        adapters = self._chosen([adapter_name])
        alone = not self.site.has_bias or all(type(adapter).delta is not Adapter.delta for adapter in adapters)
        return self.site.kind == "Linear" and bool(adapters) and alone and self.unmergeable([adapter_name]) is None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdapterLayer":
        """What moves or casts the layer while it is merged takes along the tensors that are set aside."""
        if self._originals is not None:
            merged = Taken.of(self.base_layer)
            self._originals.put_back()._apply(fn)
            self._originals = Taken.of(self._originals.layer)
            merged.put_back()
        return super()._apply(fn, recurse)

    # -- being a good layer ----------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """What a model asks its layer for (in_features, padding_idx, eps, ...) is the base layer's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return f"{self.adapter_layer_names[0].removesuffix('_adapter')}.{super().__repr__()}"


class AdapterLinear(AdapterLayer):
    """The same on a linear layer; PEFT's "all-linear" looks for the word in the class's name."""


def wrap(base_layer: nn.Module, name: str, slot: str, backend: QuantizationBackend | None) -> AdapterLayer:
    """A layer that holds adapters around `base_layer`.

    Raises:
        TypeError: If the layer is of a kind that cannot be adapted; the message names it.
    """
    linear = layout_of_base(base_layer, name, backend).kind == "Linear"
    return (AdapterLinear if linear else AdapterLayer)(base_layer, name, slot, backend)


def layout_of_base(base_layer: nn.Module, name: str, backend: QuantizationBackend | None) -> Layout:
    if backend is None:
        return layout_of(base_layer, name)
    if backend.layer_type != "linear":
        raise TypeError(f"Layer '{name}' is a quantised {backend.layer_type}; only linear ones can be adapted.")
    return LINEAR


def call_with(layer: nn.Module, tensors: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
    """Call a layer with these tensors in the place of its own."""
    # FSDP 1 shadows a layer's parameters by attributes, which `functional_call` passes by without a word
    shadows = {name: layer.__dict__[name] for name in tensors if name in layer.__dict__}
    if not shadows:
        return torch.func.functional_call(layer, tensors, args, kwargs)
    layer.__dict__.update(tensors)
    try:
        return layer(*args, **kwargs)
    finally:
        for name in tensors:
            del layer.__dict__[name]
        layer.__dict__.update(shadows)


def first_parameter(module: nn.Module) -> nn.Parameter | None:
    """As `next(module.parameters())`, which takes as long as a small layer."""
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter
    found = (first_parameter(child) for child in module._modules.values() if child is not None)
    return next((parameter for parameter in found if parameter is not None), None)


def at_least_fp32(tensor: Any) -> Any:
    return None if tensor is None else tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def parameter_like(old: nn.Parameter | None, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new.contiguous(), requires_grad=old is not None and old.requires_grad)
