"""Children of this process that work through a list in step, as threads do, but with no lock of Python's to wait for.

A child is a copy of this process at the moment when `map` is called: it knows the function and all that belongs to it,
and reads and writes the same open files. Only items and results go through a pipe. Linux alone: elsewhere system
libraries do not bear to be copied while they run.
"""

import ctypes
import gc
import os
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import current_process, get_context
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from threading import current_thread, main_thread
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from hf_modular.merging.engine._workers import worker_count

S = TypeVar("S")
T = TypeVar("T")

_KEPT = 1 << 24  # bytes
_AHEAD = 2  # items that a child has, so that it need not wait for the next
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


def can_fork() -> bool:
    """Not in workers of Python's own pools, which may have no children, nor beside the main thread, since children die
    with the thread that made them.
    """
    return sys.platform == "linux" and not current_process().daemon and current_thread() is main_thread()


class Forks:
    """A pool of processes. After its context none of them is left."""

    block = 1 << 18  # with fewer elements Python costs more than caches save

    def __init__(self, count: int | None) -> None:
        self.count = worker_count(count)
        self.memory = 0  # the most that the children of one `map` took together, beside this process's own
        self._children: list[_Child] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._children:
            self._children.pop().kill()

    def map(self, function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
        """function(item) in the order of the items; an error that one raises is raised here."""
        self._children = [_Child(function) for _ in range(self.count)]
        remaining, done, wanted = enumerate(items), dict[int, _Outcome](), 0
        for child in self._children * _AHEAD:
            child.give(remaining)
        while busy := {child.connection: child for child in self._children if child.has}:
            for connection in wait([*busy]):
                child = busy[connection]  # type: ignore[index]
                done.update([child.take()])
                child.give(remaining)
            while wanted in done:
                yield done.pop(wanted).result()
                wanted += 1
        self.memory = max(self.memory, sum(child.dismiss() for child in self._children))
        self._children.clear()


class _Outcome(NamedTuple):
    value: Any
    error: Exception | None = None

    def result(self) -> Any:
        if self.error:
            raise self.error
        return self.value


class _Child:
    """One process, and the numbers of the items that it has."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.connection, other = Pipe()
        self.has: list[int] = []
        self._process = get_context("fork").Process(target=_serve, args=(function, other, os.getpid()), daemon=True)
        with warnings.catch_warnings():
            # Python 3.12 warns of threads, which a child lacks: none of ours runs now, and nothing waits for others'
            warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
            self._process.start()
        other.close()  # so that the connection ends with the child

    def give(self, items: Iterator[tuple[int, Any]]) -> None:
        """The next item, if there is one."""
        for number, item in items:
            self._send(item)
            self.has.append(number)
            return

    def take(self) -> tuple[int, _Outcome]:
        """The next result."""
        return self.has.pop(0), self._received()

    def dismiss(self) -> int:
        """Let it end; returns how many bytes of memory it took for itself."""
        self._send(_END)
        taken: int = self._received().result()
        self._process.join()
        self.connection.close()
        return taken

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()

    def _send(self, item: Any) -> None:
        try:
            self.connection.send(item)
        except ConnectionError:
            raise self._dead() from None

    def _received(self) -> _Outcome:
        try:
            return _Outcome(*self.connection.recv())
        except (EOFError, ConnectionError):
            raise self._dead() from None

    def _dead(self) -> RuntimeError:
        self._process.join()
        code = self._process.exitcode
        return RuntimeError(
            f"a worker process ended with exit code {code}, perhaps because memory ran out: use fewer `workers`"
        )


_END = None  # in place of an item


def _serve(function: Callable[[Any], Any], connection: Connection, parent: int) -> None:
    """What a child does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    gc.freeze()  # what comes from the parent is no garbage, and to look at it would copy it
    bytearray(_KEPT)  # is given back at once, from which glibc learns to keep so much for the next block
    while os.getppid() == parent and (item := connection.recv()) is not _END:
        connection.send(_attempt(function, item))
    connection.send((own_memory(), None))


def _attempt(function: Callable[[Any], Any], item: Any) -> tuple[Any, Exception | None]:
    try:
        return function(item), None
    except Exception as error:  # whatever it is: it is raised in the parent
        error.add_note("in a worker process:\n" + traceback.format_exc())
        try:
            pickle.loads(pickle.dumps(error))  # some errors can be sent, but not received
        except Exception:
            return None, RuntimeError(f"{type(error).__name__}: {error}")
        return None, error


def own_memory() -> int:
    """The most bytes that this process held which no other has."""
    rollup = Path("/proc/self/smaps_rollup").read_text("utf-8").splitlines()
    status = Path("/proc/self/status").read_text("utf-8").splitlines()
    kilobytes = {line.split()[0]: int(line.split()[1]) for line in [*rollup[1:], *status] if line.endswith("kB")}
    freed = kilobytes["VmHWM:"] - kilobytes["VmRSS:"]
    return 1024 * (kilobytes["Private_Clean:"] + kilobytes["Private_Dirty:"] + max(freed, 0))
