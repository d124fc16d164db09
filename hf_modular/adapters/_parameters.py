"""Adapters on bare parameters: the experts of a mixture, which transformers keeps in one tensor (experts, out, in).

Each expert is a layer of its own, with an adapter of its own; their parameters are stacked as those of the experts
are, and the mathematics of the method runs over all of them at once.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hf_modular.adapters._layer import AdapterLayer, at_least_fp32, call_with, parameter_like
from hf_modular.adapters._layout import LINEAR
from hf_modular.adapters._method import Adapter, Site
from hf_modular.adapters._quantised import Taken

# What the matrices of an expert were called when each of them was a layer (transformers 4).
FORMER_NAMES = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


class ParameterLayer(AdapterLayer):
    """A module some of whose parameters are adapted, wherever it uses them."""

    def _describe(self, name: str) -> None:
        self.layout = LINEAR
        self.site = Site(name, (), False, "Parameters", plain=False)
        self.parameter_names: list[str] = []  # those that an adapter was put on

    # -- adapters --------------------------------------------------------------------------------------------

    def sites(self, parameters: list[str]) -> list[Site]:
        return [site for name in parameters for site in self._sites_of(name)]

    def made(self, make: Callable[[Site], Adapter], parameters: list[str]) -> Adapter:
        adapter = ParametersAdapter({name: self._made_for(name, make) for name in parameters})
        self.parameter_names += [name for name in parameters if name not in self.parameter_names]
        return adapter

    def _made_for(self, name: str, make: Callable[[Site], Adapter]) -> Adapter:
        adapters = [make(site) for site in self._sites_of(name)]
        _require_rewriting(adapters[0], f"{self.site.name}.{name}")
        return stacked(adapters) if self.parameter(name).ndim == 3 else adapters[0]

    def _sites_of(self, name: str) -> list[Site]:
        """The experts' matrices, named as if each expert were a module; the parameter itself if it is a matrix."""
        shape = tuple(self._canonical(name, self.parameter(name)).shape)
        if len(shape) == 2:
            return [Site(f"{self.site.name}.{name}", shape, False, plain=False)]
        return [Site(f"{self.site.name}.{i}.{name}", shape[1:], False, plain=False) for i in range(shape[0])]

    def parameter(self, name: str) -> Tensor:
        """The base layer's own."""
        return self.base_layer._parameters[name]  # type: ignore[return-value]

    def _canonical(self, name: str, weight: Tensor) -> Tensor:
        """(out, in) or (experts, out, in), and back."""
        return weight.transpose(1, 2) if weight.ndim == 3 and is_transposed(self.base_layer) else weight

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        first = next(base_layer.parameters(recurse=False))
        return first.device, first.dtype

    # -- the rewritten parameters ----------------------------------------------------------------------------

    def _read_in_forward(self) -> list[Tensor]:
        return [self.parameter(name) for name in self.parameter_names]

    def _mixed_forward(self, x: Tensor, args: Any, kwargs: Any, names: list[str]) -> Tensor:
        raise ValueError(
            f"Layer '{self.site.name}' is adapted by its parameters and sees tokens, not samples: `adapter_names` "
            "cannot be used together with `target_parameters`."
        )

    def __getattr__(self, name: str) -> Any:
        """Whoever takes an adapted parameter from outside gets it as the module itself does."""
        if name not in self.__dict__.get("parameter_names", ()):
            return super().__getattr__(name)
        idle = self.merged or self.disable_adapters
        return self._folded(name, self.parameter(name), [] if idle else self._chosen(self.active_adapters))

    def _base_tensors(self) -> tuple[Tensor, ...]:  # type: ignore[override]  # as many as there are
        return tuple(self._read_in_forward())

    def _fold(  # type: ignore[override]
        self, adapters: Iterable[Adapter], base: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, ...]:
        weights = self._base_tensors() if base is None else base
        return tuple(self._folded(*pair, list(adapters)) for pair in zip(self.parameter_names, weights, strict=True))

    def _folded(self, name: str, weight: Tensor, adapters: list[Adapter]) -> Tensor:
        chosen = [adapter for adapter in adapters if name in adapter._modules]
        if not chosen:
            return weight
        folded = at_least_fp32(self._canonical(name, weight))
        for adapter in chosen:
            folded = adapter.rewritten(name, folded)  # type: ignore[operator]
        return self._canonical(name, folded).to(weight.dtype)

    def _call_base(self, tensors: tuple[Tensor, ...], x: Tensor, args: Any, kwargs: Any) -> Tensor:  # type: ignore[override]
        named = dict(zip(self.parameter_names, tensors, strict=True))
        return call_with(self.base_layer, named, (x, *args), kwargs)

    def _put(self, tensors: tuple[Tensor, ...], old: Taken) -> None:  # type: ignore[override]
        for name, tensor in zip(self.parameter_names, tensors, strict=True):
            setattr(self.base_layer, name, parameter_like(old.parameters[name], tensor))

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        raise TypeError(f"Layer '{self.site.name}' is adapted by several parameters and has no one change of weight.")


class ParametersAdapter(Adapter):
    """The adapters of the parameters of one module, by their names."""

    def __init__(self, adapters: dict[str, Adapter]) -> None:
        nn.Module.__init__(self)
        for name, adapter in adapters.items():
            self.add_module(name, adapter)

    def rewritten(
        self,
        name: str,
        weight: Tensor,  # (out, in) or (experts, out, in)
    ) -> Tensor:
        """The parameter `name` as it is used."""
        if weight.ndim == 2:
            return self(name, weight)
        own = [*self.named_parameters(), *self.named_buffers()]
        tensors = {key: t for key, t in own if key.startswith(f"{name}.") and not key.startswith(f"{name}.shared.")}
        return torch.vmap(self._of_expert, in_dims=(None, 0, 0), randomness="different")(name, weight, tensors)

    def _of_expert(self, name: str, weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(self, tensors, (name, weight))

    def forward(self, name: str, weight: Tensor) -> Tensor:  # type: ignore[override]  # (out, in)
        return self._modules[name].transform(weight, None)[0]  # type: ignore[union-attr,operator]

    def unmergeable(self) -> str | None:
        return None


def stacked(adapters: list[Adapter]) -> Adapter:
    """One module with the tensors of all of them (n, ...) under the names that each has; shared ones stay as they are.

    Raises:
        ValueError: If the adapters are of different shapes.
    """
    first = adapters[0]
    for name, tensor in [*first.named_parameters(), *first.named_buffers()]:
        if not name.startswith("shared."):
            owner = first.get_submodule(name.rpartition(".")[0])
            tensors = [_tensor(adapter, name).detach() for adapter in adapters]
            _require_one_shape(name, tensors)
            kind = nn.Parameter if isinstance(tensor, nn.Parameter) else nn.Buffer
            setattr(owner, name.rpartition(".")[2], kind(torch.stack(tensors)))
    return first


def _tensor(adapter: Adapter, name: str) -> Tensor:
    place, _, last = name.rpartition(".")
    return getattr(adapter.get_submodule(place), last)


def _require_rewriting(adapter: Adapter, name: str) -> None:
    several = "it holds the adapters of several tasks" if adapter.tasks else None
    if reason := adapter.unmergeable() or several:
        raise TypeError(
            f"{type(adapter).__name__} cannot adapt the bare parameter '{name}': {reason}. Leave it out of "
            "`target_parameters`."
        )


def _require_one_shape(name: str, tensors: list[Tensor]) -> None:
    if len(shapes := {tuple(tensor.shape) for tensor in tensors}) > 1:
        raise ValueError(
            f"All experts of a parameter need the same rank, but '{name}' has the shapes {sorted(shapes)}."
        )


# -- which parameters there are --------------------------------------------------------------------------------------


def is_transposed(experts: nn.Module) -> bool:
    """Whether the experts' matrices are stored as (experts, in, out)."""
    marked = getattr(experts, "is_transposed", None)  # by transformers, for most of its classes
    if marked is not None:
        return bool(marked)
    first, last = (experts._parameters.get(name) for name in ("gate_up_proj", "down_proj"))
    if first is None or last is None:
        return False
    # what goes into the first matrices comes out of the last ones
    return first.shape[1] == last.shape[2] and first.shape[2] != last.shape[1]


def fused_parameters(model: nn.Module) -> dict[str, list[str]]:
    """The modules of a model that hold experts, and their parameters (experts, ..., ...)."""
    held = {name: module for name, module in model.named_modules() if "expert" in type(module).__name__.lower()}
    found = {
        name: [n for n, p in module.named_parameters(recurse=False) if p.ndim == 3] for name, module in held.items()
    }
    return {bare_name(name): names for name, names in found.items() if names}


def bare_name(name: str) -> str:
    """The module's name in the base model."""
    return name.replace(".base_layer", "")
