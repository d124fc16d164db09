"""The engine: threads take blocks of tensors, each reading them from all models, merging, checking and writing them.

Where the numbers come from and go to is somebody else's business. The arithmetic of an element depends on nothing but
the inputs, the settings and the seed, so neither the number of threads nor the size of blocks changes a bit of it.
"""

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import chain
from threading import Lock, local
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_modular.merging._method import BLOCK, MergeMethod, Stack
from hf_modular.merging.engine._pieces import Piece, Pieces, PieceStacks, grouped
from hf_modular.merging.engine._preflight import TensorLike, check_finite
from hf_modular.merging.engine._workers import Budget, Workers
from hf_modular.merging.recipes._settings import Resolved

_DEVICE_BLOCK = 1 << 23  # elements of a block on an accelerator, which small ones would leave waiting
_WHOLE_TENSORS = 1 << 30  # bytes that whole tensors, for methods that need them, may take in all threads together


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
    """Where the merged tensors go; several threads write to it."""

    def write(self, name: str, data: Tensor, start: int) -> None:
        """Take elements of a tensor, flat, the first of them at flat index `start`."""
        ...


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
    block: int = BLOCK
    notes: dict[str, None] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    _surveys: dict[str, Any] = field(default_factory=dict)
    _locks: dict[str, Lock] = field(default_factory=dict)
    _kept: local = field(default_factory=local)
    _memory: Budget = field(default_factory=lambda: Budget(_WHOLE_TENSORS))

    def run(
        self,
        output: Output,
        pool: Workers,
        progress: Callable[[int], object],
        only: Container[str] | None = None,
    ) -> None:
        """Merge everything, or `only` some tensors; `progress` is told of bytes of the result as they are done."""
        with one_thread(), torch.no_grad():
            survey = self._survey_model(pool)
            for done in pool.map(lambda group: self._work(group, survey, output), self._surveyed(pool, only)):
                progress(done)

    def stack(self, piece: Piece) -> Stack:
        """A piece of all models. The next stack of the same thread takes its place in memory if it is a block."""
        dtype = self._dtypes[piece.name]
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
    def _sizes(self) -> dict[str, int]:
        """The sizes of the tensors that are merged."""
        return {name: _numel(like) for name, like in self.plan.items() if like.dtype.is_floating_point}

    @cached_property
    def _sources(self) -> list[Inputs]:
        return [*([self.base] if self.base else []), *self.models]

    @cached_property
    def _dtypes(self) -> dict[str, torch.dtype]:
        """What each tensor is merged in: at least `arithmetic`, and fp64 where an input or the result is fp64."""
        tensors = [self.plan, *(source.tensors for source in self._sources)]
        wide = {name for name in self._sizes if any(of[name].dtype == torch.float64 for of in tensors)}
        return {name: torch.float64 if name in wide else self.arithmetic for name in self._sizes}

    @cached_property
    def _whole(self) -> set[str]:
        """The tensors that a method needs in one piece."""
        return {name for name in self._sizes if not self.settings[name].method.elementwise}

    def _groups(self, only: Container[str] | None) -> Iterator[list[Piece]]:
        """The pieces that a thread takes at a time: whole tensors first, from the largest on, so none comes late."""
        sizes = {name: _numel(like) for name, like in self.plan.items() if only is None or name in only}
        large_first = dict(sorted(sizes.items(), key=lambda item: -item[1]))
        whole = {name: size for name, size in large_first.items() if name in self._whole}
        yield from grouped(Pieces(whole, self._whole))
        block = self.block if self.device.type == "cpu" else _DEVICE_BLOCK
        yield from grouped(Pieces({name: sizes[name] for name in sizes if name not in whole}, block=block))

    def _surveyed(self, pool: Workers, only: Container[str] | None) -> Iterator[list[Piece]]:
        """The groups, each when what its blocks need to know of their tensors is known: all threads find it out."""
        for group in self._groups(only):
            for name in {piece.name: None for piece in group if not piece.whole and piece.name in self._sizes}:
                method = self.settings[name].method
                if method.survey_scope == "tensor":
                    self._survey_tensor(name, method, pool.map)
            yield group

    def _work(self, group: Sequence[Piece], survey: Any, output: Output) -> int:
        """Merge pieces and write them; returns the bytes written."""
        done = 0
        for piece in group:
            part = self._merged(piece, survey) if piece.name in self._sizes else self._copied(piece)
            output.write(piece.name, part, piece.start)
            done += part.nbytes
        return done

    def _merged(self, piece: Piece, survey: Any) -> Tensor:  # (size,)
        method = self.settings[piece.name].method
        if method.survey_scope == "tensor":
            survey = self._survey_tensor(piece.name, method)
        with self._room(piece):
            stack = self.stack(piece)
            merged = method.merge(stack, survey)
            if merged.shape != stack.base.shape:
                raise ValueError(
                    f"{method.name!r} must keep the shape of {piece.name}, {tuple(stack.base.shape)}, "
                    f"but made it {tuple(merged.shape)}"
                )
            merged = merged.to(self.plan[piece.name].dtype).reshape(-1).cpu()
            check_finite(piece.name, merged, self._labelled(stack))
            return merged

    def _copied(self, piece: Piece) -> Tensor:  # (size,)
        """What holds no floating-point numbers is the base's; a difference is noted."""
        dtype = self.plan[piece.name].dtype
        own, other = torch.empty(2, piece.size, dtype=dtype)
        self.carrier.fill(piece.name, piece.start, own)
        for model in self.models:
            model.fill(piece.name, piece.start, other)
            if not torch.equal(own, other):
                note = f"{piece.name} ({dtype}) differs between the models and cannot be merged"
                self.notes[f"{note}: that of {self.carrier.reference} is kept"] = None
        return own

    def _labelled(self, stack: Stack) -> Iterator[tuple[str, Tensor]]:
        if self.base:
            yield self.base.reference, stack.base
        yield from zip((model.reference for model in self.models), stack.models, strict=True)

    # Surveys see blocks of BLOCK elements in every run: with others, what they sum up would be rounded differently.

    def _survey_model(self, pool: Workers) -> Any:
        method = next((self.settings[name].method for name in self._sizes), self.method)
        if method.survey_scope == "tensor":
            return None
        survey = method.survey(PieceStacks(Pieces(self._sizes, self._whole), self.stack, pool.map))
        self.facts.update(method.facts(survey))
        return survey

    def _survey_tensor(self, name: str, method: MergeMethod, run: Callable[..., Any] = map) -> Any:
        """Made by the first thread that needs it, while others that need the same wait."""
        with self._locks.setdefault(name, Lock()):
            if name not in self._surveys:
                pieces = Pieces({name: self._sizes[name]}, self._whole)
                self._surveys[name] = method.survey(PieceStacks(pieces, self.stack, run))
            return self._surveys[name]

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
        if piece.whole or piece.size not in (self.block, BLOCK):
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


@lru_cache(maxsize=64)
def _weights(weights: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(weights, dtype=dtype, device=device)


def _numel(tensor: TensorLike) -> int:
    return math.prod(tensor.shape)
