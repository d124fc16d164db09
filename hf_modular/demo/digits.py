"""The data: the 1,797 handwritten digits of scikit-learn (8 x 8 scans, UCI), and tasks made by transforming them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor


def _occluded(images: Tensor) -> Tensor:  # (n, 1, 8, 8)
    """With an empty square of 4 x 4 pixels somewhere."""
    corners = torch.randint(0, 5, (2, len(images), 1))
    rows, columns = ((corner <= torch.arange(8)) & (torch.arange(8) < corner + 4) for corner in corners)  # (n, 8)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], -1)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "rotated": lambda x: x.rot90(1, (-2, -1)),
    "mirrored": lambda x: x.flip(-1),
    "negative": lambda x: -x,
    "upside-down": lambda x: x.rot90(2, (-2, -1)),
    "halves swapped": lambda x: x.roll(4, -2),
    "rows reordered": lambda x: torch.cat([x[..., 1::2, :], x[..., ::2, :]], -2),
    "noisy": lambda x: x + 0.7 * torch.randn_like(x),
    "occluded": _occluded,
}
# The base learns a little of every view. A task is one view alone; all ask the same question, so one head serves all.
TASKS = ("rotated", "mirrored", "negative", "upside-down")

# Fixed, whatever the seed: no run sees another's test images.
SIZES = {"test": 500, "val": 200, "base": 400, "train": 697}


@dataclass(frozen=True)
class Part:
    """Some of the scans."""

    images: Tensor  # (n, 1, 8, 8) in [-1, 1]
    labels: Tensor  # (n,)

    def seen_as(self, view: str) -> "Part":
        return Part(VIEWS[view](self.images), self.labels)

    def __len__(self) -> int:
        return len(self.labels)


def load() -> dict[str, Part]:
    """The parts named in `SIZES`; no image is in two of them."""
    scans = load_digits()
    images = torch.tensor(scans.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(scans.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = order.split(list(SIZES.values()))
    return {name: Part(images[index], labels[index]) for name, index in zip(SIZES, parts, strict=True)}


def one_of_each(part: Part) -> Part:
    """The first image of every digit, from 0 to 9."""
    index = torch.stack([(part.labels == digit).nonzero()[0, 0] for digit in range(10)])
    return Part(part.images[index], part.labels[index])
