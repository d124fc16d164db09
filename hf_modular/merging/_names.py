"""Tensors that models name or store differently without differing: tied weights and buffers.

A model with tied embeddings usually stores one tensor for two names. Where another stores both, the names do not
match although the models do. transformers knows for each architecture which names are one tensor, and which are not
part of the model; it is asked, with a model that has shapes but no memory, only when the names differ.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from hf_modular.merging._sources import CONFIG, Source


class _Facts(NamedTuple):
    tied: Mapping[str, str] = {}  # a name -> the one that is stored for it
    ignored: Sequence[str] = ()  # patterns of names that are not part of the model


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
    sources = [reference, *models]
    ties = [_apply_facts(source) for source in sources]
    wanted = dict.fromkeys(name for source in sources for name in source.tensors)
    for source, tied in zip(sources, ties, strict=True):
        source.tied.update({n: tied[n] for n in wanted if n not in source.tensors and tied.get(n) in source.tensors})
    untied = any(name in wanted for name in reference.tied)
    return Names([name for name in wanted if name in reference.tensors], untied, [*_notes(sources)])


def _apply_facts(source: Source) -> Mapping[str, str]:
    """Leave out what is not part of the model or stored twice; returns what is tied."""
    facts = _facts(source)
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


def _facts(source: Source) -> _Facts:
    """What transformers knows of the architecture; nothing of one that it does not have."""
    architectures = source.config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not (source.folder / CONFIG).is_file():
        return _Facts()
    import torch
    import transformers

    kind = getattr(transformers, str(architectures[0]), None)
    if kind is None or not hasattr(kind, "config_class"):
        return _Facts()
    try:
        config = transformers.AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
        if getattr(config, "num_hidden_layers", 0) > len(source.weights.tensors):
            return _Facts()  # not the config of these weights; to build a model of a million layers takes hours
        with torch.device("meta"):
            model = kind(config)
    except Exception:  # whatever a config can do to somebody else's constructor: then we know nothing of it
        return _Facts()
    return _Facts(model.all_tied_weights_keys, sorted(model._keys_to_ignore_on_load_unexpected or []))
