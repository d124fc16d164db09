"""Merges by lengths and angles: linear combinations of tensors, whose coefficients follow from their inner products.

The steps of an iteration are combinations too, so that a tensor is read twice, once for the inner products and once to
combine, however many steps there are. Inner products are summed in fp64.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hf_modular.merging._method import MergeMethod, Stack, Stacks, weighted_sum

PARALLEL = 1 - 1e-9  # a cosine beyond which an angle says nothing


@dataclass(frozen=True)
class GeometricMethod(MergeMethod):
    """What a method has that combines tensors by their inner products; it adds the coefficients.

    A tensor is one vector, unless the method takes it apart.
    """

    around_base: ClassVar[bool] = True  # whether it is the differences to the base, if there is one, that are combined

    @property
    def elementwise(self) -> bool:
        return not self.takes_apart

    @property
    def survey_scope(self) -> Literal["model", "tensor"]:
        return "tensor"

    @property
    def takes_apart(self) -> bool:
        return False

    def axes(self, dim: int) -> tuple[int, ...]:
        """Along which axes of a tensor its vectors run, if it is taken apart."""
        return tuple(range(dim))

    @abstractmethod
    def coefficients(
        self,
        inner: Tensor,  # (*parts, n, n), fp64
        weights: Tensor,  # (n,), fp64
    ) -> Tensor:  # (*parts, n)
        """That of each tensor, from their inner products."""

    def vectors(self, stack: Stack) -> Sequence[Tensor]:  # n times (*shape)
        return [*(stack.deltas if stack.has_base and self.around_base else stack.models)]

    def survey(self, stacks: Stacks) -> list[float] | None:
        """The coefficients of tensors that are one vector."""
        if self.takes_apart:
            return None
        weights = next(iter(stacks)).weights.double().cpu()
        return self.coefficients(gram(stacks, self.vectors), weights).tolist()

    def merge(self, stack: Stack, survey: list[float] | None) -> Tensor:
        vectors = self.vectors(stack)
        mixed = self._by_part(stack, vectors) if survey is None else weighted_sum(survey, vectors)
        return mixed.add_(stack.base) if stack.has_base and self.around_base else mixed

    def _by_part(self, stack: Stack, vectors: Sequence[Tensor]) -> Tensor:  # (*shape)
        inner = products(vectors, self.axes(stack.base.dim()))
        shares = self.coefficients(inner, stack.weights.to(inner)).to(stack.base)
        terms = [x * share for x, share in zip(vectors, shares.unbind(-1), strict=True)]
        return torch.stack(terms).sum(dim=0)


def gram(stacks: Stacks, vectors: Callable[[Stack], Iterable[Tensor]]) -> Tensor:  # (n, n)
    """The inner products of tensors, chunk by chunk."""
    return torch.stack([*stacks.map(lambda stack: _gram(vectors(stack)))]).sum(dim=0)


def products(vectors: Sequence[Tensor], axes: tuple[int, ...]) -> Tensor:  # n times (*shape) -> (*parts, n, n)
    """The inner products along some axes, which are kept with length 1."""
    numbers = range(len(vectors))
    pairs = combinations_with_replacement(numbers, 2)
    found = {(i, j): (vectors[i] * vectors[j]).sum(axes, True, dtype=torch.float64) for i, j in pairs}
    rows = [torch.stack([found[min(i, j), max(i, j)] for j in numbers], dim=-1) for i in numbers]
    return torch.stack(rows, dim=-2)


def lengths(inner: Tensor) -> Tensor:  # (*parts, n, n) -> (*parts, n)
    return inner.diagonal(dim1=-2, dim2=-1).sqrt()


def cosines(inner: Tensor, floor: float = 0.0) -> Tensor:  # (*parts, n, n) -> (*parts, n, n)
    """Of the angles between vectors, 0 for those of length 0; products of lengths count as `floor` at least."""
    length = lengths(inner)
    product = (length[..., :, None] * length[..., None, :]).clamp(min=floor)
    return torch.where(product > 0, inner / product, 0).clamp(-1, 1)


def arc(t: float, inner: Tensor, straight: float = PARALLEL) -> Tensor:  # (*parts, 2, 2) -> (*parts, 2)
    """The coefficients of two vectors on the arc from one to the other; on a line if |cosine| > straight."""
    cosine = cosines(inner)[..., 0, 1, None]
    shares = inner.new_tensor([1 - t, t])
    angle = torch.where(cosine.abs() > straight, torch.pi / 2, cosine.acos())
    return torch.where(cosine.abs() > straight, shares, (shares * angle).sin() / angle.sin())


def _gram(vectors: Iterable[Tensor]) -> Tensor:  # n times (*shape) -> (n, n)
    x = torch.stack([vector.flatten().double() for vector in vectors])
    return (x @ x.mT).cpu()
