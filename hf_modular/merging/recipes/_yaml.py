"""YAML as plain data with the line of every key: no objects, no key twice, no alias that expands without end."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Location = tuple[str | int, ...]

_LIMIT = 1 << 20  # bytes of a file
_NODES = 1 << 14  # keys and values, those that aliases repeat counted each time
_DEPTH = 32


@dataclass(frozen=True)
class Document:
    """What a file holds, and the lines of its keys."""

    name: str
    data: Any
    lines: Mapping[Location, int] = field(default_factory=dict)

    def place(self, place: Location, message: str) -> str:
        """A message with the line that it is about, as near as it is known."""
        line = next((self.lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in self.lines), None)
        return f"line {line}, {spelled(place)}: {message}" if line else f"{spelled(place)}: {message}"


def read(path: Path) -> Document:
    """A YAML file that holds keys."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe {path}")
    if path.stat().st_size > _LIMIT:
        raise ValueError(f"{path} must have at most {_LIMIT} bytes, but has {path.stat().st_size}")
    try:
        data, lines = _parsed(path.read_text("utf-8"))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} must hold a YAML recipe: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold keys such as `merge_method` and `models`, but holds {data!r:.80}")
    return Document(path.name, data, lines)


def spelled(place: Location) -> str:
    """The way to a key, as one would write it."""
    return re.sub(r"\.(\d+)", r"[\1]", ".".join(map(str, place))) or "the recipe"


class _Loader(yaml.SafeLoader):
    """Plain data only. YAML 1.1 takes 1e-5 for a text, for want of a dot; here it is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parsed(text: str) -> tuple[Any, dict[Location, int]]:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        lines = dict(_lines(node, (), [_NODES]))
        return loader.construct_document(node) if node else None, lines
    finally:
        loader.dispose()


def _lines(node: yaml.Node | None, place: Location, budget: list[int]) -> Iterator[tuple[Location, int]]:
    """The line of every key and list item; it is an error if there are too many, or a key twice."""
    budget[0] -= 1
    if budget[0] < 0 or len(place) > _DEPTH:
        raise ValueError("it is nested too deeply or repeats its parts too often")
    if isinstance(node, yaml.ScalarNode):
        _refuse_halves(node.value, node.start_mark.line + 1)
    for key, line, value in _parts(node):
        yield (*place, key), line
        yield from _lines(value, (*place, key), budget)


def _parts(node: yaml.Node | None) -> Iterator[tuple[str | int, int, yaml.Node]]:
    if isinstance(node, yaml.SequenceNode):
        yield from ((i, value.start_mark.line + 1, value) for i, value in enumerate(node.value))
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            if name in seen:
                raise ValueError(f"line {line}: the key {name!r} was given in line {seen[name]} already")
            seen[name] = line
            _refuse_halves(name, line)
            yield name, line, value


def _refuse_halves(text: str, line: int) -> None:
    """Half a surrogate pair, which YAML can spell, is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"line {line}: {text!r:.100} must be text, but has half a surrogate pair") from None
