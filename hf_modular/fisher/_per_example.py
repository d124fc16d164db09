"""Squared gradients of single examples: the square of a batch's gradient would hold the products of its examples, too.

vmap takes the examples of one shape and one attention mask together. Where a model cannot be mapped, for it looks at
numbers to decide what it does, they are taken one after the other.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

Example = dict[str, Tensor]  # no batch axis
Scores = Callable[[Tensor, Example], tuple[Tensor, Tensor]]  # logits -> scores and weights, (K,) each

_MASKS = ("attention_mask", "decoder_attention_mask")  # models decide by their numbers


@dataclass
class SquaredGradients:
    """Σₖ wₖ (∂sₖ/∂θ)², summed over examples.

    Args:
        model: In evaluation mode.
        parameters: Those to differentiate by, by name.
        scores: Of the output for an example.
        inputs: The keys of an example that the model is given.
        mapped: Whether vmap is used; None to find out.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    scores: Scores
    inputs: Sequence[str]
    mapped: bool | None = None

    def add(self, examples: Sequence[Example], sums: Mapping[str, Tensor], at_once: int) -> None:
        """Add those of the examples to the sums, with `at_once` examples or fewer in memory."""
        for group in _alike(examples, at_once):
            for term in self._terms(group):
                for name, square in term.items():
                    sums[name].add_(square)

    def _terms(self, group: Sequence[Example]) -> Iterable[dict[str, Tensor]]:
        if self.mapped is False:
            return self._one_by_one(group)
        try:
            return [self._together(group)]
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError, ValueError) as error:
            if self.mapped:
                raise
            reason = str(error).strip().splitlines()[0][:200]
            warnings.warn(f"examples are taken one by one, since vmap cannot map the model: {reason}", stacklevel=2)
            self.mapped = False
            return self._one_by_one(group)

    def _together(self, group: Sequence[Example]) -> dict[str, Tensor]:
        detached = {name: parameter.detach() for name, parameter in self.parameters.items()}
        shared = {key: group[0][key] for key in _MASKS if key in group[0]}
        batch = {key: torch.stack([example[key] for example in group]) for key in group[0].keys() - shared.keys()}

        def squares(example: Example) -> dict[str, Tensor]:
            def output(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
                return self._scores(parameters, example | shared)

            scores, pull, weights = vjp(output, detached, has_aux=True)  # type: ignore[misc]
            return _weighted(self.parameters, weights, (pull(unit)[0] for unit in torch.eye(len(scores)).to(scores)))

        with _without_speed_warnings():
            return {name: rows.sum(0) for name, rows in vmap(squares)(batch).items()}

    def _one_by_one(self, group: Sequence[Example]) -> Iterator[dict[str, Tensor]]:
        for example in group:
            with _differentiable(self.model, self.parameters):
                scores, weights = self._scores({}, example)
                yield _weighted(self.parameters, weights, (self._gradients(score) for score in scores))

    def _gradients(self, score: Tensor) -> dict[str, Tensor]:
        of = [*self.parameters.values()]
        found = torch.autograd.grad(score, of, retain_graph=True, allow_unused=True, materialize_grads=True)
        return dict(zip(self.parameters, found, strict=True))

    def _scores(self, parameters: Mapping[str, Tensor], example: Example) -> tuple[Tensor, Tensor]:
        inputs = {key: example[key][None] for key in self.inputs if key in example}
        output = functional_call(self.model, dict(parameters), (), inputs)
        logits = logits_of(output)[0]
        return self.scores(logits.float() if logits.dtype != torch.float64 else logits, example)


def logits_of(output: Any) -> Tensor:  # (batch, classes) or (batch, places, vocabulary)
    """The logits in what a model returns."""
    if isinstance(output, Tensor):
        return output
    return output["logits"] if isinstance(output, Mapping) else output[0]


def _weighted(names: Iterable[str], weights: Tensor, gradients: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Σₖ wₖ gₖ²"""
    sums: dict[str, Tensor] = {}
    for weight, found in zip(weights, gradients, strict=True):
        squares = {name: found[name].float().square() * weight for name in names}
        sums = {name: sums[name] + square for name, square in squares.items()} if sums else squares
    return sums


def _alike(examples: Sequence[Example], at_once: int) -> Iterator[Sequence[Example]]:
    """Groups in which all examples have the same keys, shapes and masks."""
    groups: dict[object, list[Example]] = {}
    for example in examples:
        groups.setdefault(_kind(example), []).append(example)
    for group in groups.values():
        yield from (group[start : start + at_once] for start in range(0, len(group), at_once))


def _kind(example: Example) -> object:
    shapes = tuple((key, tensor.shape) for key, tensor in sorted(example.items()))
    return shapes, tuple(tuple(example[key].flatten().tolist()) for key in _MASKS if key in example)


@contextmanager
def _differentiable(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Gradients by these parameters and by no others."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


@contextmanager
def _without_speed_warnings() -> Iterator[None]:
    """An operation that vmap takes example by example is slower, and right."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", "There is a performance drop")
        yield
