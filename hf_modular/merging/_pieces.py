"""What is worked on at a time: a tensor, or a block of one."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple, TypeVar

from hf_modular.merging._method import BLOCK, Stack

T = TypeVar("T")

_SAMPLED = 32  # one block in so many is sampled
_SAMPLE = 2048  # elements of it


class Piece(NamedTuple):
    """`size` elements of a tensor from flat index `start` on, or all of it in its own shape."""

    name: str
    start: int
    size: int
    whole: bool = False


def cut(sizes: Mapping[str, int], *, whole: Container[str] = (), block: int = BLOCK) -> list[Piece]:
    """All tensors in their order, in blocks unless they must be whole."""
    pieces = (
        [Piece(name, 0, size, whole=True)] if name in whole else _blocks(name, size, block)
        for name, size in sizes.items()
    )
    return [*chain.from_iterable(pieces)]


def _blocks(name: str, size: int, block: int) -> list[Piece]:
    return [Piece(name, start, min(block, size - start)) for start in range(0, size, block)]


@dataclass(frozen=True, eq=False)
class PieceStacks:
    """The stacks of some pieces, for a survey."""

    pieces: Sequence[Piece]
    stack: Callable[[Piece], Stack]
    run: Callable[[Callable[[Piece], T], Iterable[Piece]], Iterable[T]] = map

    def __iter__(self) -> Iterator[Stack]:
        return map(self.stack, self.pieces)

    def map(self, function: Callable[[Stack], T]) -> Iterable[T]:
        return self.run(lambda piece: function(self.stack(piece)), self.pieces)

    def sample(self) -> Iterable[Stack]:
        """Of each tensor the first block and every 32nd after it, thinned."""
        chosen = (piece for piece in self.pieces if piece.start // BLOCK % _SAMPLED == 0)
        return (_thinned(self.stack(piece)) for piece in chosen)


def _thinned(stack: Stack) -> Stack:
    """Some of the elements, spread evenly."""
    step = max(stack.base.numel() // _SAMPLE, 1)
    return replace(
        stack,
        base=stack.base.flatten()[::step],
        models=stack.models.flatten(1)[:, ::step],
        companions={name: tensor.flatten(1)[:, ::step] for name, tensor in stack.companions.items()},
    )
