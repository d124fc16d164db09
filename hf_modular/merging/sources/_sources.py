"""Where tensors and settings come from: a folder, or a repository of the Hub."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from threading import local
from typing import Any, Literal

import torch
from torch import Tensor

from hf_modular.checkpoints import INDEX, WEIGHTS, Checkpoint, TensorInfo, refuse_outside
from hf_modular.merging.sources._computed import ComputedCheckpoint
from hf_modular.merging.sources._dotted import changed
from hf_modular.merging.sources._quantised import dequantised, quantisation

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
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", *PROCESSING_FILES)
Precision = Literal["original", "dequantized"]
_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".spm", ".tiktoken")
_TEXT = 1 << 28  # bytes of a JSON file; those of tokenizers have some ten million
_BUFFER = 1 << 20  # bytes of a reading buffer that is kept
_KEPT = local()


@dataclass(frozen=True, eq=False)
class Source:
    """One of the models of a merge, its files open for reading.

    Args:
        reference: What the recipe calls it.
        folder: Where its config is, and all that is copied but weights and what prepares inputs.
        weights: Its tensors.
        commit: Of a repository.
        tied: Names that are not stored -> the stored name of the same tensor.
        left_out: Stored names that are not part of the model.
        untied: Stored names of tensors that the config would tie to others, although they differ from them.
        pin: A reference that stays the same when a repository changes, where it is not made of the commit.
        changes: What its config must say differently from the file in the folder; None where a key must go.
        prepared_in: Where its tokenizer or processor is, if not in the folder.
        problems: What speaks against a merge with it.
        notes: What was decided and may surprise.
        about: What else a report says of it.
        parts: The base and the adapter's folder, if it is a model with an adapter.
    """

    reference: str
    folder: Path
    weights: Checkpoint
    commit: str | None = None
    tied: dict[str, str] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)
    untied: set[str] = field(default_factory=set)
    pin: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    prepared_in: Path | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    parts: "tuple[Source, Path] | None" = None

    @property
    def pinned(self) -> str:
        """A reference that stays the same when the repository changes."""
        if self.pin is not None:
            return self.pin
        return f"{_split(self.reference)[0]}@{self.commit}" if self.commit else self.reference

    @property
    def processing(self) -> Path:
        """Where its tokenizer or processor is."""
        return self.prepared_in or self.folder

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        stored = self.weights.tensors
        own: dict[str, TensorInfo] = {name: stored[name] for name in stored if name not in self.left_out}
        return own | {name: stored[other] for name, other in self.tied.items()}

    @cached_property
    def config(self) -> dict[str, Any]:
        """What the model's `config.json` must say; empty where there is none."""
        path = self.folder / CONFIG
        if path.is_file():
            refuse_outside(path, self.folder)
        return changed(read_object(path), self.changes) if path.is_file() else {}

    def fill(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out`, flat, with elements from flat index `start` on, in the dtype and on the device of `out`."""
        name = self.tied.get(name, name)
        if isinstance(self.weights, ComputedCheckpoint) and (value := self.weights.computed(name)) is not None:
            out.copy_(value[start : start + out.numel()])
            return
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


def open_source(reference: str, base_precision: Precision | None = None, *, any_base: bool = False) -> Source:
    """Open a model: a folder, a repository as `name` or `name@revision`, or `model+adapter`.

    Args:
        reference: The model. Repositories are downloaded unless they are in the cache.
        base_precision: Whether a model may be a quantised one, which is then read as the numbers that its codes stand
            for: `"dequantized"`, or `"original"` if it must not be. By default, too, a quantised one is refused.
        any_base: Take an adapter that was trained on another base, too.
    """
    base, adapter = split_adapter(reference)
    source = _open_model(base, base_precision)
    if adapter is None:
        return source
    from hf_modular.merging.sources._with_adapter import with_adapter

    try:
        folder, commit = locate(adapter, ADAPTER_FILES)
        return with_adapter(source, adapter, folder, commit, any_base=any_base)
    except BaseException:
        source.weights.close()
        raise


def split_adapter(reference: str) -> tuple[str, str | None]:
    """The model and the adapter of a reference; no adapter where it names a folder as a whole."""
    if "+" not in reference or Path(reference).expanduser().exists():
        return reference, None
    parts = reference.split("+")
    splits = [("+".join(parts[:i]), "+".join(parts[i:])) for i in range(1, len(parts))]
    there = [split for split in splits if all(Path(part).expanduser().is_dir() for part in split)]
    found = there or [split for split in splits if len(splits) == 1]
    if len(found) != 1 or not all(found[0]):
        raise ValueError(f"a model with one adapter must be given as model+adapter, but got {reference}")
    return found[0]


def _open_model(reference: str, base_precision: Precision | None) -> Source:
    folder, commit = locate(reference)
    source = Source(reference, folder, Checkpoint(folder), commit)
    method = quantisation(source.config)
    if method is None:
        if base_precision == "dequantized":
            source.notes.append(f"{reference} is not quantised: it is taken as it is")
        return replace(source, about={"precision": "original"} if base_precision else {})
    if base_precision != "dequantized":
        source.weights.close()
        raise ValueError(
            f"{reference} is quantised ({method}): give the model that it was made from, which is what an adapter is "
            "usually merged into, or say `base_precision: dequantized` to take what its codes stand for"
        )
    weights = dequantised(source.weights, source.config, reference)
    note = f"{reference} is quantised ({method}) and was dequantised; the result is not quantised again"
    about = {"precision": "dequantized", "quantised_by": method}
    return replace(source, weights=weights, changes={"quantization_config": None}, notes=[note], about=about)


def locate(reference: str, patterns: tuple[str, ...] | None = None) -> tuple[Path, str | None]:
    """The folder of a model, or of files by patterns, and the commit if it is a repository's."""
    path = Path(reference).expanduser()
    if path.is_dir():
        return path, None
    if path.exists():
        raise ValueError(f"a model must be given as its folder, but {reference} is a file")
    name, revision = _split(reference)
    if re.match(r"[./~]|.:", reference) or name.count("/") > 1 or "\\" in reference:
        raise FileNotFoundError(f"there is no folder {reference}")
    if "+" in reference:
        raise ValueError(f"{reference} must be a model alone here, without an adapter")
    return _downloaded(name, revision, reference, patterns)


def files(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    """The files in a folder itself that patterns name, without code, pickles and links to nothing or elsewhere."""
    for path in sorted(folder.iterdir()):
        if path.suffix in _SUFFIXES and path.is_file() and any(path.match(pattern) for pattern in patterns):
            refuse_outside(path, folder)
            yield path


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    if path.stat().st_size > _TEXT:
        raise ValueError(f"{path} must have at most {_TEXT} bytes, but has {path.stat().st_size}")
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


def _downloaded(name: str, revision: str | None, reference: str, patterns: tuple[str, ...] | None) -> tuple[Path, str]:
    """The settings first: they say which files hold the weights, and a repository may hold the same weights twice."""
    from huggingface_hub import snapshot_download

    try:
        settings = patterns or (*MODEL_FILES, *PROCESSING_FILES, *COMPANION_FILES, INDEX)
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*settings], ignore_patterns=["*/*"]))
        if patterns is None:
            weights = _weight_files(folder / INDEX)
            folder = Path(
                snapshot_download(name, revision=folder.name, allow_patterns=weights, ignore_patterns=["*/*"])
            )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"{reference} is no folder here, and the Hub does not give it: {reason}") from error
    return folder, folder.name


def _weight_files(index: Path) -> list[str]:
    listed = read_object(index).get("weight_map") if index.is_file() else None
    return sorted({str(file) for file in listed.values()}) if isinstance(listed, dict) else [WEIGHTS]
