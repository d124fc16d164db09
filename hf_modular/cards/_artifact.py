"""What is in a folder that is to be published: which kind of model, which tensors, which files may leave it.

Publishing cannot be undone, so files are let through by name, and everything else is left out with its reason.
Weights must be safetensors that fit their index; what is broken is refused here, before anything is sent.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch

from hf_modular.checkpoints import INDEX, WEIGHTS, Checkpoint, StoredTensor
from hf_modular.merging.engine._preflight import is_finite

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_CONFIG = "config.json"
CARD = "README.md"
MERGE_RECIPE = "merge_recipe.yaml"
MERGE_REPORT = "merge_report.json"

# Files at the top of a repository that belong to one upload as a whole: those of the last one must go with it.
OWNED = (
    ADAPTER_CONFIG,
    "adapter_model.*",
    WEIGHTS,
    INDEX,
    "model-*-of-*.safetensors",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    MERGE_RECIPE,
    MERGE_REPORT,
)
_PICKLED_WEIGHTS = ("pytorch_model*.bin", "adapter_model.bin", "consolidated*.pth", "*.ckpt", "tf_model.h5")
_TEXT = (".csv", ".jinja", ".json", ".md", ".txt", ".yaml", ".yml")
_BINARY = (".bpe", ".gif", ".jpeg", ".jpg", ".model", ".png", ".spm", ".svg", ".tiktoken", ".webp")
_NAMES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "CITATION.cff")
_PICKLE = (".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth")
_TRAINING_STATE = ("trainer_state.json", "optimizer*", "scheduler*", "scaler*", "rng_state*", "training_args*")
_WORK_FOLDERS = ("checkpoint-*", "runs", "wandb", "mlruns", "__pycache__", "global_step*")
_SECRET = re.compile(rb"\b(?:hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9]{32,}|ghp_[A-Za-z0-9]{36}|github_pat_\w{60,})\b")
_CHUNK = 1 << 24  # elements that are checked at a time


@dataclass(frozen=True)
class Artifact:
    """A folder with an adapter or a model checkpoint, checked."""

    folder: Path
    kind: Literal["adapter", "model"]
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    files: tuple[str, ...]  # what may be published, the card not among them
    left_out: dict[str, str]  # every other file -> why

    @property
    def weight_files(self) -> list[str]:
        return sorted({tensor.file.relative_to(self.folder).as_posix() for tensor in self.tensors.values()})

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object in the folder; empty if the file is not there."""
        path = self.folder / name
        return _read_json(path) if path.is_file() else {}

    def read_text(self, name: str) -> str | None:
        path = self.folder / name
        return path.read_text(encoding="utf-8") if path.is_file() else None


def read_artifact(folder: str | Path) -> Artifact:
    """Read and check the folder; headers only, no weights.

    Raises:
        FileNotFoundError: If the folder, its config or its weights are not there.
        ValueError: If something in it must not be published; the message says what.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    _refuse_pickled_weights(folder)
    kind, config_name = _kind(folder)
    config = _read_json(folder / config_name)
    _refuse_local_code(config)
    weights = Checkpoint(folder / ADAPTER_WEIGHTS if kind == "adapter" else folder)
    _refuse_empty(weights)
    parts = {file.relative_to(folder).as_posix() for file in weights.files}
    reasons = _reasons_to_leave_out(folder, parts)
    files = tuple(path for path, reason in reasons.items() if reason is None)
    for path in files:
        _refuse_outside(folder, path)
        _refuse_secrets(folder, path)
    left_out = {path: reason for path, reason in reasons.items() if reason}
    return Artifact(folder, kind, config, weights.tensors, tuple(f for f in files if f != CARD), left_out)


def check_values(artifact: Artifact) -> None:
    """Read every tensor once and refuse NaN and infinities."""
    root = artifact.folder / ADAPTER_WEIGHTS if artifact.kind == "adapter" else artifact.folder
    with Checkpoint(root) as weights:
        bad = [name for name, tensor in weights.tensors.items() if not _holds_numbers(weights, name, tensor)]
    if bad:
        raise ValueError(
            f"Weights must be finite to be published, but {_listed(bad)} in {root} has NaN or infinite values."
        )


def _holds_numbers(weights: Checkpoint, name: str, tensor: StoredTensor) -> bool:
    """Whether all elements are finite; read in chunks, since one tensor may be larger than the memory."""
    if not tensor.dtype.is_floating_point:
        return True
    return all(
        is_finite(chunk.float() if chunk.itemsize == 1 else chunk)  # eight bits have no minimum and maximum
        for chunk in _chunks(weights, name, tensor)
    )


def _chunks(weights: Checkpoint, name: str, tensor: StoredTensor) -> Iterator[torch.Tensor]:  # (<= _CHUNK,)
    for start in range(0, tensor.numel, _CHUNK):
        chunk = torch.empty(min(_CHUNK, tensor.numel - start), dtype=tensor.dtype)
        weights.read_into(name, chunk, start)
        yield chunk


def _kind(folder: Path) -> tuple[Literal["adapter", "model"], str]:
    has = {name: (folder / name).is_file() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_CONFIG)}
    has_model = (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()
    if has[ADAPTER_CONFIG] and has[ADAPTER_WEIGHTS] and not has_model:
        return "adapter", ADAPTER_CONFIG
    if has[MODEL_CONFIG] and has_model and not has[ADAPTER_CONFIG]:
        return "model", MODEL_CONFIG
    if has_model and has[ADAPTER_CONFIG]:
        raise ValueError(
            f"{folder} holds an adapter and a whole model, and loaders would disagree about what it is. Publish "
            "them from two folders."
        )
    raise FileNotFoundError(
        f"{folder} must hold an adapter ({ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}) or a model ({MODEL_CONFIG} and "
        f"{WEIGHTS}, or shards with {INDEX}), but has {_listed(sorted(_names(folder))) or 'no files'}."
    )


def _names(folder: Path) -> Iterator[str]:
    return (path.name for path in folder.iterdir() if path.is_file())


def _refuse_empty(weights: Checkpoint) -> None:
    empty = [name for name, tensor in weights.tensors.items() if tensor.numel == 0]
    if empty:
        raise ValueError(
            f"Weights must not be empty, but {_listed(empty)} in {weights.path} has no elements. Sharded training "
            "leaves such files when a model is saved without gathering its parameters."
        )


def _refuse_pickled_weights(folder: Path) -> None:
    pickled = sorted(n for n in _names(folder) if any(fnmatch(n, pattern) for pattern in _PICKLED_WEIGHTS))
    if pickled:
        raise ValueError(
            f"Only safetensors are published, but {folder} holds the weights {_listed(pickled)}, which can run code "
            "when they are loaded. Save the model again with `save_pretrained`, and delete them."
        )


def _refuse_local_code(config: dict[str, Any]) -> None:
    """`auto_map` names classes as "module.Class" for code in the folder, "repo--module.Class" for code elsewhere."""
    references = [r for value in (config.get("auto_map") or {}).values() for r in _as_list(value)]
    local = [reference for reference in references if isinstance(reference, str) and "--" not in reference]
    if local:
        raise ValueError(
            f"Code is not published, but the config's `auto_map` needs {_listed(local)} from the folder. Upload such "
            "a model with `huggingface_hub`."
        )


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _reasons_to_leave_out(folder: Path, weights: set[str]) -> dict[str, str | None]:
    """Every file below the folder, with the reason to leave it out; None for those that may be published."""
    found = _all_files(folder)
    others = {str(PurePosixPath(path).parent) for path in found if path.endswith(".safetensors")}
    others -= {str(PurePosixPath(path).parent) for path in weights}
    reasons = {path: _reason_to_leave_out(path, weights) for path in found}
    inside_others = {path: "belongs to another model" for path in found if str(PurePosixPath(path).parent) in others}
    return reasons | inside_others


def _all_files(folder: Path) -> list[str]:
    """Paths of all files below the folder. Folders that are not entered are in the list as they are."""
    found = []
    for root, folders, names in os.walk(folder):
        closed = [name for name in folders if _is_work_folder(name) or (Path(root) / name).is_symlink()]
        folders[:] = sorted(set(folders) - set(closed))
        found += [(Path(root) / name).relative_to(folder).as_posix() for name in names + closed]
    return sorted(found)


def _is_work_folder(name: str) -> bool:
    return name.startswith(".") or any(fnmatch(name, pattern) for pattern in _WORK_FOLDERS)


def _reason_to_leave_out(path: str, weights: set[str]) -> str | None:
    name = PurePosixPath(path).name
    suffix = PurePosixPath(path).suffix.lower()
    checks = (
        (name.startswith("."), "hidden"),
        (any(fnmatch(name, pattern) for pattern in (*_WORK_FOLDERS, *_TRAINING_STATE)), "left from training"),
        (suffix in _PICKLE, "may hold a pickle"),
        (suffix == ".safetensors" and path not in weights, "not part of the checkpoint"),
    )
    for applies, reason in checks:
        if applies:
            return reason
    known = suffix in (*_TEXT, *_BINARY, ".safetensors") or any(fnmatch(name, n) for n in _NAMES)
    return None if known else "not a kind of file that a model consists of"


def _refuse_outside(folder: Path, path: str) -> None:
    target = (folder / path).resolve()
    if not target.is_relative_to(folder.resolve()):
        raise ValueError(
            f"{folder / path} is a link that leaves the folder, to {target}. Put a copy of the file in its place."
        )


def _refuse_secrets(folder: Path, path: str) -> None:
    """An access token in a text file would be published with it."""
    if PurePosixPath(path).suffix.lower() not in _TEXT:
        return
    for number, line in enumerate((folder / path).read_bytes().splitlines(), start=1):
        if _SECRET.search(line):
            raise ValueError(f"{folder / path}, line {number}, holds what looks like an access token. Remove it.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} must be JSON, but: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(content).__name__}.")
    return content


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
