"""The adapter that comes out: the settings that it takes over from those that went in, and its folder."""

import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from hf_modular.adapter_merging._report import AdapterReport
from hf_modular.adapter_merging._source import PREFIX, Source, widest
from hf_modular.adapters._method import Site
from hf_modular.checkpoints import refuse_occupied
from hf_modular.merging.sources._adapter_folder import ADAPTER_WEIGHTS

TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True, eq=False)
class Result:
    """An adapter, named as in PEFT's files, and how it came about."""

    config: Any
    tensors: Mapping[str, Tensor]
    report: AdapterReport


def dressed(config: Any, sources: Sequence[Source], sites: Mapping[str, Site]) -> Any:
    """The config with what the adapters say of their targets, their base model and what they train beside."""
    configs = [source.config for source in sources]
    for name, value in _targets(sources, sites).items():
        setattr(config, name, value)
    for name in ("task_type", "base_model_name_or_path", "revision", "auto_mapping"):
        setattr(config, name, _agreed(getattr(c, name, None) for c in configs))
    saved = dict.fromkeys(name for c in configs for name in getattr(c, "modules_to_save", None) or [])
    config.modules_to_save = [*saved] or None
    config.bias = _bias(config, sources)
    config.inference_mode = True
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = any(source.transposed for source in sources)
    if hasattr(config, "ensure_weight_tying"):
        config.ensure_weight_tying = all(_ties(c) for c in configs)
    return config


def notes_on(sources: Sequence[Source]) -> list[str]:
    """What the user should know of what went in."""
    bases = {str(s.config.base_model_name_or_path) for s in sources if s.config.base_model_name_or_path}
    notes = [f"the adapters name different base models: {sorted(bases)}"] if len(bases) > 1 else []
    for source in sources:
        tasks = getattr(source.config, "tasks", None) or []
        if len(tasks) > 1:
            used = source.config.task or tasks[0]
            notes.append(f"of the {len(tasks)} tasks of {source.reference} the one in use went in: {used}")
    return notes


def in_dtype(tensors: Mapping[str, Tensor], sources: Iterable[Source]) -> dict[str, Tensor]:
    """The tensors in the dtype of the adapters; the widest where they differ."""
    dtype = widest(source.dtype for source in sources)
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def named_in_file(whole: Mapping[str, Tensor], sites: Collection[str] = ()) -> dict[str, Tensor]:
    """What was trained whole by its names in a file, where the biases of adapted layers lie inside of these."""
    parts = {name: name.rpartition(".") for name in whole}
    inside = {name for name, (layer, _, part) in parts.items() if part == "bias" and layer in sites}
    names = {name: name[: -len("bias")] + "base_layer.bias" if name in inside else name for name in whole}
    return {f"{PREFIX}{names[name]}": tensor for name, tensor in whole.items()}


def write(
    result: Result, folder: str | Path, *, overwrite: bool = False, more: Callable[[Path], None] | None = None
) -> None:
    """Write the adapter's folder. The weights come last: until then there is no adapter in it."""
    folder = Path(folder)
    refuse_occupied(folder, overwrite=overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".adapter-") as staging:
        staged = Path(staging)
        result.config.save_pretrained(staging)
        result.report.save(staged)
        if more is not None:
            more(staged)
        save_file(
            {n: t.cpu().contiguous() for n, t in result.tensors.items()}, staged / ADAPTER_WEIGHTS, {"format": "pt"}
        )
        (folder / ADAPTER_WEIGHTS).unlink(missing_ok=True)
        for path in sorted(staged.iterdir(), key=lambda path: path.name == ADAPTER_WEIGHTS):
            path.replace(folder / path.name)


def _targets(sources: Sequence[Source], sites: Mapping[str, Site]) -> dict[str, Any]:
    """As the first adapter has them if it has all layers, else the layers by their names."""
    first = sources[0]
    same = first.sites.keys() == sites.keys() and getattr(first.config, "target_modules", None)
    if same and not _ties(first.config):  # which puts adapters on layers that no target is called
        return {name: getattr(first.config, name, None) for name in TARGETS}
    return dict.fromkeys(TARGETS) | {"target_modules": sorted(sites)}


def _ties(config: Any) -> bool:
    return bool(getattr(config, "ensure_weight_tying", False))


def _agreed(values: Iterable[Any]) -> Any:
    """What all say, or None."""
    first, *others = values
    return first if all(other == first for other in others) else None


def _bias(config: Any, sources: Sequence[Source]) -> str:
    """Which of the model's own biases come with the adapter."""
    kinds = {str(getattr(source.config, "bias", None) or "none").rpartition("_")[2] for source in sources}
    if len(kinds) > 1:
        raise ValueError(
            f"The adapters must train the same of the model's own biases, but their `bias` is {sorted(kinds)}."
        )
    kind = kinds.pop()
    return f"{config.peft_type.value.lower()}_only" if kind == "only" else kind
