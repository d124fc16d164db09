"""The stack of layers of a model: where it is, and what the config says of single layers.

Layers are told by the first number in the names of tensors, as in `model.layers.7.mlp.up_proj.weight`, and by how many
of them the config wants.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hf_modular.merging.sources._names import known
from hf_modular.merging.sources._sources import Source

_NUMBER = re.compile(r"(?:^|\.)(\d{1,9})\.")
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_OF_LAYERS = re.compile("layer|block|head|types|pattern|multiplier|ffn|mlp|window")  # keys of lists with layers' items


class Place(NamedTuple):
    """A tensor's place: `stem` + number of the layer + `rest`."""

    layer: int
    rest: str


class LayerStack(NamedTuple):
    """The layers of a model, numbered from 0."""

    stem: str  # what names begin with, up to the number
    layers: int

    def place(self, name: str) -> Place | None:
        """Where a tensor is in the stack, if it is in it."""
        if not name.startswith(self.stem):
            return None
        number, dot, rest = name.removeprefix(self.stem).partition(".")
        return Place(int(number), rest) if dot and number.isdecimal() and len(number) < 10 else None

    def name(self, place: Place) -> str:
        return f"{self.stem}{place.layer}.{place.rest}"


def layer_stack(source: Source) -> LayerStack:
    """The one stack of layers that a model has."""
    stacks = [LayerStack(stem, len(numbers)) for stem, numbers in _numbered(source.tensors).items()]
    wanted = _count(source)
    fitting = [stack for stack in stacks if wanted in (None, stack.layers)]
    if len(fitting) != 1:
        found = ", ".join(f"{stack.stem}0 to {stack.layers - 1}" for stack in stacks) or "none"
        said = f" where the config has {wanted}" if wanted is not None else ""
        raise ValueError(
            f"slices need a model with one stack of numbered layers, but {source.reference} has {found}{said}"
        )
    return fitting[0]


def before_and_after(source: Source, stack: LayerStack) -> tuple[list[str], list[str]]:
    """The tensors outside the layers: those that come before them in the model, such as embeddings, and the others."""
    outside = [name for name in source.tensors if stack.place(name) is None]
    order = {name: i for i, name in enumerate(known(source).shapes)}
    first = min((i for name, i in order.items() if stack.place(name)), default=None)
    if first is None or any(name not in order for name in outside):
        before = [name for name in outside if re.search("embed|wte|wpe", name) and "embed_out" not in name]
    else:
        before = [name for name in outside if order[name] < first]
    return before, [name for name in outside if name not in before]


def stacked_config(pieces: Sequence[tuple[Source, int, int]]) -> tuple[dict[str, Any], list[str]]:
    """What the config says differently of a stack of (model, first layer, how many); and what is wrong with it."""
    source, total = pieces[0][0], sum(count for _, _, count in pieces)
    key = _layers_key(source)
    if key is None and source.config:
        return {}, [f"the config of {source.reference} must say how many layers there are, as one of {_COUNTS}"]
    changes: dict[str, Any] = {key: total} if key else {}
    full = [(_full_config(source), first, count, layer_stack(source).layers) for source, first, count in pieces]
    problems: list[str] = []
    for key in dict.fromkeys(key for config, _, _, layers in full for key in _lists(config, layers)):
        parts = [config[key][first : first + n] for config, first, n, layers in full if key in _lists(config, layers)]
        if len(parts) == len(pieces):
            changes[key] = [item for part in parts for item in part]
        else:
            problems.append(f"`{key}` lists what each layer is, but only in the configs of some of the sliced models")
    return changes, problems


def _numbered(names: Iterable[str]) -> dict[str, set[int]]:
    """Of each stem that is numbered from 0 without a gap: the numbers."""
    found: dict[str, set[int]] = {}
    for name in names:
        if match := _NUMBER.search(name):
            found.setdefault(name[: match.start(1)], set()).add(int(match[1]))
    return {stem: numbers for stem, numbers in found.items() if numbers == {*range(len(numbers))}}


def _count(source: Source) -> int | None:
    count = _full_config(source).get(_layers_key(source) or "")
    return count if isinstance(count, int) else None


def _layers_key(source: Source) -> str | None:
    """What the config calls the number of layers."""
    config = _full_config(source)
    return next((key for key in (known(source).layers_key, *_COUNTS) if key in config), None)


def _full_config(source: Source) -> Mapping[str, Any]:
    """The config with the defaults of transformers, where it knows the model: they may hold lists of layers, too."""
    return known(source).config or source.config


def _lists(config: Mapping[str, Any], layers: int) -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, list) and len(value) == layers and _OF_LAYERS.search(key):
            yield key
