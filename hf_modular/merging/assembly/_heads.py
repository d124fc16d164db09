"""Heads of models for different tasks: which one the result gets, where they cannot be merged.

The head is what lies outside the part of the model that transformers calls the base model, and a pooler that only some
of the models have.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hf_modular.merging.engine._engine import Inputs
from hf_modular.merging.engine._preflight import TensorLike, listed
from hf_modular.merging.recipes._recipe import MergeRecipe
from hf_modular.merging.sources._names import known
from hf_modular.merging.sources._sources import Source

_LABELS = ("id2label", "label2id", "num_labels", "problem_type", "architectures")  # what a config says of a head


@dataclass(frozen=True)
class Heads:
    """The tensors that are not merged.

    Args:
        names: Those of all models.
        kept: The model whose head the result gets.
    """

    names: frozenset[str] = frozenset()
    kept: str | None = None
    problems: tuple[str, ...] = ()


def choose_head(recipe: MergeRecipe, sources: Mapping[str, Source], models: Mapping[str, Inputs]) -> Heads:
    """What becomes of the heads of models, the reference first; `sources` has their configs."""
    tensors = {name: models[name].tensors for name in sources}
    if recipe.heads == "error":
        return _differing(sources, tensors)
    kept = recipe.reference_model if recipe.heads == "base" else recipe.heads
    outside = _outside(sources, tensors)
    if not outside & tensors[kept].keys():
        return Heads(problems=(f"{kept} has no head that could be told from the rest of it: remove the key `heads`",))
    return Heads(outside, kept)


def labels(reference: Source, head: Source) -> dict[str, Any]:
    """What the config of the reference model must say of the head of another."""
    return {key: head.config.get(key) for key in _LABELS if reference.config.get(key) != head.config.get(key)}


def head_names(source: Source, names: Collection[str]) -> set[str]:
    """Those of a model's names that lie outside the part of it that transformers calls the base model."""
    facts = known(source)
    inside = {name for name in names if facts.backbone and name.startswith(f"{facts.backbone}.")}
    return {*names} - inside if inside else {name for name in names if name in facts.head}


def _differing(sources: Mapping[str, Source], tensors: Mapping[str, Mapping[str, TensorLike]]) -> Heads:
    found = [*_label_problems(sources)]
    first, *others = tensors.values()
    if not found and all({*_shapes(other)} == {*_shapes(first)} for other in others):
        return Heads()
    outside = _outside(sources, tensors)
    shapes = {name: {of.get(name) for of in (dict(_shapes(model)) for model in tensors.values())} for name in outside}
    different = sorted(name for name, those in shapes.items() if len(those) > 1)
    if different:
        each = "; ".join(f"{model} has {_spelled(different, of)}" for model, of in tensors.items())
        found.insert(0, f"the heads of the models differ in {listed(different)}: {each}")
    ways = "choose one with `heads: base`, or with a model's name; the rest is merged"
    return Heads(frozenset(outside if different else ()), problems=tuple(f"{problem}: {ways}" for problem in found))


def _outside(sources: Mapping[str, Source], tensors: Mapping[str, Mapping[str, TensorLike]]) -> frozenset[str]:
    found: set[str] = set()
    for name, source in sources.items():
        found |= head_names(source, tensors[name])
    every = set.intersection(*({*own} for own in tensors.values()))
    return frozenset(found | {n for own in tensors.values() for n in own if n not in every and ".pooler." in n})


def _label_problems(sources: Mapping[str, Source]) -> Iterator[str]:
    """Heads of one shape whose outputs mean different things."""
    said = {name: source.config.get("id2label") for name, source in sources.items()}
    named = {name: of for name, of in said.items() if isinstance(of, dict) and not _unnamed(of)}
    for name, of in [*named.items()][1:]:
        first = next(iter(named))
        if of != named[first]:
            yield f"the labels of {first} and {name} differ: {_few(named[first])} and {_few(of)}"


def _unnamed(said: Mapping[str, Any]) -> bool:
    return all(re.fullmatch(r"LABEL_\d+", str(label)) for label in said.values())


def _shapes(tensors: Mapping[str, TensorLike]) -> Iterator[tuple[str, tuple[int, ...]]]:
    return ((name, tuple(tensor.shape)) for name, tensor in tensors.items())


def _spelled(names: list[str], tensors: Mapping[str, TensorLike]) -> str:
    return ", ".join(f"{tuple(tensors[name].shape)}" if name in tensors else "none" for name in names[:3])


def _few(said: Mapping[str, Any]) -> str:
    return ", ".join(map(str, [*said.values()][:3])) + (", ..." if len(said) > 3 else "")
