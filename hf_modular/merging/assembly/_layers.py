"""The stacks of layers of a model: where they are, and what the config says of single layers.

Layers are told by the first number in the names of tensors, as in `model.layers.7.mlp.up_proj.weight`, and by how many
of them the config wants. Most models have one stack; encoders with a decoder, and those of images and texts, have two.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hf_modular.merging.sources._architecture import layer_counts, lists_of_layers, numbered
from hf_modular.merging.sources._dotted import at, parent_of
from hf_modular.merging.sources._names import is_as_saved, known
from hf_modular.merging.sources._sources import Source

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_NUMBERS_OF_LAYERS = re.compile("(ind(ex|exes|ices)|idxs?|layer_ids|layers)$")  # keys of lists of numbers of layers


class Place(NamedTuple):
    """A tensor's place: `stem` + number of the layer + `rest`."""

    layer: int
    rest: str


class LayerStack(NamedTuple):
    """The layers of a model, numbered from 0."""

    stem: str  # what names begin with, up to the number
    layers: int
    key: str = ""  # of their number in the config, with dots where it is in a part of it
    full: str = ""  # the same in the config with all its defaults

    def place(self, name: str) -> Place | None:
        """Where a tensor is in the stack, if it is in it."""
        if not name.startswith(self.stem):
            return None
        number, dot, rest = name.removeprefix(self.stem).partition(".")
        return Place(int(number), rest) if dot and number.isdecimal() and len(number) < 10 else None

    def name(self, place: Place) -> str:
        return f"{self.stem}{place.layer}.{place.rest}"


class Piece(NamedTuple):
    """Consecutive layers of a model."""

    source: Source
    stack: LayerStack
    first: int
    length: int

    def listed(self, key: str, *, numbers: bool) -> list[Any]:
        """What a list in the config says of them: an item for each, or the numbers of some, counted from 0."""
        items = at(_full_config(self.source), f"{parent_of(self.stack.full)}{key}") or []
        there = range(self.first, self.first + self.length)
        return [item - self.first for item in items if item in there] if numbers else [items[i] for i in there]


def layer_stacks(source: Source) -> list[LayerStack]:
    """The stacks of layers of a model whose number the config gives, or the only one there is."""
    lengths = {stem: len(numbers) for stem, numbers in numbered(source.tensors).items()}
    counts = layer_counts(source.config, saved=is_as_saved(source)) if known(source).shapes else {}
    in_order = numbered(known(source).shapes)
    if found := [
        LayerStack(stem, lengths[stem], *counts[stem]) for stem in in_order if stem in lengths.keys() & counts.keys()
    ]:
        return found
    key = next((key for key in (known(source).layers_key, *_COUNTS) if key in _full_config(source)), "")
    wanted = _full_config(source).get(key)
    stacks = [LayerStack(stem, length, key, key) for stem, length in lengths.items()]
    return [stack for stack in stacks if not isinstance(wanted, int) or stack.layers == wanted]


def before_and_after(source: Source, stack: LayerStack, outside: Sequence[str]) -> tuple[list[str], list[str]]:
    """Of tensors outside the layers those that come before them in the model, such as embeddings, and the others."""
    order = {name: i for i, name in enumerate(known(source).shapes)}
    first = min((i for name, i in order.items() if stack.place(name)), default=None)
    if first is None or any(name not in order for name in outside):
        before = [name for name in outside if re.search("embed|wte|wpe", name) and "embed_out" not in name]
    else:
        before = [name for name in outside if order[name] < first]
    return before, [name for name in outside if name not in before]


def stacked_config(pieces: Sequence[Piece], reference: Source, result: LayerStack) -> tuple[dict[str, Any], list[str]]:
    """What the config of the reference model says differently of a stack of pieces; and what is wrong with it."""
    if not result.key:
        return {}, [f"the config of {reference.reference} must say how many layers there are, as one of {_COUNTS}"]
    total = sum(piece.length for piece in pieces)
    pairs = [pair for pair in known(reference).keys.items() if result.key in pair]
    other = [key for pair in pairs for key in pair if key in reference.config]
    changes: dict[str, Any] = dict.fromkeys([result.key, *other], total)
    beside, problems = parent_of(result.key), list[str]()
    for key in dict.fromkeys(key for piece in pieces for key in _lists(piece)):
        if all(key in _lists(piece) for piece in pieces):
            changes[f"{beside}{key}"] = [item for piece in pieces for item in piece.listed(key, numbers=False)]
        else:
            problems.append(f"`{key}` lists what each layer is, but only in the configs of some of the sliced models")
    changes |= {f"{beside}{key}": numbers for key, numbers in _numbers(pieces).items()}
    return changes, problems


def _full_config(source: Source) -> Mapping[str, Any]:
    """The config with the defaults of transformers, where it knows the model: they may hold lists of layers, too."""
    return known(source).config or source.config


def _beside(piece: Piece) -> Mapping[str, Any]:
    """The part of the config in which the number of layers is."""
    config, part = _full_config(piece.source), parent_of(piece.stack.full)
    return at(config, part[:-1]) or {} if part else config


def _lists(piece: Piece) -> list[str]:
    return [*lists_of_layers(_beside(piece), piece.stack.layers)]


def _numbers(pieces: Sequence[Piece]) -> dict[str, list[int]]:
    """The lists that name layers by their numbers, such as those with full attention, with the result's numbers."""
    keys = dict.fromkeys(key for piece in pieces for key in _numbering(piece))
    found: dict[str, list[int]] = {}
    for key in keys:
        start = 0
        found[key] = []
        for piece in pieces:
            found[key] += [start + number for number in piece.listed(key, numbers=True)]
            start += piece.length
    return found


def _numbering(piece: Piece) -> Iterator[str]:
    """The keys of lists with numbers of layers."""
    of_each = _lists(piece)
    for key, value in _beside(piece).items():
        named = _NUMBERS_OF_LAYERS.search(key) and not key.startswith("out_") and key not in of_each
        if named and isinstance(value, list) and value and _are_layers(value, piece.stack.layers):
            yield key


def _are_layers(items: Sequence[Any], layers: int) -> bool:
    return all(type(item) is int and 0 <= item < layers for item in items) and len({*items}) == len(items)
