"""What models differ in beside their tensors: the settings by which they compute, write and are spoken to."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_modular.merging.assembly._settings_files import GENERATION, Beside, template_of
from hf_modular.merging.sources._dotted import changed
from hf_modular.merging.sources._names import known
from hf_modular.merging.sources._sources import PROCESSING_FILES, Source, files, read_object

# what is looked at elsewhere, and what does not change the numbers that a model computes
_ELSEWHERE = re.compile(
    r"^_|version|dtype|architectures|label|problem_type|num_classes|vocab|token|tie_|layers?$|n_layer|depth|quantiz"
    r"|auto_map|name_or_path|finetuning_task|task_specific"
)
_IDLE = re.compile(
    r"drop|init|use_cache|output_|return_dict|checkpointing|chunk_size|torchscript|pruned|aux_loss|^(min|max)_length"
    r"|beam|temperature|top_[kp]|penalty|do_sample|early_stopping|ngram|num_return|prefix|unsloth|pretraining_tp"
)
_ELSEWHERE_GENERATING = re.compile(r"^_|version|output_|return_dict|use_cache|cache_implementation")
_LAYOUT = re.compile(r"heads?$|head_dim$")  # which rows of a matrix are one head's
_SHOWN = 100  # characters of a value


def config_notes(reference: Source, sources: Sequence[Source]) -> Iterator[str]:
    """Where a model is meant to compute with its numbers in another way than the reference, whose config counts."""
    for source, key, values in _all_differences(reference, sources):
        if not _LAYOUT.search(key):
            own, other = values
            yield (
                f"the configs differ in `{key}`: {own!r:.{_SHOWN}} in {reference.reference}, which counts for the "
                f"result, and {other!r:.{_SHOWN}} in {source.reference}"
            )


def layout_problems(reference: Source, sources: Sequence[Source]) -> Iterator[str]:
    """Tensors of one shape in which the same rows mean something else."""
    for source, key, (own, other) in _all_differences(reference, sources):
        if _LAYOUT.search(key):
            law = f"all models must have the same `{key}`"
            yield f"{law}, but {reference.reference} has {own}, and {source.reference} {other}"


def beside_notes(beside: Beside, sources: Sequence[Source], *, chosen: bool) -> Iterator[str]:
    """What the result takes over of one model although another has it otherwise: how to write, end and answer.

    Args:
        beside: What the result gets.
        sources: All models that are merged.
        chosen: Whether the recipe says whose chat template it is.
    """
    own = changed(_generation(beside.model), beside.generation)
    for source in sources:
        theirs = _generation(source.folder)
        keys = [key for key in sorted(theirs.keys() - beside.generation.keys()) if own.get(key) != theirs[key]]
        if keys:
            each = (f"`{key}` {own.get(key)!r:.{_SHOWN}}, not {theirs[key]!r:.{_SHOWN}}" for key in keys)
            listed = ", ".join(each) if own else f"no {GENERATION}"
            yield f"how to generate is not taken over from {source.reference}: the result has {listed}"
    template = template_of(beside.tokenizer)
    others = [s.reference for s in sources if (its := template_of(s.processing)) and its != template]
    if others and not chosen:
        has = "has another one" if template else "has none"
        yield f"the chat template of {', '.join(others)} is not taken over, the result {has}: set `chat_template`"
    tokenizing = [source.reference for source in sources if any(files(source.processing, PROCESSING_FILES))]
    if tokenizing and not any(files(beside.tokenizer, PROCESSING_FILES)):
        yield f"the result has no tokenizer or processor, but {tokenizing[0]} has one: set `tokenizer_source`"


def _generation(folder: Path) -> dict[str, Any]:
    """How a model is to generate; nothing where it does not say it."""
    path = folder / GENERATION
    found = read_object(path) if path.is_file() else {}
    return {key: value for key, value in found.items() if not _ELSEWHERE_GENERATING.search(key) and value is not None}


def _all_differences(reference: Source, sources: Sequence[Source]) -> Iterator[tuple[Source, str, tuple[Any, Any]]]:
    for source in sources:
        if source is not reference and source.config and reference.config:
            yield from ((source, key, values) for key, values in _differences(reference, source).items())


def _differences(one: Source, other: Source) -> dict[str, tuple[Any, Any]]:
    own, theirs = _telling(one.config), _telling(other.config)
    if own.keys() != theirs.keys() and known(one).config and known(other).config:  # by what is missing there, too
        own, theirs = _telling(known(one).config), _telling(known(other).config)
    return {key: (own[key], theirs[key]) for key in own if key in theirs and own[key] != theirs[key]}


def _telling(config: Mapping[str, Any], inside: str = "") -> dict[str, Any]:
    """What decides how a model computes, by keys with dots."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if _ELSEWHERE.search(key) or _IDLE.search(key):
            continue
        found |= _telling(value, f"{inside}{key}.") if isinstance(value, dict) else {f"{inside}{key}": value}
    return found
