"""Settings in a config, named with dots where they are in a part of it, as in `text_config.vocab_size`."""

from collections.abc import Mapping
from typing import Any


def at(config: Mapping[str, Any], key: str) -> Any:
    """What a config has under a key; None if nothing."""
    found: Any = config
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config with some settings changed, and those that are None left out."""
    found = dict(config)
    for key, value in changes.items():
        first, dot, rest = key.partition(".")
        inner = found.get(first)
        if dot:
            found[first] = changed(inner if isinstance(inner, dict) else {}, {rest: value})
        elif value is None:
            found.pop(first, None)
        else:
            found[first] = value
    return found


def parent_of(key: str) -> str:
    """What comes before the last name, with its dot."""
    return key[: key.rfind(".") + 1]
