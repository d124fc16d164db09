"""Whether models have a common origin: how far they are from each other, on a sample of their weights.

Fine-tuning moves weights by a small part of their size. Models that were trained apart are as far from each other as
they are large, and what is merged of them is of no use.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hf_modular.merging.engine._engine import Inputs
from hf_modular.merging.engine._preflight import TensorLike

STRANGE = 0.9  # unrelated weights give at least 1, but for chance
_TENSORS = 8
_ELEMENTS = 1 << 14  # of each


def distances(reference: Inputs, models: Sequence[Inputs], plan: Mapping[str, TensorLike]) -> dict[str, float]:
    """‖model - reference‖ / ‖reference‖ of each model, on a sample of a plan's matrices."""
    others = [model for model in models if model.reference != reference.reference]
    names = [name for name, like in plan.items() if len(like.shape) > 1 and like.dtype.is_floating_point]
    sample = names[:: max(len(names) // _TENSORS, 1)][:_TENSORS] if others else []
    size, apart = 0.0, [0.0] * len(others)
    for name in sample:
        own = _middle(reference, name, plan[name])
        size += float(own.square().sum())
        moved = (_middle(model, name, plan[name]) - own for model in others)
        apart = [far + float(delta.square().sum()) for far, delta in zip(apart, moved, strict=True)]
    return {m.reference: math.sqrt(far / size) for m, far in zip(others, apart, strict=True) if size > 0}


def strangers(reference: str, found: Mapping[str, float]) -> Iterator[str]:
    """What to say of models that are too far."""
    for model, distance in found.items():
        if distance >= STRANGE:
            yield (
                f"the difference between {model} and {reference} is {distance:.2f} times as large as {reference} "
                "itself, on a sample: only models that were fine-tuned from one base merge well"
            )


def _middle(model: Inputs, name: str, like: TensorLike) -> Tensor:  # (elements,)
    total = math.prod(like.shape)
    out = torch.empty(min(total, _ELEMENTS), dtype=torch.float64)
    model.fill(name, (total - len(out)) // 2, out)
    return out
