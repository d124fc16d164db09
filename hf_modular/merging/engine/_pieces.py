"""What is worked on at a time: a tensor, or a block of one."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, NamedTuple, TypeVar

from hf_modular.merging._method import BLOCK, Stack

T = TypeVar("T")

_GROUP = 4  # blocks that a thread takes at a time
_SAMPLED = 8  # one block in so many is sampled


class Piece(NamedTuple):
    """`size` elements of a tensor from flat index `start` on, or all of it in its own shape."""

    name: str
    start: int
    size: int
    whole: bool = False


@dataclass(frozen=True)
class Pieces:
    """All tensors in their order, in blocks unless they must be whole; made anew each time, for they are many."""

    sizes: Mapping[str, int]
    whole: Container[str] = ()
    block: int = BLOCK

    def __iter__(self) -> Iterator[Piece]:
        for name, size in self.sizes.items():
            if name in self.whole:
                yield Piece(name, 0, size, whole=True)
            else:
                yield from (Piece(name, at, min(self.block, size - at)) for at in range(0, size, self.block))


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
        """Of each tensor the first block and every eighth after it, thinned."""
        chosen = (piece for piece in self.pieces if piece.start // BLOCK % _SAMPLED == 0)
        return (_thinned(self.stack(piece), of_each) for piece in chosen)


def grouped(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """A few blocks at a time, which is what a thread takes; a whole tensor alone."""
    remaining = iter(pieces)
    for piece in remaining:
        yield [piece] if piece.whole else [piece, *islice(remaining, _GROUP - 1)]


def _thinned(stack: Stack, count: int) -> Stack:
    """Some of the elements, spread evenly."""
    step = max(stack.base.numel() // count, 1)
    return replace(
        stack,
        base=stack.base.flatten()[::step],
        models=stack.models.flatten(1)[:, ::step],
        companions={name: tensor.flatten(1)[:, ::step] for name, tensor in stack.companions.items()},
    )
