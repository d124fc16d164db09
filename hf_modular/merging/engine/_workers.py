"""Threads that work through a list in step: results come in the list's order, whichever thread is faster."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Condition
from types import TracebackType
from typing import Self, TypeVar

S = TypeVar("S")
T = TypeVar("T")


class Workers:
    """A pool of threads; torch and file operations run beside each other in them."""

    def __init__(self, count: int | None) -> None:
        if count is not None and count < 1:
            raise ValueError(f"`workers` must be at least 1, but got workers={count}")
        self.count = count or min(usable_cores(), 16)
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


def usable_cores() -> int:
    """The cores that this process may use, which are fewer than the machine's in many containers and jobs."""
    if hasattr(os, "sched_getaffinity"):  # Linux only
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
