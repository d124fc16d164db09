"""What transformers knows of a model by its config: built with shapes but without memory, and asked.

Of an architecture that transformers does not have, nothing is known. No code of a repository is run.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

MAX_LAYERS = 2000  # a config that claims more is not built: it would take hours

_COUNTS = re.compile("layers?$|blocks?$|depth|stages")  # keys of how many layers there are
_VOCABULARY = "vocab_size"
_LAYERS = "num_hidden_layers"


@dataclass(frozen=True)
class Architecture:
    """A model as transformers would build it; empty where it cannot.

    Args:
        shapes: The shape of each tensor by its name, in the order in which the model has them.
        tied: A name -> the one that is stored for it.
        ignored: Patterns of names that are not part of the model.
        backbone: What names of everything but the head begin with, without the dot.
        vocabulary: The tensors whose first axis is the vocabulary.
        config: The config with all its defaults.
        keys: Common names of settings -> the config's own, such as "num_hidden_layers" -> "n_layer".
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    ignored: Sequence[str] = ()
    backbone: str = ""
    vocabulary: frozenset[str] = frozenset()
    config: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def layers_key(self) -> str:
        return self.keys.get(_LAYERS, _LAYERS)

    @property
    def vocabulary_key(self) -> str:
        return self.keys.get(_VOCABULARY, _VOCABULARY)


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a `config.json`."""
    return _architecture(json.dumps(config, sort_keys=True))


@lru_cache(maxsize=32)
def _architecture(config: str) -> Architecture:
    model = _built(json.loads(config))
    if model is None:
        return Architecture()
    shapes = _shapes(model)
    full = json.loads(model.config.to_json_string(use_diff=False))
    return Architecture(
        shapes=shapes,
        tied=dict(model.all_tied_weights_keys),
        ignored=sorted(model._keys_to_ignore_on_load_unexpected or []),
        backbone=str(model.base_model_prefix),
        vocabulary=_vocabulary(json.loads(config), full, dict(model.config.attribute_map), shapes),
        config=full,
        keys=dict(model.config.attribute_map),
    )


def _vocabulary(
    config: dict[str, Any], full: Mapping[str, Any], keys: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> frozenset[str]:
    """The tensors that grow by a row when the vocabulary does."""
    key = keys.get(_VOCABULARY, _VOCABULARY)
    if not isinstance(full.get(key), int):
        return frozenset()
    larger = _built(config | {key: full[key] + 1})
    grown = _shapes(larger) if larger is not None else {}
    return frozenset(name for name, shape in shapes.items() if grown.get(name, shape)[:1] != shape[:1])


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


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
