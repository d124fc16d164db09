"""What a model's output for one example says of its labels, as scores whose squared gradients are Fisher information.

With scores sₖ and weights wₖ, an example's Fisher information is Σₖ wₖ (∂sₖ/∂θ)²:

    expected   of classes: sₖ = log p(k|x), wₖ = p(k|x); of numbers with unit variance: sₖ = fₖ(x), wₖ = 1;
               of several yes-or-no labels: sₖ the logit, wₖ = pₖ (1 - pₖ)
    sampled    s = Σₜ log p(yₜ|x) with yₜ drawn from p, the class or the token of each place, w = 1
    given      s = log p(y|x) with the labels of the data, w = 1: the empirical Fisher information

Since labels of different places are drawn independently, the products of their gradients vanish in the mean.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Labels = Literal["expected", "sampled", "given"]
Problem = Literal["single_label_classification", "multi_label_classification", "regression", "tokens"]

IGNORED = -100  # the label of a place that does not count


def scores(
    logits: Tensor, labels: Tensor | None, draws: Tensor, source: Labels, problem: Problem
) -> tuple[Tensor, Tensor]:
    """The scores and their weights, (K,) each.

    Args:
        logits: (classes,), or (places, classes) for tokens.
        labels: Of a class (), of the places (places,), or of each output (outputs,).
        draws: Numbers in [0, 1) for sampled labels, of the shape of the labels.
        source: Where the labels come from.
        problem: What the logits are.
    """
    if source == "expected":
        return _expected(logits, problem)
    if source == "sampled":
        labels = _drawn(logits.detach(), labels, draws)
    if labels is None:
        raise ValueError("the empirical Fisher information needs `labels`, but the data has none")
    score = _log_likelihood(logits, labels, problem)
    return score[None], torch.ones_like(score)[None]


def _expected(logits: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    if problem == "regression":
        return logits, torch.ones_like(logits)
    if problem == "multi_label_classification":
        p = logits.detach().sigmoid()
        return logits, p * (1 - p)
    log_p = logits.log_softmax(-1)
    return log_p, log_p.detach().exp()


def _drawn(logits: Tensor, labels: Tensor | None, draws: Tensor) -> Tensor:  # of the shape of draws
    """Labels by the inverse of the distribution function; places that do not count keep theirs."""
    below = logits.softmax(-1).cumsum(-1) <= draws[..., None]
    drawn = below.sum(-1).clamp(max=logits.shape[-1] - 1)
    return drawn if labels is None else torch.where(labels == IGNORED, labels, drawn)


def _log_likelihood(logits: Tensor, labels: Tensor, problem: Problem) -> Tensor:  # ()
    if problem == "regression":
        return -(logits - labels.view_as(logits)).square().sum() / 2
    if problem == "multi_label_classification":
        return -F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="sum")
    chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(labels == IGNORED, 0, chosen).sum()
