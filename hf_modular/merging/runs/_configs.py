"""Settings in which the configs of models differ although their tensors match, such as those of rotary positions."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hf_modular.merging.sources._names import known
from hf_modular.merging.sources._sources import Source

# what is looked at elsewhere, and what does not change the numbers that a model computes
_ELSEWHERE = re.compile(
    r"^_|version|dtype|architectures|label|problem_type|num_classes|vocab|token|tie_|layers?$|n_layer|depth|quantiz"
    r"|auto_map|name_or_path|finetuning_task|task_specific"
)
_IDLE = re.compile(
    r"drop|init|use_cache|output_|return_dict|checkpointing|chunk_size|torchscript|pruned|aux_loss|^(min|max)_length"
    r"|beam|temperature|top_[kp]|penalty|do_sample|early_stopping|ngram|num_return|prefix|unsloth|pretraining_tp"
)
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
