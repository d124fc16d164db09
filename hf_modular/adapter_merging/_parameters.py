"""Merging in parameter space: parameters of adapters of one type, settings and shapes are merged one by one.

That means something where a parameter says the same in every adapter: factors of outputs or inputs, which begin at 1,
coefficients of a fixed basis, which begin at 0, and networks that began at the same random numbers. It means nothing
for the matrices of LoRA, since B A = (B R)(R⁻¹ A) for any R.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_modular.adapter_merging._live import prefix_of
from hf_modular.adapter_merging._result import named_in_file
from hf_modular.adapter_merging._running import Settings, call_problems, run
from hf_modular.adapter_merging._source import PREFIX, Base, Source, differing_settings
from hf_modular.adapter_merging._weights import Beside
from hf_modular.merging import MergeMethod
from hf_modular.merging.engine._preflight import disagreements, refuse
from hf_modular.merging.runs._memory import InMemory, Merged

Start = Callable[[str, Any], float | None]  # (name, config) -> where a parameter begins; None: at random

# Settings in which adapters may differ and still be of one kind.
_HARMLESS = (
    "auto_mapping",
    "base_model_name_or_path",
    "dropout",
    "inference_mode",
    "init_weights",
    "init_ia3_weights",
    "init_std",
    "modules_to_save",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
)


def _ones(name: str, config: Any) -> float | None:
    return 0.0 if name.endswith(".shift") else 1.0


def _zeros(name: str, config: Any) -> float | None:
    return 0.0


def _hut(name: str, config: Any) -> float | None:
    if config.form == "low_rank":
        raise ValueError(_meaningless("HFM_HUT with form='low_rank'"))
    return _ones(name, config)


def _random(name: str, config: Any) -> float | None:
    return None


_STARTS: dict[str, Start] = {
    "C3A": _zeros,
    "FOURIERFT": _zeros,
    "HFM_COMPACTER": _random,
    "HFM_HUT": _hut,
    "HFM_MOS": _random,
    "HFM_SSF": _ones,
    "IA3": _ones,
    "LN_TUNING": _random,
}


def _meaningless(kind: str) -> str:
    return (
        f"The parameters of {kind} mean something only together, so that merging them one by one (space='parameters') "
        f"would give something else; this can be done for {sorted(_STARTS)}. Use space='weights'."
    )


def merge_parameters(
    sources: Sequence[Source], base: Base, method: MergeMethod, settings: Settings, seed: int
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of the merged adapter, by their names in a file, and notes."""
    kind = _require_one_kind(sources)
    if kind not in _STARTS:
        raise ValueError(_meaningless(kind))
    beside = Beside(sources, base)
    models = [_whole_file(source, beside) for source in sources]
    start = _start(sources, models[0], beside, _STARTS[kind])
    if method.base_model == "required":
        _require_start(start, models[0], method.name, kind)
    uses_base = method.base_model != "unused" and start.keys() == models[0].keys()
    labelled = {source.reference: model for source, model in zip(sources, models, strict=True)}
    resolved = settings([*models[0]])
    refuse(
        [
            *disagreements(models[0], labelled),
            *_routing(models),
            *call_problems(method, resolved, len(sources), uses_base),
        ]
    )
    inputs = [InMemory(label, model) for label, model in labelled.items()]
    begun = InMemory("the start of the adapters", start) if uses_base else None
    merged = Merged({name: torch.empty_like(tensor) for name, tensor in models[0].items()})
    notes = run(method, resolved, models[0], begun, inputs, merged, seed)
    whole = {name: merged.tensors.pop(f"{PREFIX}{name}") for name in beside.plan if f"{PREFIX}{name}" in models[0]}
    return merged.tensors | named_in_file(whole | beside.carried, _adapted(sources[0])), notes


def _adapted(source: Source) -> set[str]:
    """The layers that hold parameters of the adapter."""
    mark = f".{prefix_of(source.config)}"
    return {name.removeprefix(PREFIX).partition(mark)[0] for name in source.tensors()}


def _require_one_kind(sources: Sequence[Source]) -> str:
    kinds = {source.reference: str(source.config.peft_type.value) for source in sources}
    if len(set(kinds.values())) > 1:
        raise ValueError(f"space='parameters' merges adapters of one type, but they are {kinds}. Use space='weights'.")
    if differing := differing_settings([source.config for source in sources], _HARMLESS):
        values = {s.reference: {name: getattr(s.config, name) for name in differing} for s in sources}
        raise ValueError(f"space='parameters' merges adapters of one kind, but their settings differ: {values}.")
    return next(iter(kinds.values()))


def _whole_file(source: Source, beside: Beside) -> dict[str, Tensor]:
    """All that is merged of an adapter; what it has not trained whole is the base's."""
    tensors = dict(source.tensors())
    for name in beside.plan:
        value = source.whole.get(name)
        value = beside.base.tensor(name) if value is None else value
        if value is not None:
            tensors[f"{PREFIX}{name}"] = value
    return tensors


def _start(
    sources: Sequence[Source], tensors: Mapping[str, Tensor], beside: Beside, start: Start
) -> dict[str, Tensor]:
    """Where each tensor began, as far as that is known."""
    found = {}
    for name, tensor in tensors.items():
        value: Tensor | None
        if name.removeprefix(PREFIX) in beside.plan:
            value = beside.base.tensor(name.removeprefix(PREFIX))
        else:
            number = start(name, sources[0].config)
            value = None if number is None else torch.full_like(tensor, number)
        if value is not None:
            found[name] = value
    return found


def _require_start(start: Mapping[str, Tensor], tensors: Mapping[str, Tensor], method: str, kind: str) -> None:
    unknown = [name for name, t in tensors.items() if name not in start and t.is_floating_point()]
    if unknown:
        raise ValueError(
            f"{method!r} needs to know where the parameters began, but that is not known of {unknown[:3]} ({kind}). "
            "Use `linear`, or another method without a base."
        )


def _routing(models: Sequence[Mapping[str, Tensor]]) -> list[str]:
    """Indices, of shards for example, say which parameters belong together: they must be the same."""
    first, *others = models
    return [
        f"{name} ({tensor.dtype}) must be the same in all adapters, which belong to different parameters otherwise"
        for name, tensor in first.items()
        if not tensor.is_floating_point() and any(name in o and not torch.equal(tensor, o[name]) for o in others)
    ]
