"""What a method computes of frozen parameters in every forward, kept until they change."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """One value, for as long as the parameters that it was computed of are the same, and so are their numbers.

    A parameter that is loaded anew is another object, one that is cast or moved has other memory, and numbers that
    change raise the version of their tensor. What writes into a parameter's `data` does none of that, as optimizers
    and averages of weights may, so that nothing is kept of a parameter that is trained; nor where a compiler or a CUDA
    graph records what is done, nor in a group of processes, which may fill memory behind the parameters.
    """

    def __init__(self) -> None:
        self._held: tuple[Any, list[_Seen], Value] | None = None

    def get(self, key: Any, parameters: Sequence[nn.Parameter], compute: Callable[[], Value]) -> Value:
        """The value of `compute`, which depends on the key and on these parameters alone."""
        if torch.compiler.is_compiling():
            return compute()
        held = self._held  # once, for another thread may put another one in its place
        if held is not None and held[0] == key and _is_as_seen(parameters, held[1]):
            return held[2]
        if not _is_steady(parameters):
            self._held = None
            return compute()
        with torch.inference_mode(False), torch.no_grad():  # it may be used outside of these later
            value = compute()
        self._held = key, [_seen(parameter) for parameter in parameters], value
        return value

    def clear(self) -> None:
        self._held = None

    def __deepcopy__(self, memo: Any) -> "Kept[Value]":
        return Kept()

    def __reduce__(self) -> Any:
        return Kept, ()


# a parameter; its version, its storage's address and its own; and what keeps the address from being given to others
_Seen = tuple[weakref.ref[nn.Parameter], int, int, int, StorageWeakRef]


def _seen(p: nn.Parameter) -> _Seen:
    storage = p.untyped_storage()
    return weakref.ref(p), p._version, storage._cdata, p.data_ptr(), StorageWeakRef(storage)


def _is_as_seen(parameters: Sequence[nn.Parameter], seen: Sequence[_Seen]) -> bool:
    """Written with no call more than it needs, for it is run for every layer and token."""
    if len(parameters) != len(seen):
        return False
    for p, (same, version, storage, address, _) in zip(parameters, seen, strict=True):
        if same() is not p or p._version != version or p.requires_grad:
            return False
        if p.untyped_storage()._cdata != storage or p.data_ptr() != address:
            return False
    return not _is_captured(parameters)


def _is_steady(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether nothing changes without being noticed."""
    if not parameters or (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False  # a replica of `DataParallel` has no parameters
    return all(map(_can_be_watched, parameters)) and not _is_captured(parameters)


def _can_be_watched(p: nn.Parameter) -> bool:
    usual = type(p) is nn.Parameter and p.device.type in ("cpu", "cuda", "mps", "xpu")
    return usual and not p.requires_grad and not p.is_inference()


def _is_captured(parameters: Sequence[nn.Parameter]) -> bool:
    return parameters[0].is_cuda and torch.cuda.is_current_stream_capturing()
