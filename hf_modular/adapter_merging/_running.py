"""The merge engine on adapters."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from hf_modular.merging import MergeMethod
from hf_modular.merging.engine._engine import Engine, Inputs, Output
from hf_modular.merging.engine._preflight import TensorLike, setting_problems
from hf_modular.merging.engine._workers import Workers
from hf_modular.merging.recipes._settings import Resolved

Settings = Callable[[Sequence[str]], Mapping[str, Resolved]]  # of tensors, by their names


def call_problems(method: MergeMethod, settings: Mapping[str, Resolved], count: int, has_base: bool) -> Iterator[str]:
    """What the method has against the number of adapters and their settings."""
    low, high = method.model_counts
    if not low <= count <= high:
        yield f"{method.name!r} merges from {low} to {high} adapters, but got {count}"
    if method.needs:
        yield f"{method.name!r} needs {sorted(method.needs)}, which adapters do not come with"
    yield from setting_problems(settings, count, has_base)


def run(
    method: MergeMethod,
    settings: Mapping[str, Resolved],
    plan: Mapping[str, TensorLike],
    base: Inputs | None,
    models: Sequence[Inputs],
    output: Output,
    seed: int,
) -> list[str]:
    """Merge; returns what the engine notes."""
    engine = Engine(
        plan=plan,
        settings=settings,
        method=method,
        base=base,
        models=models,
        carrier=base or models[0],
        seed=seed,
        device=torch.device("cpu"),
    )
    with Workers(None) as pool:
        engine.run(output, pool, progress=lambda name, size: None)
    return [*engine.notes]
