"""From the rows of a data set to what a model takes, and from what it returns to scores of labels."""

from collections.abc import Mapping
from hashlib import blake2b
from inspect import signature
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from hf_modular.fisher._likelihood import IGNORED, Labels, Problem, scores
from hf_modular.fisher._per_example import Example

_LABELS = ("labels", "label", "label_ids")  # as transformers' data collators have them


class Rows(Protocol):
    """A data set: examples by number, as a `datasets.Dataset` or a list has them."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class Reader:
    """Reads the rows that a model needs.

    Args:
        model: Its forward's arguments are the columns that count.
        labels: Where labels come from; "auto" for the exact expectation where an example has few.
        problem: What the logits are; None for what the model's config says, or what their shape suggests.
        seed: For sampled labels; those of an example depend on it and on the example's number alone.
    """

    def __init__(
        self, model: nn.Module, labels: Literal["auto"] | Labels, problem: Problem | None = None, seed: int = 0
    ) -> None:
        inner = getattr(model, "get_base_model", lambda: model)()  # a PEFT model takes anything
        config = getattr(inner, "config", None)
        first = next(model.parameters())
        self.device, self.dtype = first.device, first.dtype
        self.inputs = [name for name in signature(inner.forward).parameters if name not in _LABELS]
        self.labels, self.seed = labels, seed
        self.problem = problem or getattr(config, "problem_type", None)
        generates = getattr(inner, "can_generate", lambda: False)()
        self.causal = bool(generates and not getattr(config, "is_encoder_decoder", False))

    def example(self, row: Mapping[str, Any], index: int) -> Example:
        """The inputs of a row, its labels if it has any, and the random numbers for its sampled labels."""
        found = {key: self._tensor(row[key]) for key in self.inputs if row.get(key) is not None}
        if not found:
            raise ValueError(f"an example must have inputs of the model, {self.inputs}, but has {sorted(row)}")
        labels = next((torch.as_tensor(row[key]) for key in _LABELS if row.get(key) is not None), None)
        if labels is None and self.causal:
            labels = found["input_ids"].masked_fill(found.get("attention_mask", torch.tensor(1)) == 0, IGNORED)
        if labels is not None:
            found["labels"] = labels.to(self.device)
        return found | {"draws": self._draws(found, index)}

    def scores(self, logits: Tensor, example: Example) -> tuple[Tensor, Tensor]:
        """The scores of the output for an example and their weights, (K,) each."""
        problem = self._problem(logits)
        labels, draws = example.get("labels"), example["draws"]
        if problem == "tokens" and self.causal:
            logits, draws = logits[:-1], draws[1:]
            labels = None if labels is None else labels[1:]
        elif problem == "single_label_classification":
            draws = draws[0]
            labels = None if labels is None else labels.reshape(())
        return scores(logits, labels, draws, self._source(problem), problem)

    def _tensor(self, value: Any) -> Tensor:
        tensor = torch.as_tensor(value)
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)

    def _draws(self, example: Example, index: int) -> Tensor:  # (places,)
        places = next((len(example[key]) for key in ("labels", "input_ids") if _is_list(example.get(key))), 1)
        key = blake2b(f"{self.seed}\0{index}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
        return torch.rand(places, generator=generator).to(self.device)

    def _problem(self, logits: Tensor) -> Problem:
        if logits.ndim == 2:
            return "tokens"
        if logits.ndim != 1:
            raise ValueError(
                "an example's logits must be (classes,) or (places, vocabulary), but have the shape "
                f"{tuple(logits.shape)}"
            )
        return self.problem or ("regression" if len(logits) == 1 else "single_label_classification")

    def _source(self, problem: Problem) -> Labels:
        if self.labels == "auto":
            return "sampled" if problem == "tokens" else "expected"
        if self.labels == "expected" and problem == "tokens":
            raise ValueError('the expectation over all labels of all places is too much: use labels="sampled"')
        if self.labels == "sampled" and problem in ("regression", "multi_label_classification"):
            raise ValueError(f'labels of {problem} need not be sampled: labels="expected" is exact and costs no more')
        return self.labels


def _is_list(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.ndim == 1
