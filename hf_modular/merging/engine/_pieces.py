"""What is worked on at a time: a tensor, or a part of one."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, NamedTuple, TypeVar

from hf_modular.merging._method import BLOCK, Stack

T = TypeVar("T")

_GROUP = 8  # blocks that a worker takes at a time
_SAMPLED = 32  # one block in so many is sampled


class Piece(NamedTuple):
    """`size` elements of a tensor from flat index `start` on, or all of it in its own shape."""

    name: str
    start: int
    size: int
    whole: bool = False

    def parts(self, size: int) -> "Iterator[Piece]":
        """The same in pieces of a size; a whole tensor stays whole."""
        if self.whole:
            yield self
            return
        for at in range(self.start, self.start + self.size, size):
            yield Piece(self.name, at, min(size, self.start + self.size - at))


@dataclass(frozen=True)
class Pieces:
    """All tensors in their order, in blocks unless they must be whole; made anew each time, for they are many."""

    sizes: Mapping[str, int]
    whole: Container[str] = ()
    block: int = BLOCK

    def __iter__(self) -> Iterator[Piece]:
        for name, size in self.sizes.items():
            yield from Piece(name, 0, size, whole=name in self.whole).parts(self.block)


@dataclass(frozen=True, eq=False)
class PieceStacks:
    """The stacks of some pieces, for a survey."""

    pieces: Iterable[Piece]
    stack: Callable[[Piece], Stack]
    run: Callable[[Callable[[list[Piece]], list[Any]], Iterable[list[Piece]]], Iterable[list[Any]]] = map

    def __iter__(self) -> Iterator[Stack]:
        return map(self.stack, self.pieces)

    def map(self, function: Callable[[Stack], T]) -> Iterable[T]:
        results = self.run(lambda group: [function(self.stack(piece)) for piece in group], grouped(self.pieces))
        return chain.from_iterable(results)

    def sample(self, of_each: int = 2048) -> Iterable[Stack]:
        """Of each tensor the first block and some after it, thinned."""
        chosen = (piece for piece in self.pieces if piece.start // BLOCK % _SAMPLED == 0)
        return (_thinned(self.stack(piece), of_each) for piece in chosen)


def grouped(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """A few blocks at a time, which is what a worker takes; a whole tensor alone."""
    remaining = iter(pieces)
    for piece in remaining:
        yield [piece] if piece.whole else [piece, *islice(remaining, _GROUP - 1)]


def shares(pieces: Iterable[Piece], block: int) -> Iterator[list[Piece]]:
    """As much as a worker takes at a time: parts of large pieces, or several small ones."""
    most = _GROUP * block
    share: list[Piece] = []
    left = most
    for part in chain.from_iterable(piece.parts(most) for piece in pieces):
        share.append(part)
        left -= part.size
        if left <= 0:
            yield share
            share, left = [], most
    if share:
        yield share


def _thinned(stack: Stack, count: int) -> Stack:
    """Some of the elements, spread evenly."""
    step = (
        stack.base.numel() // count | 1
    )  # odd, so that it does not meet the same columns of a matrix in all its rows
    return replace(
        stack,
        base=stack.base.flatten()[::step],
        models=stack.models.flatten(1)[:, ::step],
        companions={name: tensor.flatten(1)[:, ::step] for name, tensor in stack.companions.items()},
    )
