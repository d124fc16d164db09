"""Tensors that models name or store differently without differing: tied weights and buffers.

A model with tied embeddings usually stores one tensor for two names. Where another stores both, the names do not
match although the models do. transformers, which knows for each architecture which names are one tensor and which are
not part of the model, is asked only when the names differ.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hf_modular.merging.sources._architecture import Architecture, architecture
from hf_modular.merging.sources._dotted import changed
from hf_modular.merging.sources._sources import Source


def agree(sources: Sequence[Source]) -> list[str]:
    """Tell each source what to read for a name that it does not store, and what to leave out; returns what to note."""
    first, *others = sources
    if all(source.weights.tensors.keys() == first.weights.tensors.keys() for source in others):
        return []
    ties = [_apply_facts(source) for source in sources]
    wanted = dict.fromkeys(name for source in sources for name in source.tensors)
    for source, tied in zip(sources, ties, strict=True):
        source.tied.update({n: tied[n] for n in wanted if n not in source.tensors and tied.get(n) in source.tensors})
    return [*_notes(sources)]


def known(source: Source, changes: Mapping[str, Any] | None = None) -> Architecture:
    """What transformers knows of a source's architecture, by the names of its tensors.

    Nothing if the config is not that of its weights.

    Args:
        changes: What the config would say differently.
    """
    if _counts_too_many(source):
        return Architecture()
    return architecture(changed(source.config, changes or {}), saved=is_as_saved(source))


def is_as_saved(source: Source) -> bool:
    """Whether names are those under which transformers saves the model, where these are others than in the model."""
    if _counts_too_many(source):
        return False
    stored = source.weights.tensors.keys()
    plain = architecture(source.config).shapes.keys()
    return not stored <= plain and len(stored & architecture(source.config, saved=True).shapes.keys()) > len(
        stored & plain
    )


def _counts_too_many(source: Source) -> bool:
    """To build a model of a million layers takes hours."""
    layers = source.config.get("num_hidden_layers", 0)
    return not isinstance(layers, int) or layers > len(source.weights.tensors)


def _apply_facts(source: Source) -> Mapping[str, str]:
    """Leave out what is not part of the model or stored twice; returns what is tied."""
    facts = known(source)
    stored = source.weights.tensors
    source.left_out.update(
        name
        for name in stored
        if facts.tied.get(name) in stored or any(re.search(pattern, name) for pattern in facts.ignored)
    )
    return facts.tied


def _notes(sources: Sequence[Source]) -> Iterator[str]:
    for source in sources:
        if source.left_out:
            yield f"left out of {source.reference}, as not part of the model: {', '.join(sorted(source.left_out))}"
