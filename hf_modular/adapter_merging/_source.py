"""An adapter as merging sees it: what it changes of which layers, whether it lies in a model or in a folder."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_modular.adapter_merging._matrix import Matrix
from hf_modular.adapters._method import Site

PREFIX = "base_model.model."  # of every key in the file of a PEFT adapter


@dataclass(frozen=True, eq=False)
class Change:
    """What an adapter adds to a layer: to its weight as (out, in · kernel), and to its bias."""

    weight: Matrix
    bias: Tensor | None = None  # (out,)


class Source(Protocol):
    """One adapter."""

    @property
    def reference(self) -> str:
        """What it is called in messages."""
        ...

    @property
    def config(self) -> Any: ...

    @property
    def sites(self) -> Mapping[str, Site]:
        """The layers that it changes."""
        ...

    @property
    def whole(self) -> Mapping[str, Tensor]:
        """The tensors that were trained whole beside it, by their names in the base model."""
        ...

    @property
    def transposed(self) -> bool:
        """Whether its layers store their weights as (in, out)."""
        ...

    @property
    def dtype(self) -> torch.dtype: ...

    def change(self, name: str) -> Change: ...

    def tensors(self) -> dict[str, Tensor]:
        """Its parameters, as they are saved, without what was trained whole."""
        ...


class Base(Protocol):
    """The model that the adapters were trained on, as far as it is at hand."""

    def layer(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The weight (out, in, *kernel) and the bias of a layer."""
        ...

    def tensor(self, name: str) -> Tensor | None:
        """A tensor by its name; None if the model is not at hand."""
        ...

    def arranged(self, name: str, weight: Tensor) -> Tensor:
        """Another weight of a layer, as it stores them, as (out, in, *kernel)."""
        ...


# Settings of LoRA that make another function of the layer than W + scaling · B A.
_VARIANTS = {
    "alora_invocation_tokens": "acts on some tokens only",
    "arrow_config": "routes tokens between adapters",
    "kasa_config": "changes the base weights",
    "layer_replication": "repeats layers of the base model",
    "monteclora_config": "draws its weights at random",
    "target_parameters": "adapts parameters that are no layer's weight",
    "trainable_token_indices": "trains the embeddings of single tokens",
    "use_bdlora": "has block-diagonal matrices",
    "use_qalora": "pools its input",
}
_REWRITES_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga")


def refuse_variants(reference: str, config: Any) -> None:
    """Refuse an adapter whose effect is no change of weights, or a change of other base weights than the model's."""
    for setting, effect in _VARIANTS.items():
        if getattr(config, setting, None):
            raise ValueError(
                f"{reference} cannot be merged: with {setting}={getattr(config, setting)!r} it {effect}, which is no "
                "change of the weights of layers."
            )
    start = str(getattr(config, "init_lora_weights", ""))
    if _REWRITES_BASE.match(start):
        raise ValueError(
            f"{reference} cannot be merged: it belongs to base weights that its start, init_lora_weights={start!r}, "
            "has changed. Convert it first: save it with `path_initial_model_for_weight_conversion`."
        )


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype that holds all of these floating-point numbers; fp32 if there are none."""
    floating = [dtype for dtype in dtypes if dtype.is_floating_point]
    return reduce(torch.promote_types, floating) if floating else torch.float32


def all_sites(sources: Iterable[Source]) -> dict[str, Site]:
    """The layers that any of the adapters changes, in their order, each of one shape."""
    found: dict[str, tuple[str, Site]] = {}
    for source in sources:
        for name, site in source.sites.items():
            first, known = found.setdefault(name, (source.reference, site))
            if (known.weight_shape, known.kind) != (site.weight_shape, site.kind):
                raise ValueError(
                    f"The adapters must fit one base model, but layer '{name}' is {known.kind} "
                    f"{known.weight_shape} for {first}, and {site.kind} {site.weight_shape} for {source.reference}."
                )
    return {name: site for name, (_, site) in found.items()}


def differing_settings(configs: Sequence[Any], ignored: Iterable[str]) -> list[str]:
    """The settings in which configs of one type differ, beside those that do not matter."""
    first, *others = configs
    names = [f.name for f in fields(first) if f.name not in set(ignored)]
    return [n for n in names if any(getattr(first, n) != getattr(other, n) for other in others)]
