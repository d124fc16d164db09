"""Merging state dicts that are in memory."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_modular.merging._method import MergeMethod
from hf_modular.merging.engine._companions import Companion, companion_problems, without
from hf_modular.merging.engine._engine import Engine
from hf_modular.merging.engine._preflight import disagreements, refuse, setting_problems, unmergeable
from hf_modular.merging.engine._workers import Workers
from hf_modular.merging.recipes._settings import Resolved

StateDict = Mapping[str, Tensor]


def merge_state_dicts(
    base: StateDict | None,
    models: Sequence[StateDict],
    config: MergeMethod,
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    companions: Mapping[str, Sequence[StateDict]] | None = None,
) -> dict[str, Tensor]:
    """Merge state dicts in memory.

    Args:
        base: What the models were fine-tuned from. None for a method that needs no base, such as `LinearConfig`.
        models: The state dicts to merge, with the same names and shapes.
        config: The method and its settings.
        weights: The weight of each model; 1 each by default.
        seed: For methods that draw random numbers. The same seed gives the same bits.
        companions: What a method needs of each model beside its weights, such as {"fisher": [one, another]}.

    Returns:
        A new state dict in the dtypes of the base (of the first model if there is none). Arithmetic is in fp32 (fp64
        where an input is), rounded once. Tensors that hold no floating-point numbers are the base's.
    """
    refuse(_call_problems(base, models, config, weights))
    inputs = [InMemory(f"model {i}", model) for i, model in enumerate(models)]
    reference = inputs[0] if base is None else InMemory("the base", base)
    engine = engine_of(reference, base is not None, inputs, config, weights, seed, companions)
    refuse(_tensor_problems(engine, reference, inputs))
    merged = Merged({name: torch.empty_like(reference.tensors[name]) for name in engine.plan})
    with Workers(None) as pool:
        engine.run(merged, pool, progress=lambda name, size: None)
    for note in [*engine.notes, *without(engine.plan, engine.companions)]:
        warnings.warn(note, stacklevel=2)
    tied = _tied(reference, inputs)
    return {name: merged.tensors[tied.get(name, name)] for name in reference.tensors}


@dataclass(frozen=True, eq=False)
class InMemory:
    """A state dict as the engine reads it."""

    reference: str
    tensors: StateDict

    def fill(self, name: str, start: int, out: Tensor) -> None:
        out.copy_(self._flat[name][start : start + out.numel()])

    @cached_property
    def _flat(self) -> dict[str, Tensor]:
        return {name: tensor.detach().reshape(-1) for name, tensor in self.tensors.items()}


@dataclass(frozen=True, eq=False)
class Merged:
    """A state dict as the engine writes it."""

    tensors: dict[str, Tensor]

    def write(self, name: str, data: Tensor, start: int) -> None:
        self.tensors[name].view(-1)[start : start + data.numel()] = data


def engine_of(
    reference: InMemory,
    has_base: bool,
    models: Sequence[InMemory],
    config: MergeMethod,
    weights: Sequence[float] | None,
    seed: int,
    companions: Mapping[str, Sequence[StateDict]] | None = None,
) -> Engine:
    """The engine for state dicts; `reference` is the base if there is one, else what the result is shaped after."""
    tied = _tied(reference, models)
    plan = {name: tensor for name, tensor in reference.tensors.items() if name not in tied}
    resolved = Resolved(config, tuple(map(float, weights or [1.0] * len(models))), {})
    return Engine(
        plan=plan,
        settings=dict.fromkeys(plan, resolved),
        method=config,
        base=reference if has_base and config.base_model != "unused" else None,
        models=models,
        carrier=reference,
        seed=seed,
        device=next((tensor.device for tensor in plan.values()), torch.device("cpu")),
        companions={
            kind: [Companion(InMemory(f"{kind} {i}", state), plan) for i, state in enumerate(states)]
            for kind, states in (companions or {}).items()
        },
    )


def _call_problems(
    base: StateDict | None, models: Sequence[StateDict], config: MergeMethod, weights: Sequence[float] | None
) -> list[str]:
    low, high = config.model_counts
    found = []
    if not low <= len(models) <= high:
        found.append(f"{config.name!r} merges from {low} to {high} models beside the base, but got {len(models)}")
    if config.base_model == "required" and base is None:
        found.append(f"{config.name!r} needs a base, but got base=None")
    if weights is not None and len(weights) != len(models):
        found.append(f"each of the {len(models)} models needs one weight, but got {weights=}")
    return found


def _tensor_problems(engine: Engine, reference: InMemory, models: Sequence[InMemory]) -> list[str]:
    labelled = {model.reference: model.tensors for model in models}
    unfit = [
        unmergeable(tensors, label) for label, tensors in {reference.reference: reference.tensors, **labelled}.items()
    ]
    unfit.append(companion_problems(engine.method, engine.plan, len(models), engine.companions))
    found = [*disagreements(reference.tensors, labelled), *(problem for problems in unfit for problem in problems)]
    return [*found, *setting_problems(engine.settings, len(models), engine.base is not None)]


def _tied(reference: InMemory, models: Sequence[InMemory]) -> dict[str, str]:
    """Names that share their memory with an earlier name, in every state dict: merged once, as they were."""
    first, *others = (_earlier(model.tensors) for model in (reference, *models))
    return {name: name_of for name, name_of in first.items() if all(other.get(name) == name_of for other in others)}


def _earlier(model: StateDict) -> dict[str, str]:
    """For each name that shares memory and shape with an earlier one: that one."""
    first: dict[tuple[object, ...], str] = {}
    found = {}
    for name, tensor in model.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        if (earlier := first.setdefault(place, name)) != name and tensor.numel():
            found[name] = earlier
    return found
