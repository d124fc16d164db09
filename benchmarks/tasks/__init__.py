"""Real tasks that need no download: what quality is measured on.

A task is data in three splits and a head that is fitted before anything is fine-tuned and frozen then, so that
encoders which were fine-tuned on different tasks can be merged, and the merged one judged with each task's own head. A
suite is some tasks of one encoder: `digits` (images) and `text`.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

SPLITS = ("train", "val", "test")
STRENGTHS = (0.01, 0.1, 1.0, 10.0)  # of a probe: the inverse of its regularisation, chosen by validation
BATCH = 128  # where nothing is trained


@dataclass(frozen=True)
class Split:
    """Some of a task's rows."""

    inputs: Mapping[str, Tensor]  # what the encoder takes, by name: (n, *shape)
    labels: Tensor  # (n,)

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self) -> list[dict[str, Tensor]]:
        """One dictionary each, as `transformers.Trainer` takes them."""
        names = [*self.inputs, "labels"]
        return [dict(zip(names, row, strict=True)) for row in zip(*self.inputs.values(), self.labels, strict=True)]

    def batches(self) -> Iterable[dict[str, Tensor]]:
        """The inputs alone."""
        for index in torch.arange(len(self)).split(BATCH):
            yield {name: values[index] for name, values in self.inputs.items()}

    def first(self, count: int) -> "Split":
        return Split({name: values[:count] for name, values in self.inputs.items()}, self.labels[:count])


@dataclass(frozen=True)
class Head:
    """A frozen linear layer on the pooled features."""

    weight: Tensor  # (classes, features)
    bias: Tensor  # (classes,)

    def __call__(self, features: Tensor) -> Tensor:  # (n, features) -> (n, classes)
        return F.linear(features, self.weight.to(features.dtype), self.bias.to(features.dtype))


@dataclass(frozen=True)
class Task:
    """One question."""

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    head: Head

    @property
    def splits(self) -> dict[str, Split]:
        return {name: getattr(self, name) for name in SPLITS}

    @cached_property
    def sha256(self) -> str:
        """Of all rows and labels, split by split, and of the classes; not of the head, which follows from the base."""
        return fingerprint(self.classes, self.splits)

    def first(self, train: int, others: int) -> "Task":
        """The same task with fewer rows, to try things out."""
        return replace(self, train=self.train.first(train), val=self.val.first(others), test=self.test.first(others))


def fingerprint(classes: Iterable[str], splits: Mapping[str, Split]) -> str:
    """The sha256 of some data: names, types, shapes and bytes."""
    digest = hashlib.sha256(repr(tuple(classes)).encode())
    for name, split in splits.items():
        for key, values in [*sorted(split.inputs.items()), ("labels", split.labels)]:
            digest.update(repr((name, key, values.dtype, tuple(values.shape))).encode())
            digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_task(task: Task, file: Path) -> None:
    """Write it as one safetensors file, which appears when it is whole."""
    tensors = {"head.weight": task.head.weight.contiguous(), "head.bias": task.head.bias}
    for name, split in task.splits.items():
        tensors |= {f"{name}.{key}": values.contiguous() for key, values in split.inputs.items()}
        tensors[f"{name}/labels"] = split.labels
    part = file.with_suffix(".part")
    save_file(tensors, part, {"name": task.name, "classes": json.dumps(task.classes)})
    part.replace(file)


def load_task(file: Path) -> Task:
    """What `save_task` has written."""
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    train, val, test = (
        Split(
            {key.removeprefix(f"{name}."): v for key, v in tensors.items() if key.startswith(f"{name}.")},
            tensors[f"{name}/labels"],
        )
        for name in SPLITS
    )
    head = Head(tensors["head.weight"], tensors["head.bias"])
    return Task(about["name"], tuple(json.loads(about["classes"])), train, val, test, head)


class Classifier(nn.Module):
    """An encoder, the pooling of its output, and a frozen head; merges and adapters concern the encoder alone."""

    def __init__(self, encoder: nn.Module, pool: Callable[..., Tensor], head: Head) -> None:
        super().__init__()
        self.encoder, self.pool, self.head = encoder, pool, head

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.features(inputs)).float()
        loss = {} if labels is None else {"loss": F.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}

    def features(self, inputs: Mapping[str, Tensor]) -> Tensor:  # (n, features)
        return self.pool(self.encoder(**inputs).last_hidden_state, **inputs)

    @torch.no_grad()
    def correct(self, split: Split) -> Tensor:  # (n,), bool
        """Which rows are answered rightly."""
        self.eval()
        return torch.cat([self(**batch)["logits"].argmax(-1) for batch in split.batches()]) == split.labels


@dataclass(frozen=True)
class Suite:
    """Tasks of one encoder."""

    name: str
    tasks: Mapping[str, Task]
    base: Path | str  # of the encoder: a folder, or a repository's name
    base_sha256: str  # of its weights
    new_encoder: Callable[[], Any]
    pool: Callable[..., Tensor]

    def model(self, task: str) -> Classifier:
        """A new base encoder under the task's head."""
        return Classifier(self.new_encoder(), self.pool, self.tasks[task].head)

    @property
    def in_bf16(self) -> bool:
        return in_bf16(self.name)

    def precision(self) -> torch.autocast:
        """In which its encoder computes."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.in_bf16)


def in_bf16(suite: str) -> bool:
    """Whether a suite's encoder computes in bf16: the large one, where the processor can do it itself."""
    return suite == "text" and torch.cpu._is_avx512_bf16_supported()


def probe(features: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Head:
    """Logistic regression on the training features, as strongly regularised as is best for the validation ones."""
    fits = [
        LogisticRegression(C=strength, max_iter=2000).fit(features["train"].numpy(), labels["train"].numpy())
        for strength in STRENGTHS
    ]
    best = max(fits, key=lambda fit: fit.score(features["val"].numpy(), labels["val"].numpy()))
    weight, bias = (torch.tensor(values.tolist()) for values in (best.coef_, best.intercept_))
    if len(weight) == 1:  # of two classes it has the logit of the second alone
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return Head(weight, bias)


@torch.no_grad()
def features(model: Classifier, splits: Mapping[str, Split]) -> dict[str, Tensor]:  # split -> (n, features)
    """What a probe is fitted on."""
    model.eval()
    return {name: torch.cat([model.features(batch) for batch in split.batches()]) for name, split in splits.items()}


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
