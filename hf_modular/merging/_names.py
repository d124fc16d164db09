"""Tensors that models name or store differently without differing: tied weights and buffers.

A model with tied embeddings usually stores one tensor for two names. Where another stores both, the names do not
match although the models do. transformers, which knows for each architecture which names are one tensor and which are
not part of the model, is asked only when the names differ.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hf_modular.merging._architecture import Architecture, architecture
from hf_modular.merging._sources import Source


@dataclass(frozen=True)
class Names:
    """The names of the tensors to merge."""

    names: list[str]
    untied: bool = False  # whether the result stores apart what the reference model ties
    notes: list[str] = field(default_factory=list)


def agree(reference: Source, models: Sequence[Source]) -> Names:
    """The names of the result, where each source is told what to read for a name that it does not store."""
    if all(model.weights.tensors.keys() == reference.weights.tensors.keys() for model in models):
        return Names([*reference.weights.tensors])
    sources = list({id(source): source for source in (reference, *models)}.values())
    ties = [_apply_facts(source) for source in sources]
    wanted = dict.fromkeys(name for source in sources for name in source.tensors)
    for source, tied in zip(sources, ties, strict=True):
        source.tied.update({n: tied[n] for n in wanted if n not in source.tensors and tied.get(n) in source.tensors})
    untied = any(name in wanted for name in reference.tied)
    return Names([name for name in wanted if name in reference.tensors], untied, [*_notes(sources)])


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
