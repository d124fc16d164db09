"""What transformers knows of a model by its config: built with shapes but without memory, and asked.

Of an architecture that transformers does not have, nothing is known. No code of a repository is run.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from hf_modular.merging.sources._dotted import at, changed, parent_of

MAX_LAYERS = 2000  # a config that claims more is not built: it would take hours

_COUNTS = re.compile("layers?$|blocks?$|depth|stages")  # keys of how many layers there are
_VOCABULARY = "vocab_size"
_LAYERS = "num_hidden_layers"
_OF_LAYERS = re.compile("layer|block|head|types|pattern|multiplier|ffn|mlp|window")  # keys of lists with layers' items
_NUMBER = re.compile(r"(?:^|\.)(\d{1,9})\.")


@dataclass(frozen=True)
class Architecture:
    """A model as transformers would build it; empty where it cannot.

    Args:
        shapes: The shape of each tensor by its name, in the order in which the model has them.
        tied: A name -> the one that is stored for it.
        ignored: Patterns of names that are not part of the model.
        made: Patterns of names that the model makes itself where they are not stored.
        backbone: What names of everything but the head begin with, without the dot; empty if not all do.
        head: The names of the head, where they do not.
        vocabulary: The tensors whose first axis is the vocabulary.
        vocabulary_key: What the config calls the size of the vocabulary, with dots where it is in a part of it.
        config: The config with all its defaults.
        keys: Common names of settings -> the config's own, such as "num_hidden_layers" -> "n_layer".
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    ignored: Sequence[str] = ()
    made: Sequence[str] = ()
    backbone: str = ""
    head: frozenset[str] = frozenset()
    vocabulary: frozenset[str] = frozenset()
    vocabulary_key: str = _VOCABULARY
    config: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def layers_key(self) -> str:
        return self.keys.get(_LAYERS, _LAYERS)


class Count(NamedTuple):
    """Where a config says how many layers a stack has, with dots where that is in a part of the config."""

    key: str  # as it is written
    full: str  # in the config with all its defaults


def architecture(config: Mapping[str, Any], *, saved: bool = False) -> Architecture:
    """The architecture of a `config.json`, by the names in the model or those under which transformers saves it."""
    return _architecture(json.dumps(config, sort_keys=True), saved)


def layer_counts(config: Mapping[str, Any], *, saved: bool = False) -> Mapping[str, Count]:
    """For each stack of layers that grows with a number in the config: what its names begin with -> that number."""
    return _layer_counts(json.dumps(config, sort_keys=True), saved)


def numbered(names: Iterable[str]) -> dict[str, set[int]]:
    """Of each stem that is numbered from 0 without a gap, by the first number in a name: the numbers."""
    found: dict[str, set[int]] = {}
    for name in names:
        if match := _NUMBER.search(name):
            found.setdefault(name[: match.start(1)], set()).add(int(match[1]))
    return {stem: numbers for stem, numbers in found.items() if numbers == {*range(len(numbers))}}


def lists_of_layers(config: Mapping[str, Any], layers: int) -> Iterator[str]:
    """The keys of lists with an item for each layer."""
    for key, value in config.items():
        if isinstance(value, list) and len(value) == layers and _OF_LAYERS.search(key):
            yield key


@lru_cache(maxsize=64)
def _architecture(config: str, saved: bool) -> Architecture:
    model = _built(json.loads(config))
    if model is None:
        return Architecture()
    full = json.loads(model.config.to_json_string(use_diff=False))
    names = _saved_names(model) if saved else {name: [name] for name in model.state_dict()}
    shapes = _saved_shapes(model, names) if saved else _shapes(model)
    prefix = str(model.base_model_prefix)
    inside = {name for name in names if name.startswith(f"{prefix}.")}
    vocabulary, key = _vocabulary(json.loads(config), full, dict(model.config.attribute_map), _shapes(model))
    return Architecture(
        shapes=shapes,
        tied={new: names.get(b, [b])[0] for a, b in model.all_tied_weights_keys.items() for new in names.get(a, [a])},
        ignored=sorted(_ignored(model)),
        made=sorted(model._keys_to_ignore_on_load_missing or []),
        backbone="" if saved else prefix,
        head=frozenset(new for name in names.keys() - inside for new in names[name] if saved and inside),
        vocabulary=frozenset(new for name in vocabulary for new in names[name]),
        vocabulary_key=key,
        config=full,
        keys=dict(model.config.attribute_map),
    )


@lru_cache(maxsize=32)
def _layer_counts(config: str, saved: bool) -> dict[str, Count]:
    written, before = json.loads(config), _architecture(config, saved)
    stacks = numbered(before.shapes)
    found: dict[str, Count] = {}
    for key, count in dict([*_counts(written), *_counts(before.config)]).items():
        changes = {key: count + 1, **_longer_lists(before.config, key, count)}
        after = architecture(changed(written, changes), saved=saved)
        grown = numbered(after.shapes)
        full = next((other for other, n in _counts(after.config) if n != at(before.config, other)), key)
        for stem, numbers in stacks.items():
            if len(numbers) == count and len(grown.get(stem, ())) == count + 1:
                found.setdefault(stem, Count(key, full))
    return found


def _counts(config: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, int]]:
    """The numbers in a config that may be those of layers."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _counts(value, f"{inside}{key}.")
        elif type(value) is int and 0 < value < MAX_LAYERS and _COUNTS.search(key):
            yield f"{inside}{key}", value


def _longer_lists(full: Mapping[str, Any], key: str, count: int) -> dict[str, Any]:
    """The lists beside a number of layers with one more item each."""
    beside = parent_of(key)
    held = at(full, beside[:-1]) if beside else full
    lists = [*lists_of_layers(held, count)] if isinstance(held, dict) else []
    return {f"{beside}{name}": [*held[name], held[name][-1]] for name in lists}


def _vocabulary(
    config: dict[str, Any], full: Mapping[str, Any], keys: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[frozenset[str], str]:
    """The tensors that grow by a row when the vocabulary does, and what the config calls its size."""
    key = keys.get(_VOCABULARY, _VOCABULARY)
    parts = [f"{part}.{_VOCABULARY}" for part, value in full.items() if isinstance(value, dict)]
    found: dict[str, frozenset[str]] = {}
    for place in [key] if isinstance(full.get(key), int) else parts:
        if isinstance(size := at(full, place), int):
            larger = _built(changed(config, {place: size + 1}))
            grown = _shapes(larger) if larger is not None else {}
            names = frozenset(name for name, shape in shapes.items() if grown.get(name, shape)[:1] != shape[:1])
            found |= {place: names} if names else {}
    if len(found) != 1:  # of several vocabularies none is that of the model
        return frozenset(), key
    [(place, names)] = found.items()
    return names, place


def _ignored(model: Any) -> set[str]:
    """Patterns of names that old checkpoints have and transformers passes over when it loads them."""
    rotary = any(name.endswith("rotary_emb.inv_freq") for name, _ in model.named_buffers())
    return {*(model._keys_to_ignore_on_load_unexpected or ()), *([r"rotary_emb\.inv_freq"] if rotary else [])}


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _saved_names(model: Any) -> dict[str, list[str]]:
    """For each name in the model those under which transformers saves it."""
    from transformers.core_model_loading import revert_weight_conversion

    return {name: [*_reverted(revert_weight_conversion, model, {name: t})] for name, t in model.state_dict().items()}


def _saved_shapes(model: Any, names: Mapping[str, Sequence[str]]) -> dict[str, tuple[int, ...]]:
    """The shapes of what transformers saves, in the order of the model."""
    from transformers.core_model_loading import revert_weight_conversion

    found = _reverted(revert_weight_conversion, model, dict(model.state_dict()))
    order = [new for several in names.values() for new in several if new in found]
    return {name: tuple(found[name].shape) for name in dict.fromkeys([*order, *found])}


def _reverted(revert: Any, model: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    try:
        return dict(revert(model, tensors))
    except Exception:  # what takes several tensors apart together cannot be asked of one
        return tensors


def _built(config: dict[str, Any]) -> Any:
    """The model on no device, or None."""
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(config.get("model_type"), str):
        return None
    import torch
    import transformers

    kind = getattr(transformers, str(architectures[0]), None)
    if kind is None or not hasattr(kind, "config_class"):
        return None
    try:
        with _silent(), torch.device("meta"):
            settings = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
            return None if _endless(settings.to_dict()) else kind(settings)
    except Exception:  # whatever a config can do to somebody else's constructor: then we know nothing of it
        return None


def _endless(config: Any, counts: bool = False) -> bool:
    """Whether a config asks for more layers than a model can have."""
    if isinstance(config, dict):
        return any(_endless(value, bool(_COUNTS.search(str(key)))) for key, value in config.items())
    if isinstance(config, list):
        return any(_endless(value, counts) for value in config)
    return counts and isinstance(config, int) and config > MAX_LAYERS


@contextmanager
def _silent() -> Iterator[None]:
    """What transformers has to say of a config is said where the model is used."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)
