"""The engine: workers take blocks of tensors, each reading them from all models, merging, checking and writing them.

Where the numbers come from and go to is somebody else's business. The arithmetic of an element depends on nothing but
the inputs, the settings and the seed, so neither the number of workers nor the size of blocks changes a bit of it.
"""

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from itertools import chain
from threading import local
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hf_modular.merging._method import MergeMethod, Stack
from hf_modular.merging.engine._pieces import Piece, Pieces, PieceStacks, shares
from hf_modular.merging.engine._preflight import TensorLike, check_finite
from hf_modular.merging.engine._rounding import rounded
from hf_modular.merging.engine._workers import Budget, Pool
from hf_modular.merging.recipes._settings import Resolved

_DEVICE_BLOCK = 1 << 23  # elements of a block on an accelerator, which small ones would leave waiting
_WHOLE_TENSORS = 1 << 30  # bytes that whole tensors, for methods that need them, may take in all threads together
_SMALL = 8  # a tensor is small if each worker gets so many of its size on average


class Inputs(Protocol):
    """The tensors of one model."""

    @property
    def reference(self) -> str:
        """What the model is called in messages."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorLike]: ...

    def fill(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out`, flat, with elements from flat index `start` on, in the dtype and on the device of `out`."""
        ...


class Output(Protocol):
    """Where the merged tensors go; several workers write to it."""

    def write(self, name: str, data: Tensor, start: int) -> None:
        """Take elements of a tensor, flat, the first of them at flat index `start`."""
        ...


class _Done(NamedTuple):
    """What a worker says of its share."""

    sizes: list[tuple[str, int]]  # names and bytes that were written
    notes: list[str]


@dataclass(frozen=True, eq=False)
class Engine:
    """One merge of some models.

    Args:
        plan: The dtype and shape of each tensor of the result, in order.
        settings: The method and its settings for each tensor.
        base: What the models were fine-tuned from, for methods that use one.
        carrier: Gives the tensors that hold no floating-point numbers.
        companions: What the method needs of each model beside its weights.
        arithmetic: The dtype to calculate in, fp32 or fp64.
        block: How many elements are merged at a time; what suits the device and the workers by default.
    """

    plan: Mapping[str, TensorLike]
    settings: Mapping[str, Resolved]
    method: MergeMethod
    base: Inputs | None
    models: Sequence[Inputs]
    carrier: Inputs
    seed: int
    device: torch.device
    companions: Mapping[str, Sequence[Inputs]] = field(default_factory=dict)
    arithmetic: torch.dtype = torch.float32
    block: int | None = None
    notes: dict[str, None] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    _surveys: dict[str, Any] = field(default_factory=dict)
    _kept: local = field(default_factory=local)
    _memory: Budget = field(default_factory=lambda: Budget(_WHOLE_TENSORS))

    def run(
        self, output: Output, pool: Pool, progress: Callable[[str, int], object], only: Container[str] | None = None
    ) -> None:
        """Merge everything, or `only` some tensors; `progress` is told of names and bytes of the result as they are
        written.
        """
        with one_thread(), torch.no_grad():
            survey = self._survey_model(pool)
            self._survey_large(pool, only)
            block = self.block or (pool.block if self.device.type == "cpu" else _DEVICE_BLOCK)
            work = partial(self._work, block=block, survey=survey, output=output)
            for done in pool.map(_alone(work), self._shares(block, only)):
                self.notes.update(dict.fromkeys(done.notes))
                for name, size in done.sizes:
                    progress(name, size)

    def stack(self, piece: Piece) -> Stack:
        """A piece of all models. The next stack of the same thread takes its place in memory if it is a block."""
        dtype = self.dtypes[piece.name]
        kinds = [kind for kind, those in self.companions.items() if piece.name in those[0].tensors]
        sources = [*self._sources, *chain.from_iterable(self.companions[kind] for kind in kinds)]
        memory, rows = self._memory_for(len(sources), piece, dtype)
        for row, source in zip(rows, sources, strict=True):
            source.fill(piece.name, piece.start, row)
        shape = tuple(self.plan[piece.name].shape) if piece.whole else (piece.size,)
        numbers = memory[: len(self._sources)].view(len(self._sources), *shape)
        beside = memory[len(self._sources) :].view(len(kinds), len(self.models), *shape)
        resolved = self.settings[piece.name]
        return Stack(
            name=piece.name,
            base=numbers[0],
            models=numbers[1:] if self.base else numbers,
            weights=_weights(resolved.weights, dtype, self.device),
            has_base=self.base is not None,
            offset=piece.start,
            seed=self.seed,
            settings=resolved.each,
            companions=dict(zip(kinds, beside, strict=True)),
        )

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The sizes of the tensors that are merged."""
        return {name: _numel(like) for name, like in self.plan.items() if like.dtype.is_floating_point}

    @cached_property
    def _sources(self) -> list[Inputs]:
        return [*([self.base] if self.base else []), *self.models]

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """What each tensor is merged in: fp64 where an input or the result is or the method wants it."""
        tensors = [self.plan, *(source.tensors for source in self._sources)]
        wide = {name for name in self.sizes if any(of[name].dtype == torch.float64 for of in tensors)}
        wide |= {name for name in self.sizes if self.settings[name].method.in_fp64}
        return {name: torch.float64 if name in wide else self.arithmetic for name in self.sizes}

    @cached_property
    def whole(self) -> set[str]:
        """The tensors that a method needs in one piece."""
        return {name for name in self.sizes if not self.settings[name].method.elementwise}

    def _shares(self, block: int, only: Container[str] | None) -> Iterator[list[Piece]]:
        """What a worker takes at a time. Tensors that it takes in one piece come first, from the largest on, so that
        none comes late.
        """
        numels = {name: _numel(like) for name, like in self.plan.items() if only is None or name in only}
        sizes = {name: size for name, size in numels.items() if size}
        at_once = {name for name in sizes if name in self.whole or self._surveyed(name)}
        for name in sorted(at_once, key=lambda name: -sizes[name]):
            yield [Piece(name, 0, sizes[name], whole=name in self.whole)]
        yield from shares((Piece(name, 0, size) for name, size in sizes.items() if name not in at_once), block)

    def _surveyed(self, name: str) -> bool:
        """Whether who merges a tensor has to look at all of it before, and all others may not."""
        if name not in self.sizes or name in self._surveys:
            return False
        return self.settings[name].method.surveys == "tensor"

    def _work(self, share: Iterable[Piece], block: int, survey: Any, output: Output) -> _Done:
        """Merge pieces and write them."""
        done = _Done([], [])
        for piece in share:
            known = self._known(piece.name, survey)
            for part in piece.parts(block):
                merged = self._merged(part, known) if piece.name in self.sizes else self._copied(part, done.notes)
                output.write(part.name, merged, part.start)
                done.sizes.append((part.name, merged.nbytes))
        return done

    def _merged(self, piece: Piece, survey: Any) -> Tensor:  # (size,)
        method = self.settings[piece.name].method
        with self._room(piece):
            stack = self.stack(piece)
            merged = method.merge(stack, survey)
            if merged.shape != stack.base.shape:
                raise ValueError(
                    f"{method.name!r} must keep the shape of {piece.name}, {tuple(stack.base.shape)}, "
                    f"but made it {tuple(merged.shape)}"
                )
            merged = rounded(merged, self.plan[piece.name].dtype).reshape(-1).cpu()
            check_finite(piece.name, merged, self._labelled(stack))
            return merged

    def _copied(self, piece: Piece, notes: list[str]) -> Tensor:  # (size,)
        """What holds no floating-point numbers is the base's; a difference is noted."""
        dtype = self.plan[piece.name].dtype
        own, other = torch.empty(2, piece.size, dtype=dtype)
        self.carrier.fill(piece.name, piece.start, own)
        for model in self.models:
            model.fill(piece.name, piece.start, other)
            if not torch.equal(own, other):
                note = f"{piece.name} ({dtype}) differs between the models and cannot be merged"
                notes.append(f"{note}: that of {self.carrier.reference} is kept")
        return own

    def _labelled(self, stack: Stack) -> Iterator[tuple[str, Tensor]]:
        if self.base:
            yield self.base.reference, stack.base
        yield from zip((model.reference for model in self.models), stack.models, strict=True)

    # Surveys see blocks of BLOCK elements in every run: with others, what they sum up would be rounded differently.

    def _survey_model(self, pool: Pool) -> Any:
        method = next((self.settings[name].method for name in self.sizes), self.method)
        if method.survey_scope == "tensor":
            return None
        survey = method.survey(PieceStacks(Pieces(self.sizes, self.whole), self.stack, _together(pool)))
        self.facts.update(method.facts(survey))
        return survey

    def _survey_large(self, pool: Pool, only: Container[str] | None) -> None:
        """All workers look together at a tensor that is too large for one of them to do so alone."""
        sizes = {name: size for name, size in self.sizes.items() if only is None or name in only}
        small = sum(sizes.values()) / (_SMALL * pool.count)
        for name, size in sizes.items():
            if size > small and name not in self.whole and self._surveyed(name):
                self._surveys[name] = self._survey_tensor(name, _together(pool))

    def _known(self, name: str, survey: Any) -> Any:
        """What the method has to know of a tensor, or of the whole model."""
        if name in self.sizes and self.settings[name].method.survey_scope == "tensor":
            return self._surveys[name] if name in self._surveys else self._survey_tensor(name)
        return survey

    def _survey_tensor(self, name: str, run: Callable[..., Any] = map) -> Any:
        pieces = Pieces({name: self.sizes[name]}, self.whole)
        return self.settings[name].method.survey(PieceStacks(pieces, self.stack, run))

    @contextmanager
    def _room(self, piece: Piece) -> Iterator[None]:
        """A whole tensor waits for memory: its stack, and about as much again for the method to work in."""
        if not piece.whole:
            yield
            return
        rows = len(self.models) * (1 + len(self.companions)) + 2
        with self._memory.take(2 * rows * piece.size * torch.float32.itemsize):
            yield

    def _memory_for(self, rows: int, piece: Piece, dtype: torch.dtype) -> tuple[Tensor, Sequence[Tensor]]:
        """(rows, size), and each row; for blocks of the usual size always the same, for views take time to make."""
        if piece.whole or piece.size & (piece.size - 1):  # not a block
            memory = torch.empty(rows, piece.size, dtype=dtype, device=self.device)
            return memory, memory.unbind()
        kept = self._kept.__dict__  # this thread's
        if (key := f"{rows} {piece.size} {dtype}") not in kept:
            memory = torch.empty(rows, piece.size, dtype=dtype, device=self.device)
            kept[key] = memory, memory.unbind()
        found: tuple[Tensor, Sequence[Tensor]] = kept[key]
        return found


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums that torch splits over its own threads depend on their number, so each of ours gets only one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _together(pool: Pool) -> Callable[..., Any]:
    return lambda function, items: pool.map(_alone(function), items)


def _alone(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same in `one_thread`, which each of our threads has to be told: LAPACK keeps a number for each of them."""

    def alone(item: Any) -> Any:
        torch.set_num_threads(1)
        return function(item)

    return alone


@lru_cache(maxsize=64)
def _weights(weights: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(weights, dtype=dtype, device=device)


def _numel(tensor: TensorLike) -> int:
    return math.prod(tensor.shape)
