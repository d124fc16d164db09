"""The settings of a recipe, tensor by tensor: filters on names and gradients over the depth, by mergekit's rules."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, cast

from hf_modular import merging
from hf_modular.merging._method import Alias, MergeMethod, MergeSettings

IGNORED = ("int8_mask",)  # how mergekit stores a mask in memory; the result is the same

_LAYER = re.compile(r"\.(\d{1,9})\.")


@dataclass(frozen=True, eq=False)
class Settings:
    """The settings of a recipe, which may differ between tensors and models."""

    method: MergeSettings
    shared: Mapping[str, Any]  # each a value, a gradient or filtered values
    models: Sequence[Mapping[str, Any]]  # the same for each model

    @property
    def vary(self) -> bool:
        """Whether a setting of the method, other than a model's weight, depends on the tensor."""
        given = [*self.shared.items(), *(item for model in self.models for item in model.items())]
        return any(isinstance(value, (list, dict)) for key, value in given if key != "weight")

    @property
    def filters(self) -> Iterator[str]:
        """The texts that names of tensors must have for some settings."""
        for settings in (self.shared, *self.models):
            for value in settings.values():
                yield from (case["filter"] for case in _cases(value) if case.get("filter") not in (None, "*"))

    def at(self, name: str, depth: float, names: Sequence[str] | None = None) -> "Resolved":
        """The settings for a tensor at a depth from 0 to 1 of the model.

        Args:
            names: What each model calls it, where layers are renumbered: filters of settings that may differ between
                models look at that, as in mergekit.
        """
        shared = {key: evaluate(value, name, depth) for key, value in self.shared.items()}
        plain = {key: value for key, value in shared.items() if value is not None and key != "weight"}
        method = _replaced(self.method, tuple(plain.items()))
        own = [self._own(i, its, depth) for i, its in enumerate(names or [name] * len(self.models))]
        given = sorted({key for model in own for key in model} & _per_model(self.method))
        each = {key: _for_each(own, key, getattr(method, key)) for key in given}
        weight = shared.get("weight")
        return Resolved(cast(MergeMethod, method), _for_each(own, "weight", 1.0 if weight is None else weight), each)

    def _own(self, model: int, name: str, depth: float) -> dict[str, Any]:
        """A model's own settings for a tensor, and those of all that filters give to some tensors only."""
        kinds = {"weight", *_per_model(self.method)}
        filtered = {key: value for key, value in self.shared.items() if key in kinds and _filtered(value)}
        settings = chained(self.models[model], filtered)
        return {key: evaluate(value, name, depth) for key, value in settings.items()}


@dataclass(frozen=True)
class Resolved:
    """The settings for one tensor."""

    method: MergeMethod
    weights: tuple[float, ...]
    each: Mapping[str, tuple[Any, ...]]


def evaluate(setting: Any, name: str, depth: float) -> Any:
    """A setting's value for a tensor, or None where no filter fits."""
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if isinstance(setting[0], dict):
        fitting = (case for case in setting if case.get("filter") in (None, "*") or case["filter"] in name)
        return next((evaluate(case["value"], name, depth) for case in fitting), None)
    return _interpolated(setting, depth)


def depths(names: Iterable[str]) -> dict[str, float]:
    """How deep each tensor lies: 0 for the first of numbered layers, 1 for the last, 0 for what is in no layer."""
    found = {name: _LAYER.search(name) for name in names}
    layers = {name: (name[: match.start()], int(match[1])) for name, match in found.items() if match}
    last: dict[str, int] = {}
    for stem, layer in layers.values():
        last[stem] = max(last.get(stem, 0), layer)
    return {name: _depth(*layers[name], last) if name in layers else 0.0 for name in found}


def known() -> dict[str, tuple[type[MergeSettings], Alias]]:
    """Every name of a method, ours and mergekit's."""
    found: dict[str, tuple[type[MergeSettings], Alias]] = {}
    for name, method in (merging.METHODS | merging.PARTS).items():
        found[name] = (method, Alias())
        found |= {alias: (method, words) for alias, words in method.aliases.items()}
    return found


def translated(parameters: Mapping[str, Any], alias: Alias) -> dict[str, Any]:
    """Settings in the words of an alias -> in ours."""
    words = ((word(key, alias), value) for key, value in parameters.items() if key not in IGNORED)
    return {ours: _leaves(value, convert) for (ours, convert), value in words}


def chained(near: Mapping[str, Any], far: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of which the near ones go first; where no filter of a near one fits, the far one counts."""
    both = {key: [*_cases(near[key]), *_cases(far[key])] for key in near.keys() & far.keys() if _filtered(near[key])}
    return {**far, **near, **both}


def word(key: str, alias: Alias) -> tuple[str, Callable[[Any], Any]]:
    """Our name for a recipe's key, and what becomes of its values."""
    return alias.keys.get(key, ("scale" if key == "lambda" else key, lambda value: value))


def _filtered(setting: Any) -> bool:
    return isinstance(setting, dict) or (isinstance(setting, list) and isinstance(setting[0], dict))


def _cases(setting: Any) -> list[Any]:
    """A setting as filtered values."""
    if isinstance(setting, dict):
        return [setting]
    return setting if _filtered(setting) else [{"value": setting}]


def _leaves(setting: Any, convert: Callable[[Any], Any]) -> Any:
    """A setting with each of its single values converted."""
    if isinstance(setting, list):
        return [_leaves(part, convert) for part in setting]
    if isinstance(setting, dict):
        return setting | {"value": _leaves(setting["value"], convert)}
    return convert(setting)


def _per_model(method: MergeSettings) -> set[str]:
    return {f.name for f in fields(method) if f.metadata.get("per_model")}


def _for_each(models: Sequence[Mapping[str, Any]], key: str, default: Any) -> tuple[Any, ...]:
    """A setting's value for each model: its own, or the default."""
    return tuple(default if model.get(key) is None else model[key] for model in models)


def _depth(stem: str, layer: int, last: Mapping[str, int]) -> float:
    return layer / last[stem] if last[stem] else 1.0


def _interpolated(values: list[Any], depth: float) -> Any:
    """The value at a depth between the list's first and last; what is no number changes in steps."""
    position = depth * (len(values) - 1)
    low = int(position)
    if any(isinstance(value, (bool, str)) for value in values):
        return values[low]
    high = min(low + 1, len(values) - 1)
    return (1 - (position - low)) * values[low] + (position - low) * values[high]


@lru_cache(maxsize=1024)
def _replaced(method: MergeSettings, settings: tuple[tuple[str, Any], ...]) -> MergeSettings:
    return replace(method, **dict(settings))
