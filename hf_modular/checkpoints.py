"""Checkpoints as folders of safetensors: read by name or by rows, written in place, complete or not there at
all.

A header is read by rules as strict as those of the safetensors library, because what it says decides which
bytes are read: offsets that overlap, leave a gap or leave the file, sizes that do not fit shapes, names that
occur twice and index entries that leave the folder are refused. No file is mapped: a mapping that is kept
counts as resident memory.
"""

import errno
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from threading import Lock
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
STAGING = ".merge-in-progress"
JOURNALED = 1 << 30  # bytes of complete tensors between two entries in the journal
_JOURNAL, _LOCK = "journal", "lock"
_ENDING = 0.5  # seconds that the children of a run that was killed may still take to end
_WRITING, _REMOVING, _MOVING = "writing", "removing", "moving"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}

_HEADER_LIMIT = 100_000_000  # bytes, as in safetensors
_MAX_AXES = 64  # of a torch tensor; the product of a longer list could take hours
_READ_LIMIT = 1 << 30  # bytes of one system call; Linux ends one at 2 GiB


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """A tensor in a file: its bytes begin at `start`."""

    file: Path
    start: int


class Checkpoint:
    """The tensors of a safetensors file, or of a folder with one or several; several threads may read at
    once.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.files = _weight_files(self.path)
        self.tensors: dict[str, StoredTensor] = _stored(self.path, self.files)
        self._descriptors: dict[Path, int] = {}
        self._lock = Lock()

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        tensor = self.tensors[name]
        return self._run(name, 0, tensor.numel).view(tensor.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:  # (stop - start, *rest)
        """Rows start, ..., stop - 1 of the first axis, and no other bytes."""
        rows, *rest = self.tensors[name].shape
        if not 0 <= start <= stop <= rows:
            raise ValueError(f"{name} has the rows 0 to {rows}, but got {start=}, {stop=}")
        row = math.prod(rest)
        return self._run(name, start * row, (stop - start) * row).view(stop - start, *rest)

    def read_into(self, name: str, out: Tensor, start: int = 0) -> None:
        """Fill `out`, flat and of the tensor's dtype, with the elements from `start` on."""
        tensor = self.tensors[name]
        if not out.is_contiguous() or out.dtype != tensor.dtype or start < 0 or start + out.numel() > tensor.numel:
            raise ValueError(
                f"{name} has {tensor.numel} elements of {tensor.dtype}, "
                f"but {out.numel()} of {out.dtype} were asked for from {start=}, to be read into one run of memory"
            )
        self.read_bytes(name, start * out.itemsize, _bytes(out))

    def read_bytes(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with the tensor's bytes from the given one on, which must exist."""
        tensor = self.tensors[name]
        _read(self._descriptor(tensor.file), out, tensor.start + start, tensor.file)

    def close(self) -> None:
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _run(self, name: str, start: int, count: int) -> Tensor:  # (count,)
        out = torch.empty(count, dtype=self.tensors[name].dtype)
        self.read_into(name, out, start)
        return out

    def _descriptor(self, file: Path) -> int:
        if (known := self._descriptors.get(file)) is not None:  # no lock for the many calls after the first
            return known
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[file]


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, in the order of their bytes; no tensor's bytes are read."""
    if not file.is_file():  # opening a pipe or a device could wait for ever
        raise FileNotFoundError(f"{file} is not there, or no regular file")
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise ValueError(
                f"{file} is no safetensors file, or cut short: its header must fit in {size} bytes, but has {length}"
            )
        text = stream.read(length)
    header = _json(text, file)
    header.pop("__metadata__", None)
    tensors = {name: _entry(file, name, entry, 8 + length) for name, entry in header.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)))
    _check_cover(file, tensors, 8 + length, size)
    return tensors


class CheckpointWriter:
    """A checkpoint in the making, to which several threads, or children of the process, may write; used as a context.

    Shards, offsets and headers are planned from `tensors` before a byte is written, so a tensor can be
    written in any order and in pieces, but each element once. Everything lies in a folder inside the output folder
    until `commit`, which moves the index (or the only file) last: whatever breaks the run, there is either no
    checkpoint or a complete one. Leaving the context without `commit` removes what was written.

    A run that was killed or interrupted (Ctrl-C) leaves its folder and in it a journal of the tensors that are on the
    disk. Another with `resume=True` finds them in `finished`, or `committed` if only the moving was left to do, which
    it has then done.

    Args:
        folder: The output folder.
        tensors: What will be written.
        max_shard_size: The largest file, such as "5GB".
        overwrite: Replace a checkpoint that is in the folder.
        identity: All that the content depends on. A run is only resumed by one with the same.
        resume: Go on where a killed run stopped; from the beginning if there is none.
        join: Write beside another process, which opened the same and will commit.
    """

    def __init__(
        self,
        folder: str | Path,
        tensors: Mapping[str, TensorInfo],
        *,
        max_shard_size: int | str = "5GB",
        overwrite: bool = False,
        identity: str = "",
        resume: bool = False,
        join: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.staging = self.folder / STAGING
        self.finished: set[str] = set()
        self.committed = False
        self._overwrite, self._resume, self._join = overwrite, resume, join
        self._shards = plan_shards(tensors, max_shard_size)
        layout = {file: [*held] for file, held in self._shards.items()}
        self._journal = Journal(self.staging / _JOURNAL, f"{identity}{json.dumps(layout)}")
        self._left = {name: tensor.nbytes for name, tensor in tensors.items()}
        self._ready: list[str] = []  # written, but perhaps not on the disk
        self._places: dict[str, tuple[int, int, TensorInfo]] = {}  # descriptor, first byte
        self._descriptors: list[int] = []

    def __enter__(self) -> Self:
        from filelock import FileLock, Timeout

        if self._join:
            self._open_shards()
            return self
        self._created = not self.folder.exists()
        moving = self._resume and self._journal.state in (_REMOVING, _MOVING)
        refuse_occupied(self.folder, overwrite=self._overwrite or moving)
        self.staging.mkdir(parents=True, exist_ok=True)
        self._running = FileLock(self.staging / _LOCK)
        try:
            self._running.acquire(timeout=_ENDING)
        except Timeout:
            raise ValueError(
                f"another merge is writing to {self.folder}: wait for it or choose another folder"
            ) from None
        if self._resume and not self._journal.fits():
            self._running.release()
            raise ValueError(
                f"only the merge that was interrupted can be resumed, but the one in {self.staging} had another "
                "recipe, other inputs, other versions or another shard size: start without resuming, which discards it"
            )
        try:
            self._begin()
        except BaseException:
            self._abandon()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._join:
            self._close()
        elif self._running.is_locked and isinstance(error, KeyboardInterrupt):
            self._pause(error)
        elif self._running.is_locked:
            self._abandon()

    @property
    def files(self) -> list[Path]:
        """The files of weights, where they are until `commit`."""
        return [self.staging / file for file in self._shards]

    def write(self, name: str, data: Tensor, start: int = 0) -> None:
        """Write elements of a tensor, the first of them at flat index `start`."""
        descriptor, place, tensor = self._places[name]
        if data.dtype != tensor.dtype or start + data.numel() > tensor.numel:
            raise ValueError(
                f"{name} was planned as {tensor.numel} elements of {tensor.dtype}, "
                f"but got {data.numel()} of {data.dtype} at {start=}"
            )
        try:
            _write(descriptor, _bytes(data), place + start * data.itemsize)
        except OSError as error:
            raise _named(error, self.folder) from error

    def count(self, name: str, size: int) -> None:
        """Note in the journal, a gigabyte at a time, which tensors are complete and on the disk.

        For a run that may be resumed: one thread is told of each part of a tensor, whoever has written it.
        """
        self._left[name] -= size
        if self._left[name] or self._join:
            return
        self._ready.append(name)
        if sum(self._places[ready][2].nbytes for ready in self._ready) < JOURNALED:
            return
        noted, self._ready = self._ready, []
        self.sync()
        self._journal.finish(noted)

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        for descriptor in self._descriptors:
            os.fsync(descriptor)

    def commit(self) -> None:
        """Make the checkpoint visible: every byte reaches the disk first, and what transformers looks for
        comes last.
        """
        self.sync()
        self.write_index()
        for path in self._staged():
            _sync(path)
        self._journal.add(_REMOVING)
        self._publish()

    def _publish(self) -> None:
        """What remains to be done once everything is on the disk, at whatever point it was interrupted."""
        if self._journal.state == _REMOVING:
            if self._overwrite:
                _remove_checkpoint(self.folder)
            self._journal.add(_MOVING)
        for path in self._staged():
            path.replace(self.folder / path.name)
        _sync(self.folder)
        self.committed, self._created = True, False
        self._abandon()

    def _staged(self) -> list[Path]:
        """What is to be moved, the file by which a checkpoint is known last."""
        marker = INDEX if len(self._shards) > 1 else WEIGHTS
        found = [path for path in self.staging.iterdir() if path.name not in (_LOCK, _JOURNAL)]
        return sorted(found, key=lambda path: (path.name == marker, path.name))

    def _begin(self) -> None:
        """Take up what an interrupted run left, or make the files anew; the lock says that it runs no more."""
        if self._resume and self._journal.state in (_REMOVING, _MOVING):
            self._publish()
        elif self._resume and self._journal.state == _WRITING:
            self._open_shards()
            self.finished = self._journal.finished & self._places.keys()
            self._clear(keep=(_LOCK, _JOURNAL, *self._shards))
        else:
            self._clear(keep=(_LOCK,))
            for file, tensors in self._shards.items():
                self._allocate(file, tensors)
            self._journal.begin()

    def _allocate(self, file: str, tensors: Mapping[str, TensorInfo]) -> None:
        header, starts, size = _layout(tensors)
        descriptor = os.open(self.staging / file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._descriptors.append(descriptor)
        try:
            os.truncate(descriptor, size)
            _write(descriptor, memoryview(header), 0)
        except OSError as error:
            raise _named(error, self.folder) from error
        self._places |= {name: (descriptor, starts[name], tensor) for name, tensor in tensors.items()}

    def _open_shards(self) -> None:
        for file, tensors in self._shards.items():
            descriptor = os.open(self.staging / file, os.O_RDWR | os.O_CLOEXEC)
            self._descriptors.append(descriptor)
            starts = _layout(tensors)[1]
            self._places |= {name: (descriptor, starts[name], tensor) for name, tensor in tensors.items()}

    def write_index(self) -> None:
        """Say which file holds which tensor, if there are several; `commit` does it."""
        if len(self._shards) == 1:
            return
        sizes = [tensor.nbytes for tensors in self._shards.values() for tensor in tensors.values()]
        files = {name: file for file, tensors in self._shards.items() for name in tensors}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(files.items()))}
        (self.staging / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")

    def _clear(self, keep: Sequence[str]) -> None:
        for path in self.staging.iterdir():
            if path.name not in keep:
                path.unlink()

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _pause(self, interrupt: KeyboardInterrupt) -> None:
        """Leave what a killed run leaves, and all finished tensors in the journal."""
        if self._journal.state == _WRITING:
            self.sync()
            self._journal.finish(self._ready)
        self._close()
        self._running.release()
        interrupt.add_note(
            f"What is finished is in {self.staging}: the same merge with `resume` (--resume) goes on there, "
            "another one into this folder discards it"
        )

    def _abandon(self) -> None:
        self._close()
        shutil.rmtree(self.staging, ignore_errors=True)
        self._running.release()
        if self._created:
            with suppress(OSError):  # somebody put a file there in the meantime
                self.folder.rmdir()


class Journal:
    """How far a run has come: what run it is, and a line for each step, of which one that a crash cut does not count.

    The names of tensors are in quotation marks, so none is taken for anything else.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._path = path
        self._identity = sha256(identity.encode()).hexdigest()
        self._lock = Lock()

    def begin(self) -> None:
        self.add(self._identity, _WRITING)

    def finish(self, tensors: Iterable[str]) -> None:
        self.add(*map(json.dumps, tensors))

    def add(self, *lines: str) -> None:
        text = "".join(line + "\n" for line in lines)
        with self._lock, self._path.open("a", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())

    def fits(self) -> bool:
        """Whether this is the same run, or none has begun."""
        return not self._lines or self._lines[0] == self._identity

    @property
    def state(self) -> str | None:
        return next((state for state in (_MOVING, _REMOVING, _WRITING) if state in self._lines), None)

    @property
    def finished(self) -> set[str]:
        return {json.loads(line) for line in self._lines if line.startswith('"')}

    @property
    def _lines(self) -> list[str]:
        text = self._path.read_text("utf-8") if self._path.is_file() else ""
        return text.split("\n")[:-1]


def save_checkpoint(folder: str | Path, tensors: Mapping[str, Tensor], **options: Any) -> None:
    """Write tensors to a folder, with the options of `CheckpointWriter`."""
    plan = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with CheckpointWriter(folder, plan, **options) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.commit()


def plan_shards(tensors: Mapping[str, TensorInfo], max_shard_size: int | str) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of each output file, by the rules and names of huggingface_hub."""
    from huggingface_hub import split_state_dict_into_shards_factory

    if not tensors:
        raise ValueError("a checkpoint must hold at least one tensor, but got none")
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    return {file: {name: tensors[name] for name in names} for file, names in split.filename_to_tensors.items()}


def refuse_occupied(folder: Path, *, overwrite: bool) -> None:
    """An output folder must be absent or empty, unless what it holds may go."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the output must be a folder, but {folder} is a file")
    held = sorted(path.name for path in folder.iterdir() if path.name != STAGING) if folder.exists() else []
    if held and not overwrite:
        raise ValueError(
            f"the output folder must be absent or empty, but {folder} holds {held[:5]}: "
            "choose another one or allow overwriting"
        )


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint, each checked to lie where it may."""
    if path.is_file():
        _refuse_pickle([path], path)
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    single, index = path / WEIGHTS, path / INDEX
    if single.exists() and index.exists():
        raise ValueError(f"{path} holds both {WEIGHTS} and {INDEX}: remove the one that is out of date")
    if not single.exists() and not index.exists():
        _refuse_pickle(path.iterdir(), path)
        raise FileNotFoundError(f"{path} must hold {WEIGHTS} or {INDEX}, but has neither")
    names = [WEIGHTS] if single.exists() else sorted(set(_weight_map(index).values()))
    return [_inside(path, name, index) for name in names]


def _stored(path: Path, files: Sequence[Path]) -> dict[str, StoredTensor]:
    """The tensors of all files; what the index says must be what the files hold."""
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        header = read_header(file)
        if twice := tensors.keys() & header.keys():
            raise ValueError(f"each tensor must be in one file, but {min(twice)} is in two files of {path}")
        tensors |= header
    if not tensors:
        raise ValueError(f"a checkpoint must hold at least one tensor, but {path} holds none")
    if path.is_dir() and not (path / WEIGHTS).exists():
        _check_index(path / INDEX, tensors)
    return tensors


def _check_index(index: Path, tensors: Mapping[str, StoredTensor]) -> None:
    listed = _weight_map(index)
    for name in sorted(listed.keys() | tensors.keys()):
        said = listed.get(name, "no file")
        found = tensors[name].file.name if name in tensors else "no file"
        if PurePosixPath(said).name != found:
            raise ValueError(f"{index} says that {name} is in {said}, but it is in {found}")


def _weight_map(index: Path) -> dict[str, str]:
    if not index.is_file() or index.stat().st_size > _HEADER_LIMIT:
        raise ValueError(f"{index} must be a file of at most {_HEADER_LIMIT} bytes")
    found = _json(index.read_bytes(), index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise ValueError(f"{index} must map tensor names to file names in `weight_map`, but does not")
    return found


def _inside(folder: Path, name: str, index: Path) -> Path:
    """A file of the folder, by a name that comes from outside: it must not lead elsewhere."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or path.suffix != ".safetensors":
        raise ValueError(f"{index} must name safetensors files inside its folder, but names {name!r}")
    file = folder / path
    if not file.exists():
        raise FileNotFoundError(f"{index} names {name}, but there is no such file in {folder}")
    refuse_outside(file, folder)
    return file


def refuse_outside(file: Path, folder: Path) -> None:
    """A file of a folder must not be a link that leads elsewhere, but for those of the Hub's cache."""
    if not any(file.resolve().is_relative_to(root) for root in _roots(folder.resolve())):
        raise ValueError(f"{file} must not be a link out of its folder, but leads to {file.resolve()}")


def _roots(folder: Path) -> Iterator[Path]:
    """Where a checkpoint's files may lie: its folder, and for a snapshot in the Hub's cache the cache's
    blobs.
    """
    yield folder
    for parent in folder.parents:
        if parent.name == "snapshots" and "--" in parent.parent.name:
            yield parent.parent / "blobs"
            yield parent.parent.parent / "blobs"


def _refuse_pickle(paths: Iterable[Path], where: Path) -> None:
    if pickles := sorted(path.name for path in paths if path.suffix in PICKLES):
        raise ValueError(
            f"only safetensors are read, because a pickle can run any code, but {where} holds {pickles[:3]}: load the "
            "model with transformers where you trust it and save it again (`save_pretrained` writes safetensors)"
        )


def _json(text: bytes, file: Path) -> dict[str, Any]:
    try:
        found = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} must hold valid JSON: {error or 'nested too deeply'}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold a JSON object, but holds a {type(found).__name__}")
    return found


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {name!r} occurs twice")
    return found


def _entry(file: Path, name: str, entry: Any, data: int) -> StoredTensor:
    """One tensor of a header; `data` is where the tensors' bytes begin."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{file}: tensor {name} must have dtype, shape and data_offsets, but has {str(entry)[:200]}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"{file}: tensor {name} has the dtype {str(code)[:50]}, but known are {', '.join(DTYPES)}")
    if not _naturals(shape) or not _naturals(offsets) or len(shape) > _MAX_AXES or len(offsets) != 2:
        raise ValueError(
            f"{file}: tensor {name} must have whole numbers as {str(shape)[:200]} and {str(offsets)[:200]}"
        )
    tensor = StoredTensor(DTYPES[code], tuple(shape), file, data + offsets[0])
    if offsets[1] - offsets[0] != tensor.nbytes:
        raise ValueError(f"{file}: tensor {name} of {tensor.nbytes} bytes must not have the offsets {offsets}")
    return tensor


def _naturals(numbers: Any) -> bool:
    """A list of numbers such as sizes and offsets can be."""
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)


def _check_cover(file: Path, tensors: Mapping[str, StoredTensor], data: int, size: int) -> None:
    """The tensors must fill the file: without a gap, an overlap, or a byte too few or too many."""
    end = data
    for name, tensor in tensors.items():
        if tensor.start != end:
            raise ValueError(f"{file}: tensor {name} must begin at byte {end}, but begins at {tensor.start}")
        end += tensor.nbytes
    if end != size:
        raise ValueError(f"{file} must have {end} bytes by its header, but has {size}: it is cut short or damaged")


def _layout(tensors: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, int], int]:
    """A shard's header, the first byte of each tensor, and the file's size; wide dtypes first, so all are
    aligned.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        offsets = [end, end := end + tensor.nbytes]
        entries[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    starts = {name: data + entries[name]["data_offsets"][0] for name in tensors}
    return len(text).to_bytes(8, "little") + text, starts, data + end


def _remove_checkpoint(folder: Path) -> None:
    """Remove the weights, so that at no moment old weights stand beside new settings; the index goes first."""
    for name in (INDEX, WEIGHTS):
        (folder / name).unlink(missing_ok=True)
    _sync(folder)
    for path in folder.glob(f"model-{'?' * 5}-of-{'?' * 5}.safetensors"):
        path.unlink()


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's memory. (The detour over uint8: numpy has no bfloat16.)"""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _read(descriptor: int, out: memoryview, place: int, file: Path) -> None:
    done = 0
    while done < len(out):
        count = os.preadv(descriptor, [out[done : done + _READ_LIMIT]], place + done)
        if not count:
            raise ValueError(
                f"{file} ends at byte {place + done}, before its header says: it changed during the merge"
            )
        done += count


def _named(error: OSError, folder: Path) -> OSError:
    """An error of the disk, with what it means for the merge."""
    reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
    return OSError(
        f"{reason}: the result cannot be written to {folder}, and what was written of it is removed; "
        "free some space or choose another folder"
    )


def _write(descriptor: int, data: memoryview, place: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done : done + _READ_LIMIT], place + done)


def _sync(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
