"""Who works through a list in step: results come in the list's order, whichever worker is faster."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Condition
from types import TracebackType
from typing import Protocol, Self, TypeVar

S = TypeVar("S")
T = TypeVar("T")


class Pool(Protocol):
    """Threads, or processes (see `hf_modular.merging.engine._forks`)."""

    @property
    def count(self) -> int:
        """How many workers."""
        ...

    @property
    def block(self) -> int:
        """How many elements of a tensor a worker best takes at a time."""
        ...

    @property
    def memory(self) -> int:
        """The most bytes that workers took beside what this process had."""
        ...

    def map(self, function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
        """function(item) in the order of the items; one call of `map` at a time."""
        ...


class Workers:
    """A pool of threads; torch and file operations run beside each other in them."""

    # Threads meet at Python's lock between any two operations, and the shorter these are, the more they wait for each
    # other: with blocks of 1 << 17, which fit a core's cache better, two threads take half as long again.
    block = 1 << 19
    memory = 0

    def __init__(self, count: int | None) -> None:
        self.count = worker_count(count)
        self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="merge")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
        """function(item) in the order of the items; only a few results wait at a time, so memory stays bounded."""
        waiting: deque[Future[T]] = deque()
        for item in items:
            waiting.append(self._pool.submit(function, item))
            if len(waiting) > 3 * self.count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class Budget:
    """Memory that threads share. One whose need exceeds all of it still gets it, but alone."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._used = 0
        self._freed = Condition()

    @contextmanager
    def take(self, need: int) -> Iterator[None]:
        with self._freed:
            self._freed.wait_for(lambda: not self._used or self._used + need <= self._size)
            self._used += need
        try:
            yield
        finally:
            with self._freed:
                self._used -= need
                self._freed.notify_all()


def worker_count(wanted: int | None, beside: int = 1) -> int:
    """As many as wanted, or as there are cores for each of the processes that run beside each other on a machine."""
    if wanted is not None and wanted < 1:
        raise ValueError(f"`workers` must be at least 1, but got workers={wanted}")
    return wanted or max(min(usable_cores(), 16) // beside, 1)


def usable_cores() -> int:
    """The cores that this process may use, which are fewer than the machine's in many containers and jobs."""
    if hasattr(os, "sched_getaffinity"):  # Linux only
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
