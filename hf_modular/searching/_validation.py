"""What a merged model is worth: a metric on a data set, or what a program says."""

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_modular._batches import LABELS, Rows, batches
from hf_modular.fisher._loading import load_model, load_texts
from hf_modular.merging import MergeRecipe

IGNORED = -100  # a label that does not count


class Metric(Protocol):
    """A metric of the library `evaluate`, as `evaluate.load` gives it."""

    def compute(self, *, predictions: Any, references: Any) -> Mapping[str, Any] | None: ...


@dataclass(frozen=True)
class Validation:
    """A metric of a model's predictions on a data set, as a function of the model's folder.

    Args:
        dataset: Examples without padding: what the model takes, without a batch axis, and labels. For causal language
            models tokens are enough. Take a validation split: what is chosen by test data cannot be tested by them.
        metric: "accuracy" and "loss" are computed here: the share of right classes, and minus the mean loss of a label
            or token. A metric of `evaluate` gets classes, or numbers if the model has one output.
        key: Which of the metric's numbers to take, if it gives several.
        batch_size: How many examples are taken at once. Only those of one shape are, so nothing is padded.
        device: Where the model is evaluated; "auto" for the accelerator if there is one.
    """

    dataset: Rows
    metric: str | Metric = "accuracy"
    key: str | None = None
    batch_size: int = 32
    device: str = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.metric, str) and self.metric not in ("accuracy", "loss"):
            raise ValueError(
                f"`metric` must be 'accuracy', 'loss' or a metric of evaluate, but got metric={self.metric!r}: "
                f"evaluate.load({self.metric!r}) runs code of the Hub, so call it yourself"
            )
        if len(self.dataset) == 0:
            raise ValueError("a validation needs at least one example, but the data set is empty")

    def __call__(self, folder: Path) -> float:
        return self.of_model(load_model(str(folder), self.device))

    @torch.no_grad()
    def of_model(self, model: nn.Module) -> float:
        """The metric of a model in memory."""
        model.eval()
        return self._mean_log_likelihood(model) if self.metric == "loss" else self._of_predictions(model)

    def _mean_log_likelihood(self, model: nn.Module) -> float:
        total = count = 0.0
        for batch in batches(self.dataset, self.batch_size, next(model.parameters()).device):
            labels = batch.pop("labels", batch.get("input_ids"))
            if labels is None:
                raise ValueError("a loss needs labels or tokens, but the examples have neither")
            output = model(**batch, labels=labels)
            shifted = labels[:, 1:] if output.logits.ndim == 3 and _is_causal(model) else labels
            counted = int((shifted != IGNORED).sum())
            total, count = total + float(output.loss) * counted, count + counted
        return -total / count

    def _of_predictions(self, model: nn.Module) -> float:
        predictions, references = [], []
        for batch in batches(self.dataset, self.batch_size, next(model.parameters()).device):
            if "labels" not in batch:
                raise ValueError(f"a metric needs labels, {' or '.join(LABELS)}, but the examples have none")
            references.append(batch.pop("labels").cpu())
            predictions.append(_predicted(model(**batch).logits).cpu())
        return self._computed(torch.cat(predictions), torch.cat(references))

    def _computed(self, predictions: Tensor, references: Tensor) -> float:
        if isinstance(self.metric, str):
            if predictions.shape != references.shape or predictions.is_floating_point():
                raise ValueError(
                    f"accuracy needs one class for each example, but there are labels {tuple(references.shape)} and "
                    f"predictions {tuple(predictions.shape)} of {predictions.dtype}"
                )
            return float((predictions == references).double().mean())
        found = self.metric.compute(predictions=predictions.tolist(), references=references.tolist()) or {}
        key = self.key or (next(iter(found)) if len(found) == 1 else None)
        if key is None or key not in found:
            raise ValueError(f"`key` must be one of {sorted(found)}, which the metric gives, but got key={self.key!r}")
        return float(found[key])


@dataclass(frozen=True)
class Command:
    """A program that evaluates a model: the last line that it prints is the score.

    Args:
        line: The program and its arguments, `{model}` among them in the place of the model's folder. It is started
            as it is, not by a shell.
    """

    line: str

    def __post_init__(self) -> None:
        if "{model}" not in self.line:
            raise ValueError(
                f"the command must have {{model}} in the place of the model's folder, but got {self.line}"
            )

    def __call__(self, folder: Path) -> float:
        command = [part.replace("{model}", str(folder)) for part in shlex.split(self.line)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"{shlex.join(command)} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
        last = (done.stdout.strip().splitlines() or [""])[-1]
        try:
            return float(last)
        except ValueError:
            raise ValueError(f"{shlex.join(command)} must print a number at last, but printed {last!r:.200}") from None


def _predicted(logits: Tensor) -> Tensor:
    """Classes, or numbers if there is one output."""
    return logits.squeeze(-1) if logits.shape[-1] == 1 else logits.argmax(-1)


def _is_causal(model: nn.Module) -> bool:
    generates: bool = getattr(model, "can_generate", lambda: False)()
    return generates and not getattr(model.config, "is_encoder_decoder", False)


def load_metric(name: str) -> str | Metric:
    """A metric by its name; what is not computed here is code that `evaluate` loads and runs."""
    if name in ("accuracy", "loss"):
        return name
    import evaluate

    metric: Metric = evaluate.load(name)
    return metric


def load_rows(recipe: str | Path, dataset: str, split: str, columns: Sequence[str], **options: Any) -> Any:
    """Texts as tokens of the tokenizer that the merged model of a recipe has."""
    return load_texts(dataset, split, MergeRecipe.load(recipe).tokenizer_model, columns, **options)
