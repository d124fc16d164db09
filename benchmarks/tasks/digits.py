"""The demo's handwritten digits: a small ViT trained on all of the views, and one task for each view.

All tasks have the base's own head, so a merged encoder needs no choice of head. The base learns a little of every
view; fine-tuning on one view makes it better there and worse elsewhere, which is what merging has to mend.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import ViTModel

from hf_modular.demo.digits import TASKS, VIEWS, Part, load
from hf_modular.demo.training import BASE_EPOCHS, train_base
from tasks import SPLITS, Head, Split, Suite, Task, file_sha256

WEIGHTS = "model.safetensors"


def suite(cache: Path, names: Sequence[str] = TASKS, base_epochs: int = BASE_EPOCHS) -> Suite:
    """The tasks named, on a base that is trained unless it lies in the cache; `tuple(VIEWS)` names them all."""
    base = cache / f"digits-base-{base_epochs}"
    if not (base / WEIGHTS).is_file():
        train_base(base, epochs=base_epochs)
    weights = load_file(base / WEIGHTS)
    head = Head(weights["classifier.weight"], weights["classifier.bias"])

    def new_encoder() -> Any:
        return ViTModel.from_pretrained(base, add_pooling_layer=False)

    made = {name: task(name, head) for name in names}
    return Suite("digits", made, base, file_sha256(base / WEIGHTS), new_encoder, first_token)


def task(name: str, head: Head) -> Task:
    """One view; where it is random, always in the same way."""
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(name.encode()))
        parts = load()
        train, val, test = (_split(parts[part].seen_as(name)) for part in SPLITS)
    return Task(name, tuple("0123456789"), train, val, test, head)


def _split(part: Part) -> Split:
    return Split({"pixel_values": part.images.contiguous()}, part.labels)


def first_token(states: Tensor, **inputs: Tensor) -> Tensor:  # (n, tokens, features) -> (n, features)
    return states[:, 0]


__all__ = ["TASKS", "VIEWS", "suite", "task"]
