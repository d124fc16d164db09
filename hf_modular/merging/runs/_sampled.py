"""A merge of a few of the tensors, to try it or to repeat it."""

import random
from collections.abc import Callable, Collection, Mapping

import torch

from hf_modular.checkpoints import TensorInfo
from hf_modular.merging.engine._companions import Companion
from hf_modular.merging.engine._engine import Engine, Inputs

Reading = Callable[[Inputs, Mapping[str, TensorInfo]], Inputs]  # other inputs that give the same tensors


def infos(engine: Engine) -> dict[str, TensorInfo]:
    """The tensors of the result."""
    return {name: TensorInfo(like.dtype, tuple(like.shape)) for name, like in engine.plan.items()}


def sample(sizes: Mapping[str, int], seed: int, elements: int, tensors: int) -> set[str]:
    """Some names, of tensors that are not too large together."""
    names = sorted(sizes)
    random.Random(seed).shuffle(names)
    chosen: set[str] = set()
    for name in names:
        if len(chosen) < tensors and sizes[name] <= elements:
            chosen.add(name)
            elements -= sizes[name]
    return chosen


def part_of(engine: Engine, names: Collection[str], reading: Reading, device: torch.device) -> Engine:
    """The same merge of some of its tensors."""
    plan = {name: info for name, info in infos(engine).items() if name in names}
    companions = {kind: [_beside(each, plan, reading) for each in those] for kind, those in engine.companions.items()}
    return Engine(
        plan=plan,
        settings={name: engine.settings[name] for name in plan},
        method=engine.method,
        base=reading(engine.base, plan) if engine.base else None,
        models=[reading(model, plan) for model in engine.models],
        carrier=reading(engine.carrier, plan),
        seed=engine.seed,
        device=device,
        companions=companions,
        arithmetic=engine.arithmetic,
    )


def _beside(companion: Inputs, plan: Mapping[str, TensorInfo], reading: Reading) -> Inputs:
    found = reading(companion, {name: plan[name] for name in plan if name in companion.tensors})
    return found if isinstance(found, Companion) else Companion(found, plan)
