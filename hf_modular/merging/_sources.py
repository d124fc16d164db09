"""Where tensors and settings come from: a folder, or a repository of the Hub."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import local
from typing import Any

import torch
from torch import Tensor

from hf_modular.checkpoints import INDEX, WEIGHTS, Checkpoint, TensorInfo

CONFIG = "config.json"
# what a merged model takes over beside its weights, all of it text or a tokenizer's own format, none of it code
MODEL_FILES = ("config.json", "generation_config.json")
COMPANION_FILES = ("fisher_config.json", "activations_config.json")
PROCESSING_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.spm",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece*.model",
    "normalizer.json",
    "chat_template*",
    "*processor_config.json",
)
_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".spm", ".tiktoken")
_BUFFER = 1 << 20  # bytes of a reading buffer that is kept
_KEPT = local()


@dataclass(frozen=True, eq=False)
class Source:
    """One of the models of a merge, its files open for reading."""

    reference: str  # as the recipe names it
    folder: Path
    weights: Checkpoint
    commit: str | None = None  # of a repository
    tied: dict[str, str] = field(
        default_factory=dict
    )  # names that are not stored -> the stored name of the same tensor
    left_out: set[str] = field(default_factory=set)  # stored names that are not part of the model

    @property
    def pinned(self) -> str:
        """A reference that stays the same when the repository changes."""
        return f"{_split(self.reference)[0]}@{self.commit}" if self.commit else self.reference

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        stored = self.weights.tensors
        own: dict[str, TensorInfo] = {name: stored[name] for name in stored if name not in self.left_out}
        return own | {name: stored[other] for name, other in self.tied.items()}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's `config.json`; empty where there is none."""
        path = self.folder / CONFIG
        return read_object(path) if path.is_file() else {}

    def fill(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out`, flat, with elements from flat index `start` on, in the dtype and on the device of `out`."""
        name = self.tied.get(name, name)
        dtype = self.weights.tensors[name].dtype
        if out.dtype == dtype and out.device.type == "cpu":
            self.weights.read_into(name, out, start)
            return
        raw, memory = _buffer(out.numel(), dtype)
        self.weights.read_bytes(name, start * dtype.itemsize, memory)
        out.copy_(raw)


def _buffer(numel: int, dtype: torch.dtype) -> tuple[Tensor, memoryview]:
    """Memory to read into, as elements and as bytes; a thread's next small one takes its place."""
    if numel * dtype.itemsize > _BUFFER:
        return _views(torch.empty(numel * dtype.itemsize, dtype=torch.uint8), dtype)
    known: dict[Any, Any] = _KEPT.__dict__.setdefault(
        "views", {}
    )  # this thread's; views, because to make one takes as long as to read a few thousand bytes
    if (numel, dtype) not in known:
        whole = known.setdefault("bytes", torch.empty(_BUFFER, dtype=torch.uint8))
        known[numel, dtype] = _views(whole[: numel * dtype.itemsize], dtype)
    return known[numel, dtype]


def _views(raw: Tensor, dtype: torch.dtype) -> tuple[Tensor, memoryview]:
    return raw.view(dtype), raw.numpy().data


def open_source(reference: str) -> Source:
    """Open a folder, or a repository as `name` or `name@revision`, downloaded unless it is in the cache."""
    folder, commit = locate(reference)
    return Source(reference, folder, Checkpoint(folder), commit)


def locate(reference: str) -> tuple[Path, str | None]:
    """The folder of a model, and the commit if it is a repository's."""
    path = Path(reference).expanduser()
    if path.is_dir():
        return path, None
    if path.exists():
        raise ValueError(f"a model must be given as its folder, but {reference} is a file")
    name, revision = _split(reference)
    if re.match(r"[./~]|.:", reference) or name.count("/") > 1 or "\\" in reference:
        raise FileNotFoundError(f"there is no folder {reference}")
    if "+" in reference:
        raise ValueError(
            f"{reference}: merging base + adapter is not supported yet; merge the adapter into its base first"
        )
    return _downloaded(name, revision, reference)


def files(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    """The files in a folder itself that patterns name, without code, pickles and links to nothing."""
    for path in sorted(folder.iterdir()):
        if path.suffix in _SUFFIXES and path.is_file() and any(path.match(pattern) for pattern in patterns):
            yield path


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must hold valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(found).__name__}")
    return found


def _split(reference: str) -> tuple[str, str | None]:
    name, at, revision = reference.partition("@")
    return name, revision if at else None


def _downloaded(name: str, revision: str | None, reference: str) -> tuple[Path, str]:
    """The settings first: they say which files hold the weights, and a repository may hold the same weights twice."""
    from huggingface_hub import snapshot_download

    try:
        settings = (*MODEL_FILES, *PROCESSING_FILES, *COMPANION_FILES, INDEX)
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*settings], ignore_patterns=["*/*"]))
        weights = _weight_files(folder / INDEX)
        folder = Path(snapshot_download(name, revision=folder.name, allow_patterns=weights, ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"{reference} is no folder here, and the Hub does not give it: {reason}") from error
    return folder, folder.name


def _weight_files(index: Path) -> list[str]:
    listed = read_object(index).get("weight_map") if index.is_file() else None
    return sorted({str(file) for file in listed.values()}) if isinstance(listed, dict) else [WEIGHTS]
