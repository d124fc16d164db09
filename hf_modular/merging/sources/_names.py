"""Tensors that models name or store differently without differing: tied weights and buffers.

A model with tied embeddings usually stores one tensor for two names. Where another stores both, the names do not
match although the models do. transformers, which knows for each architecture which names are one tensor and which are
not part of the model, is asked only when the names differ.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

from hf_modular.merging.sources._architecture import Architecture, architecture
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


def known(source: Source) -> Architecture:
    """What transformers knows of a source's architecture; nothing if the config is not that of its weights."""
    layers = source.config.get("num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > len(source.weights.tensors):
        return Architecture()  # to build a model of a million layers takes hours
    return architecture(source.config)


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
