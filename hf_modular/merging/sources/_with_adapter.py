"""A base model and an adapter as one source of a merge: which tensors there are, and which of them are computed.

Where the adapter changes only one of several weights that the model ties, they are stored apart and the config says
so; merging in place, as PEFT does, would change all of them, and the result would not be the model with the adapter.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftType
from torch import Tensor

from hf_modular.checkpoints import StoredTensor
from hf_modular.merging.sources._adapted import Adapted, prefix_of
from hf_modular.merging.sources._adapter_folder import PREFIX, AdapterFolder
from hf_modular.merging.sources._architecture import architecture
from hf_modular.merging.sources._computed import ComputedCheckpoint, Group, free_at_once
from hf_modular.merging.sources._outline import Outline, outline
from hf_modular.merging.sources._sources import PROCESSING_FILES, Source, files

_SNAPSHOT = re.compile(r"models--(?P<id>[^/]+)/snapshots/")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def with_adapter(base: Source, reference: str, folder: Path, commit: str | None, *, any_base: bool) -> Source:
    """The base with an adapter merged into it, tensor by tensor as they are asked for."""
    free_at_once()
    adapter = AdapterFolder(reference, folder)
    if why := adapter.refusal():
        raise ValueError(why)
    adapted, changes = _fitted(base, adapter)
    result = _Result(base, adapted, changes)
    computed = base.weights.groups if isinstance(base.weights, ComputedCheckpoint) else {}
    all_files = [*base.weights.files, *adapter.weights.files]
    weights = ComputedCheckpoint(base.folder, all_files, result.tensors, {**computed, **result.groups})
    pinned = f"{reference.partition('@')[0]}@{commit}" if commit else reference
    return replace(
        base,
        reference=f"{base.reference}+{reference}",
        weights=weights,
        pin=f"{base.pinned}+{pinned}",
        changes=base.changes | result.changes,
        prepared_in=folder if any(files(folder, PROCESSING_FILES)) else base.prepared_in,
        problems=[*base.problems, *([] if any_base else _other_base(base, adapter)), *adapted.refusals()],
        notes=[*base.notes, *_base_notes(base, adapter), *adapted.notes, *result.notes],
        about=base.about | {"adapter": _described(adapter, adapted)},
        parts=(base, folder),
    )


def _described(adapter: AdapterFolder, adapted: Adapted) -> dict[str, Any]:
    rank, kind = getattr(adapter.config, "r", None), type(adapted.outline.model).__name__
    return {
        "peft_type": adapter.kind,
        "layers": len(adapted.layers),
        "model_class": kind,
        **({"rank": rank} if rank else {}),
    }


# ---- which model the adapter belongs to


def _fitted(base: Source, adapter: AdapterFolder) -> tuple[Adapted, dict[str, Any]]:
    """The adapter on an outline of the class that it was trained on, and what the config must say differently."""
    if not base.config:
        raise ValueError(f"{base.reference} has no config.json, without which an adapter cannot be merged into it")
    if base.config.get("architectures") and not architecture(base.config).shapes:
        raise ValueError(f"transformers cannot make a model of the config of {base.reference}")
    named = [*(base.config.get("architectures") or [])[:1], adapter.model_class]
    _check_ranks(base, adapter)
    kinds = [kind for name in dict.fromkeys(named) if (kind := _class(name)) is not None]
    if not kinds:
        raise ValueError(f"transformers has none of the classes {named} of {base.reference}")
    lacking: list[str] = []
    for kind in kinds:
        if getattr(kind, "config_class", None) and kind.config_class.model_type != base.config.get("model_type"):
            continue
        found = _outline(base, kind, {})
        lacking = [*_lacking(found, adapter)]
        if not lacking:
            changes = _resized(found, adapter) | _renamed_class(base, found, adapter)
            found = _outline(base, kind, changes) if changes else found
            _check_shapes(base, found, adapter)
            return Adapted(adapter, found, partial(_read, base)), changes
    raise ValueError(f"{adapter.reference} ({adapter.kind}) does not fit {base.reference}: it has no {lacking[:3]}")


def _class(name: Any) -> Any:
    """A model class of transformers; None for any other name."""
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    return kind if hasattr(kind, "config_class") or hasattr(kind, "_model_mapping") else None


def _check_ranks(base: Source, adapter: AdapterFolder) -> None:
    """No rank is larger than every side of every tensor: to set one up would take all memory there is."""
    tensors = [*base.weights.tensors.values(), *adapter.weights.tensors.values()]
    largest = max(side for tensor in tensors for side in (*tensor.shape, 1))
    ranks = (getattr(adapter.config, "r", 0), *(getattr(adapter.config, "rank_pattern", None) or {}).values())
    for rank in ranks:
        if isinstance(rank, int) and rank > largest:
            raise ValueError(
                f"{adapter.reference} has r={rank}, which must not be larger than {largest}, the largest side "
                "of a tensor"
            )


def _outline(base: Source, kind: type, changes: Mapping[str, Any]) -> Outline:
    removed = {key: value for key, value in base.changes.items() if value is not None}
    return outline(base.folder, kind, base.weights.tensors, {**removed, **changes}, base.reference)


def _lacking(found: Outline, adapter: AdapterFolder) -> Iterator[str]:
    """What the adapter's file names and the model has not."""
    modules = {name for name, _ in found.model.named_modules()}
    part = re.compile(rf"\.({re.escape(prefix_of(adapter.config))}|token_adapter\.|trainable_tokens_)")
    for stored, name in adapter.names.items():
        layer = part.split(name)[0]
        if stored.startswith(PREFIX) and name not in found.shapes and (layer == name or layer not in modules):
            yield name


def _resized(found: Outline, adapter: AdapterFolder) -> dict[str, Any]:
    """The settings that give the model the vocabulary and the classes with which the adapter was trained."""
    embeddings = (found.model.get_input_embeddings(), found.model.get_output_embeddings())
    vocabulary = {id(layer.weight) for layer in embeddings if layer is not None and hasattr(layer, "weight")}
    names = {name for key, name in found.names.items() if key in vocabulary}
    changes: dict[str, Any] = {}
    for stored, name in adapter.names.items():
        there, shape = adapter.weights.tensors[stored].shape, found.shapes.get(name)
        if shape is None or there == shape or there[1:] != shape[1:]:
            continue
        if name in names:
            changes["vocab_size"] = there[0]
        else:
            labels = {i: f"LABEL_{i}" for i in range(there[0])}
            changes |= {"id2label": labels, "label2id": {label: i for i, label in labels.items()}}
    return changes


def _renamed_class(base: Source, found: Outline, adapter: AdapterFolder) -> dict[str, Any]:
    """The class, if the adapter brings what only another class than that of the base has."""
    kind, brought = type(found.model).__name__, set(adapter.names.values()) & found.shapes.keys()
    other = kind != next(iter(base.config.get("architectures") or []), kind)
    return {"architectures": [kind]} if other and any(found.origin(name) is None for name in brought) else {}


def _check_shapes(base: Source, found: Outline, adapter: AdapterFolder) -> None:
    brought = {name: adapter.weights.tensors[stored].shape for stored, name in adapter.names.items()}
    for name, shape in found.shapes.items():
        origin = found.origin(name)
        stored = None if origin is None or origin.converter else base.weights.tensors[origin.stored[0]].shape
        there = brought.get(name, stored)
        if there is not None and tuple(there) != shape:
            raise ValueError(
                f"{adapter.reference} does not fit {base.reference}: {name} must be {shape}, but is {tuple(there)}"
            )


def _read(base: Source, stored: str) -> Tensor:
    info = base.weights.tensors[stored]
    out = torch.empty(info.numel, dtype=torch.promote_types(info.dtype, torch.float32))
    base.fill(stored, 0, out)
    return out.view(info.shape)


# ---- what the merged model stores


@dataclass(frozen=True, eq=False)
class _Result:
    """The tensors of the merged model."""

    base: Source
    adapted: Adapted
    changes: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def outline(self) -> Outline:
        return self.adapted.outline

    @cached_property
    def whole(self) -> dict[str, str]:
        """What is taken from the adapter's file as it is: the name in the model -> the name in the file."""
        in_layers = {origin for layer in self.adapted.layers.values() for _, _, origin in layer}
        return {name: stored for name, stored in self.adapted.whole.items() if name not in in_layers}

    @cached_property
    def changed(self) -> dict[str, str]:
        """The weights in layers with the adapter -> the weight of the model that each of them is, or is tied to."""
        own = {own: origin for layer in self.adapted.layers.values() for _, own, origin in layer}
        return own | {name: name for name in self.whole}

    @cached_property
    def apart(self) -> dict[str, str]:
        """The weights that must be stored apart although the base ties them -> the weight that they were tied to."""
        found: dict[str, str] = {}
        for main in {self.outline.tied.get(name, name) for name in (*self.changed, *self.changed.values())}:
            members = {main, *(name for name, other in self.outline.tied.items() if other == main)}
            touched = members & self.changed.keys()
            if touched and not (touched == members and self._changes_alike):
                found |= dict.fromkeys(sorted(members - {main}), main)
        if found:
            self.changes["tie_word_embeddings"] = False
            self.notes.append(f"{', '.join(found)} is stored apart: the adapter changes what it was tied to")
        return found

    @property
    def _changes_alike(self) -> bool:
        """Whether what it does to tied weights is the same for all of them."""
        config = self.adapted.adapter.config
        tokens = getattr(config, "trainable_token_indices", None) or config.peft_type == PeftType.TRAINABLE_TOKENS
        return bool(getattr(config, "ensure_weight_tying", False) or tokens)

    @cached_property
    def groups(self) -> dict[str, tuple[str, Group]]:
        """What is computed, and by what."""
        found: dict[str, tuple[str, Group]] = {}
        for layer, weights in self.adapted.layers.items():
            names = {own: self._stored(own) for _, own, _ in weights if own in self.apart or own not in self._others}
            compute = partial(self._layer, layer, names)
            found |= {stored: (layer, compute) for those in names.values() for stored in those}
        for name, held in self.whole.items():
            stored = self._stored(name)
            if len(stored) > 1 or self._planned(name, stored[0]) != self.adapted.adapter.weights.tensors[held].dtype:
                found |= {each: (held, partial(self._converted, name, held)) for each in stored}
        return found

    @cached_property
    def _others(self) -> set[str]:
        """Weights that are tied to one that is stored for them, and stay so."""
        return {name for name in self.outline.tied if name not in self.apart}

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """What a header would say of the tensors."""
        stored = self.base.weights.tensors
        dropped = set(self.outline.unknown) if "architectures" in self.changes else set()
        found = {name: tensor for name, tensor in stored.items() if name not in dropped}
        for name, main in self.apart.items():
            found[name] = stored[self._stored(main)[0]]
        for name in self.groups.keys() & self.outline.shapes.keys():  # an embedding may have grown
            found[name] = replace(found[name], shape=self.outline.shapes[name])
        file = self.adapted.adapter.weights.tensors
        for name, held in self.whole.items():
            for each in self._stored(name):
                shape = stored[each].shape if len(self._stored(name)) > 1 else file[held].shape
                place = file[held]
                found[each] = StoredTensor(self._planned(name, each), shape, place.file, place.start)
        return found

    def _stored(self, name: str) -> list[str]:
        """The names under which a weight is stored."""
        if name in self.apart:
            return [name]
        origin = self.outline.origin(name)
        return origin.stored if origin else [name]

    def _planned(self, name: str, stored: str) -> torch.dtype:
        """The dtype of the result: that of the base, or where it has no such tensor, of the file."""
        there = self.base.weights.tensors.get(stored)
        return there.dtype if there else self.adapted.adapter.weights.tensors[self.whole[name]].dtype

    def _layer(self, layer: str, names: Mapping[str, list[str]]) -> dict[str, Tensor]:
        merged = self.adapted.merged(layer)
        found: dict[str, Tensor] = {}
        for name in names:
            found |= {name: merged[name]} if name in self.apart else self.outline.restore(name, merged[name])
        return found

    def _converted(self, name: str, held: str) -> dict[str, Tensor]:
        value = self.adapted.adapter.weights.read(held)
        return {name: value} if name in self.apart else self.outline.restore(name, value)


# ---- whether the adapter was trained on this base


def _other_base(base: Source, adapter: AdapterFolder) -> Iterator[str]:
    """A problem if the adapter names another base than this one."""
    named, given = adapter.config.base_model_name_or_path, _identity(base)
    if named and given and (trained_on := _identity_of(named)) and trained_on != given:
        yield (
            f"{adapter.reference} was trained on {named}, not on {base.reference}: give that base, or say "
            "`adapter_base: any` if it is meant for this one, too"
        )


def _base_notes(base: Source, adapter: AdapterFolder) -> Iterator[str]:
    named = adapter.config.base_model_name_or_path
    if named and not (_identity(base) and _identity_of(named)):
        yield f"{adapter.reference} was trained on {named}; whether {base.reference} is that was not checked"


def _identity(base: Source) -> str | None:
    return _identity_of(base.reference) or _identity_of(str(base.folder))


def _identity_of(name: str) -> str | None:
    """What two names of one model have in common: a repository of the Hub, or a folder that is here."""
    folder = Path(name).expanduser()
    if found := _SNAPSHOT.search(folder.resolve().as_posix()):
        return found["id"].replace("--", "/", 1)
    if folder.is_dir():
        return str(folder.resolve())
    name = name.partition("@")[0]
    return name if _HUB_ID.fullmatch(name) else None
