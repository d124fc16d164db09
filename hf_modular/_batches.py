"""Examples of a data set as batches without padding, and a model that only looks at them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

LABELS = ("labels", "label")


class Rows(Protocol):
    """A data set: examples by number, as a `datasets.Dataset` or a list has them."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


def batches(dataset: Rows, size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Those of the same shapes together, in the order in which shapes first occur; what is no number is left out."""
    alike: dict[Any, list[dict[str, Tensor]]] = {}
    for i in range(len(dataset)):
        row = _tensors(dataset[i])
        alike.setdefault(tuple((name, tuple(x.shape)) for name, x in sorted(row.items())), []).append(row)
    for rows in alike.values():
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            yield {name: torch.stack([row[name] for row in part]).to(device) for name in part[0]}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout, for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _tensors(row: Mapping[str, Any]) -> dict[str, Tensor]:
    """The numbers of a row, the labels under the name that models have for them."""
    found = {"labels" if name in LABELS else name: value for name, value in row.items()}
    return {name: torch.as_tensor(value) for name, value in found.items() if _is_numeric(value)}


def _is_numeric(value: Any) -> bool:
    if isinstance(value, Tensor) or hasattr(value, "__array__"):
        return True
    first = value
    while isinstance(first, Iterable) and not isinstance(first, (str, bytes)):
        first = next(iter(first), None)
    return isinstance(first, (int, float))
