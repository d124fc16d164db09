"""Tensors that models name or store differently without differing: tied weights and buffers.

A model with tied embeddings usually stores one tensor for two names. Where another stores both, the names do not
match although the models do. And where one stores both with different numbers, transformers does not tie them,
whatever the config says. transformers, which knows for each architecture which names are one tensor and which are not
part of the model, is asked only when the names differ or a model may store a tensor twice.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from hf_modular.merging.sources._architecture import Architecture, architecture
from hf_modular.merging.sources._dotted import at, changed
from hf_modular.merging.sources._sources import Source

_BLOCK = 1 << 20  # elements that are compared at a time


def agree(sources: Sequence[Source]) -> list[str]:
    """Tell each source what to read for a name that it does not store, and what to leave out; returns what to note."""
    first, *others = sources
    alike = all(source.weights.tensors.keys() == first.weights.tensors.keys() for source in others)
    if alike and not any(map(_may_store_twice, sources)):
        return []
    for source in sources:
        _apply_facts(source)
    untied = {name for source in sources for name in source.untied}
    for source in sources:
        source.left_out.difference_update(untied)
    wanted = dict.fromkeys(name for source in sources for name in source.tensors)
    for source in sources:
        tied = known(source).tied
        source.tied.update({n: tied[n] for n in wanted if n not in source.tensors and tied.get(n) in source.tensors})
    return [*_notes(sources)]


def known(source: Source, changes: Mapping[str, Any] | None = None) -> Architecture:
    """What transformers knows of a source's architecture, by the names of its tensors.

    Nothing if the config is not that of its weights.

    Args:
        changes: What the config would say differently.
    """
    return known_by(source.config, source.weights.tensors.keys(), changes)


def known_by(
    config: Mapping[str, Any], stored: Collection[str], changes: Mapping[str, Any] | None = None
) -> Architecture:
    """The same of a config and the names of the tensors that are stored."""
    if _counts_too_many(config, stored):
        return Architecture()
    return architecture(changed(config, changes or {}), saved=_are_as_saved(config, stored))


def is_as_saved(source: Source) -> bool:
    """Whether names are those under which transformers saves the model, where these are others than in the model."""
    stored = source.weights.tensors.keys()
    return not _counts_too_many(source.config, stored) and _are_as_saved(source.config, stored)


def _are_as_saved(config: Mapping[str, Any], stored: Collection[str]) -> bool:
    names, plain = {*stored}, architecture(config).shapes.keys()
    return not names <= plain and len(names & architecture(config, saved=True).shapes.keys()) > len(names & plain)


def _counts_too_many(config: Mapping[str, Any], stored: Collection[str]) -> bool:
    """To build a model of a million layers takes hours."""
    layers = config.get("num_hidden_layers", 0)
    return not isinstance(layers, int) or layers > len(stored)


def _may_store_twice(source: Source) -> bool:
    """Whether there are more tensors with a row for each token than embeddings and a head that is not tied to them."""
    sizes = [size for key in ("vocab_size", "text_config.vocab_size") if (size := at(source.config, key)) is not None]
    of_tokens = [t for t in source.weights.tensors.values() if len(t.shape) == 2 and t.shape[0] in sizes]
    return len(of_tokens) > (2 if source.config.get("tie_word_embeddings") is False else 1)


def _apply_facts(source: Source) -> None:
    """Leave out what is not part of the model or stored twice."""
    facts = known(source)
    stored = source.weights.tensors
    for name in stored:
        if facts.tied.get(name) in stored:
            (source.left_out if _same(source, name, facts.tied[name]) else source.untied).add(name)
        elif any(re.search(pattern, name) for pattern in facts.ignored):
            source.left_out.add(name)


def _same(source: Source, one: str, other: str) -> bool:
    """Whether two tensors are equal; they are read for it."""
    stored = source.weights.tensors
    if stored[one].shape != stored[other].shape:
        return False
    for start in range(0, stored[one].numel, _BLOCK):
        block = torch.empty(2, min(_BLOCK, stored[one].numel - start))
        source.fill(one, start, block[0])
        source.fill(other, start, block[1])
        if not torch.equal(block[0], block[1]):
            return False
    return True


def _notes(sources: Sequence[Source]) -> Iterator[str]:
    for source in sources:
        if source.left_out:
            yield f"left out of {source.reference}, as not part of the model: {', '.join(sorted(source.left_out))}"
        if source.untied:
            names = ", ".join(sorted(source.untied))
            yield f"{names} of {source.reference} is not what its config ties it to, and is merged as a tensor apart"
