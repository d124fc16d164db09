"""What is searched: places in a recipe with their bounds or choices, as points of the unit cube and back."""

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any

import yaml

from hf_modular.merging import MergeRecipe

Range = tuple[float, float]
Spaces = Mapping[str, Range | Sequence[Any]]  # a place -> the least and the greatest number, or a list of choices

_PLACE = re.compile(r"(?:models\.(\*|\d+)\.)?(\w+)")
_NUMBER = r"([-+]?[0-9.]+(?:e[-+]?[0-9]+)?)"
_BOUNDS = re.compile(f"{_NUMBER}:{_NUMBER}")
_DIGITS = 6  # of a number, so that recipes stay legible


@dataclass(frozen=True)
class Dimension:
    """One number or choice of a recipe."""

    place: tuple[str | int, ...]  # its keys in the recipe
    low: float = 0.0
    high: float = 1.0
    choices: tuple[Any, ...] = ()
    whole: bool = False

    @property
    def name(self) -> str:
        """As it is written in a space, without `parameters`."""
        return ".".join(str(part) for part in self.place if part != "parameters")

    def value(self, x: float) -> Any:
        """What a number from 0 to 1 stands for."""
        if self.choices:
            return self.choices[min(int(x * len(self.choices)), len(self.choices) - 1)]
        number = self.low + min(max(x, 0.0), 1.0) * (self.high - self.low)
        return round(number) if self.whole else float(f"{number:.{_DIGITS}g}")

    def position(self, value: Any) -> float | None:
        """Where between 0 and 1 a value lies; the middle for one that is not given, None if it is out of bounds."""
        if self.choices:
            return (self.choices.index(value) + 0.5) / len(self.choices) if value in self.choices else None
        if not isinstance(value, (int, float)):
            return None
        x = (value - self.low) / (self.high - self.low)
        return x if 0 <= x <= 1 else None


@dataclass(frozen=True)
class Space:
    """The recipe that is varied, and how."""

    recipe: MergeRecipe
    dimensions: tuple[Dimension, ...]

    @classmethod
    def of(cls, recipe: MergeRecipe, space: Spaces) -> "Space":
        if not space:
            raise ValueError('there must be something to vary, such as {"weight": (0, 2)}, but the space is empty')
        found = cls(recipe, tuple(dimension for key in space for dimension in _dimensions(recipe, key, space[key])))
        names = [dimension.name for dimension in found.dimensions]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"each setting may be varied once, but {', '.join(twice)} is named twice")
        for end in (lambda d: d.choices or (d.low, d.high), lambda d: (d.choices or (d.low, d.high))[::-1]):
            found._check(end)
        return found

    def settings(self, x: Sequence[float]) -> dict[str, Any]:
        """What a point of the unit cube stands for, by name."""
        return {d.name: d.value(float(part)) for d, part in zip(self.dimensions, x, strict=True)}

    def with_settings(self, settings: Mapping[str, Any]) -> MergeRecipe:
        """The recipe with other values in the places that are varied."""
        content = self.recipe.model_dump(exclude_unset=True)
        for dimension in self.dimensions:
            _put(content, dimension.place, settings[dimension.name])
        return MergeRecipe.load(content)

    def start(self) -> list[float]:
        """The recipe's own values; the middle where it has none, or one that is out of bounds."""
        return [0.5 if (x := d.position(_present(self.recipe, d.place))) is None else x for d in self.dimensions]

    def describe(self) -> dict[str, list[Any]]:
        """By which a search is known again."""
        return {d.name: list(d.choices) or [d.low, d.high] for d in self.dimensions}

    def _check(self, ends: Callable[[Dimension], Sequence[Any]]) -> None:
        """The recipe must allow what the space does; each setting is tried with the others as they are."""
        start = {d.name: d.value(x) for d, x in zip(self.dimensions, self.start(), strict=True)}
        for dimension in self.dimensions:
            for value in ends(dimension):
                try:
                    self.with_settings(start | {dimension.name: value})
                except ValueError as error:
                    raise ValueError(f"{dimension.name} may not be {value!r}: {error}") from error


def parsed(varied: Sequence[str]) -> dict[str, Range | list[Any]]:
    """A space of texts such as "weight=0:2" and "election=none,symmetric"."""
    space: dict[str, Range | list[Any]] = {}
    for text in varied:
        name, _, values = text.partition("=")
        ends = _BOUNDS.fullmatch(values)
        if not ends and "," not in values:
            raise ValueError(f"what to vary must be like weight=0:2 or election=none,symmetric, but got {text!r}")
        if name in space:
            raise ValueError(f"each setting may be varied once, but {name!r} is given twice")
        space[name] = (
            (float(ends[1]), float(ends[2])) if ends else [yaml.safe_load(value) for value in values.split(",")]
        )
    return space


def _dimensions(recipe: MergeRecipe, key: str, given: Range | Sequence[Any]) -> list[Dimension]:
    """Those of one key of a space."""
    match = _PLACE.fullmatch(key)
    if match is None:
        raise ValueError(f"a place must be a setting or models.NUMBER.setting or models.*.setting, but got {key!r}")
    which, setting = match.groups()
    if which is None and setting == "weight":
        which = "*"
    count = len(recipe.models)
    chosen = range(count) if which == "*" else [] if which is None else [int(which)]
    if any(number >= count for number in chosen):
        raise ValueError(f"the recipe has the models 0 to {count - 1}, but got {key!r}")
    if which == "*" and not count:
        raise ValueError(f"the recipe lists no models whose {setting!r} could be varied: name a setting of the method")
    places = [("models", number, "parameters", setting) for number in chosen] if which else [("parameters", setting)]
    return [_dimension(recipe, place, key, given) for place in places]


def _dimension(recipe: MergeRecipe, place: tuple[str | int, ...], key: str, given: Range | Sequence[Any]) -> Dimension:
    if isinstance(given, list) and len(given) > 1:
        return Dimension(place, choices=tuple(deepcopy(given)))
    if not (isinstance(given, tuple) and len(given) == 2 and all(isinstance(end, (int, float)) for end in given)):
        raise ValueError(f"{key} must have a tuple of two numbers, or a list of choices, but got {given!r}")
    if not given[0] < given[1]:
        raise ValueError(f"{key} must have a lower bound below the upper one, but got {given}")
    kinds = {f.name: f.type for f in fields(recipe.method)}
    return Dimension(place, float(given[0]), float(given[1]), whole=kinds.get(str(place[-1])) in (int, "int"))


def _put(content: Any, place: Sequence[str | int], value: Any) -> None:
    first, *rest = place
    if rest:
        _put(content[first] if isinstance(first, int) else content.setdefault(first, {}), rest, value)
    else:
        content[first] = value


def _present(recipe: MergeRecipe, place: Sequence[str | int]) -> Any:
    """What the recipe has in a place, or the method's default."""
    parent: Any = recipe.model_dump(exclude_unset=True)
    for part in place:
        if isinstance(parent, list):
            parent = parent[int(part)]
        else:
            parent = parent.get(part, {}) if part != place[-1] else parent.get(part)
    if parent is not None:
        return parent
    shared = recipe.parameters.get(str(place[-1])) if place[0] == "models" else None
    default = 1.0 if place[-1] == "weight" else getattr(recipe.method, str(place[-1]), None)
    return default if shared is None else shared
