"""What a checkpoint or an adapter holds, by its headers and settings; of a repository nothing else is downloaded.

An adapter in a folder is read, too: one that is all zeros, or not finite, looks like any other from outside.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_modular.checkpoints import DTYPES, INDEX, WEIGHTS, Checkpoint, TensorInfo

CONFIG, ADAPTER_CONFIG, ADAPTER_WEIGHTS = "config.json", "adapter_config.json", "adapter_model.safetensors"
_SHOWN = 8  # of many
_SETTINGS = ("model_type", "architectures", "num_hidden_layers", "n_layer", "hidden_size", "n_embd", "vocab_size")
_ADAPTER_SETTINGS = (
    "task_type",
    "base_model_name_or_path",
    "revision",
    "r",
    "lora_alpha",
    "target_modules",
    "target_parameters",
    "modules_to_save",
    "bias",
    "use_dora",
    "use_rslora",
)


@dataclass(frozen=True)
class Inspection:
    """What is there.

    Args:
        reference: The folder or repository.
        kind: "model" or "adapter".
        files: The files of weights, with their bytes.
        tensors: How many there are.
        parameters: How many numbers they hold.
        bytes: What they take.
        dtypes: The numbers of each dtype.
        settings: What the config says, as far as it says what is there.
        layers: Of an adapter: the size of what it holds for each layer, where the values were read.
        tied: Names that a model has beside those stored -> the stored name.
        problems: What is not as it should be.
    """

    reference: str
    kind: str
    files: dict[str, int]
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    settings: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, float] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    def summary(self) -> str:
        """The same in lines."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        dtypes = ", ".join(f"{count:,} in {dtype}" for dtype, count in self.dtypes.items())
        yield f"{self.reference}: {self.kind} of {self.tensors} tensors, {self.parameters:,} parameters ({dtypes})"
        yield f"files: {_few([f'{name} ({size / 1e6:,.1f} MB)' for name, size in self.files.items()])}"
        yield from (f"{name}: {_few(value)}" for name, value in self.settings.items())
        if self.layers:
            smallest, largest = min(self.layers.values()), max(self.layers.values())
            yield f"layers: {len(self.layers)}, with norms from {smallest:.3g} to {largest:.3g}"
        if self.tied:
            yield f"tied: {_few([f'{name} to {stored}' for name, stored in self.tied.items()])}"
        yield from (f"problem: {problem}" for problem in self.problems)


@dataclass(frozen=True)
class _Found:
    """Files and settings, wherever they are."""

    reference: str
    kind: str
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    files: dict[str, int]
    weights: Checkpoint | None = None  # where values can be read


def inspect(reference: str | Path) -> Inspection:
    """What a folder, or a repository as `name` or `name@revision`, holds.

    Raises:
        ValueError, FileNotFoundError: If there is no model or adapter, or its files are damaged.
    """
    folder = Path(reference).expanduser()
    found = _in_folder(str(reference), folder) if folder.is_dir() else _on_hub(str(reference))
    tensors = found.tensors
    dtypes: dict[str, int] = {}
    for tensor in tensors.values():
        name = str(tensor.dtype).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + tensor.numel
    adapter = found.kind == "adapter"
    layers, problems = _adapter_values(found) if adapter else ({}, [])
    tied, more = ({}, [*_adapter_problems(found)]) if adapter else _architecture(found)
    return Inspection(
        reference=found.reference,
        kind=found.kind,
        files=found.files,
        tensors=len(tensors),
        parameters=sum(tensor.numel for tensor in tensors.values()),
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
        dtypes=dict(sorted(dtypes.items(), key=lambda item: -item[1])),
        settings=_settings(found),
        layers=layers,
        tied=tied,
        problems=[*more, *problems],
    )


# ---- where it is


def _in_folder(reference: str, folder: Path) -> _Found:
    from hf_modular.merging.sources._sources import read_object

    adapter = (folder / ADAPTER_CONFIG).is_file()
    weights = Checkpoint(folder / ADAPTER_WEIGHTS if adapter else folder)
    path = folder / (ADAPTER_CONFIG if adapter else CONFIG)
    config = read_object(path) if path.is_file() else {}
    files = {file.name: file.stat().st_size for file in weights.files}
    return _Found(reference, "adapter" if adapter else "model", config, weights.tensors, files, weights)


def _on_hub(reference: str) -> _Found:
    """By the headers of the files, which are at their beginning."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, NotASafetensorsRepoError

    name, _, revision = reference.partition("@")
    api = HfApi()
    try:
        info = api.model_info(name, revision=revision or None, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        adapter = ADAPTER_CONFIG in sizes
        if adapter and ADAPTER_WEIGHTS in sizes:
            headers = {ADAPTER_WEIGHTS: api.parse_safetensors_file_metadata(name, ADAPTER_WEIGHTS, revision=info.sha)}
        else:
            headers = api.get_safetensors_metadata(name, revision=info.sha).files_metadata
        config = _downloaded(api, name, info.sha, ADAPTER_CONFIG if adapter else CONFIG, sizes)
    except NotASafetensorsRepoError:
        raise ValueError(f"{reference} has no {WEIGHTS} or {INDEX}: only safetensors are read") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise FileNotFoundError(f"{reference} is no folder here, and the Hub does not give it: {reason}") from error
    tensors = {
        name: TensorInfo(_dtype(tensor.dtype, reference), tuple(tensor.shape))
        for header in headers.values()
        for name, tensor in header.tensors.items()
    }
    kind = "adapter" if adapter else "model"
    return _Found(f"{name}@{info.sha}", kind, config, tensors, {file: sizes[file] for file in headers})


def _dtype(code: str, reference: str) -> Any:
    if code not in DTYPES:
        raise ValueError(f"{reference} has tensors of dtype {code}, of which there are {sorted(DTYPES)} here")
    return DTYPES[code]


def _downloaded(api: Any, name: str, revision: str | None, file: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    from hf_modular.merging.sources._sources import read_object

    return read_object(Path(api.hf_hub_download(name, file, revision=revision))) if file in sizes else {}


# ---- what is to be said of it


def _settings(found: _Found) -> dict[str, Any]:
    if found.kind == "adapter":
        named = {"type": found.config.get("peft_type")} | {key: found.config.get(key) for key in _ADAPTER_SETTINGS}
    else:
        quantised = found.config.get("quantization_config")
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        named = {key: found.config.get(key) for key in _SETTINGS} | {"quantised by": method}
    return {key: value for key, value in named.items() if value not in (None, [], {}, False, "none")}


def _architecture(found: _Found) -> tuple[dict[str, str], list[str]]:
    """What is tied, and how the names and shapes differ from those of the model that transformers would build."""
    from hf_modular.merging.sources._names import known_by
    from hf_modular.merging.sources._quantised import quantisation

    problems = [f"there is no {CONFIG}"] if not found.config else []
    known = known_by(found.config, found.tensors.keys())
    if not known.shapes or quantisation(found.config):
        return {}, problems
    tied = {name: other for name, other in known.tied.items() if name not in found.tensors and other in found.tensors}
    for name, tensor in found.tensors.items():
        shape = known.shapes.get(name)
        if shape is not None and shape != tensor.shape:
            problems.append(f"{name} must have the shape {shape} by the config, but has {tensor.shape}")
    there = {*found.tensors, *tied, *(known.tied[name] for name in found.tensors.keys() & known.tied.keys())}
    lacking = [n for n in known.shapes if n not in there and not any(re.search(made, n) for made in known.made)]
    if lacking and found.tensors.keys() <= known.shapes.keys():
        problems.append(f"transformers would draw at random what is not there: {_few(lacking)}")
    return tied, problems


def _adapter_problems(found: _Found) -> Iterator[str]:
    """What headers and settings show."""
    kind, rank = found.config.get("peft_type"), found.config.get("r")
    if not kind:
        yield f"{ADAPTER_CONFIG} names no peft_type"
    if empty := [name for name, tensor in found.tensors.items() if not tensor.numel]:
        yield f"there is nothing in {_few(empty)}, as in shards of which the other parts are missing"
    plain = kind == "LORA" and isinstance(rank, int) and not found.config.get("rank_pattern")
    halves: dict[str, set[str]] = {}
    for name, tensor in found.tensors.items():
        layer, part, _ = name.partition(".lora_A") if ".lora_A" in name else name.partition(".lora_B")
        if kind == "LORA" and part:
            halves.setdefault(layer, set()).add(part)
        whole = not found.config.get("target_parameters")
        if plain and whole and part == ".lora_A" and tensor.shape and tensor.shape[0] != rank:
            yield f"{name} must have r={rank} rows, but has {tensor.shape[0]}"
    if lonely := [layer for layer, parts in halves.items() if len(parts) < 2]:
        yield f"one of lora_A and lora_B is missing for {_few(lonely)}"


def _adapter_values(found: _Found) -> tuple[dict[str, float], list[str]]:
    """The norm of what each layer has, and what the values show; nothing of what is not here."""
    if found.weights is None:
        return {}, []
    squares: dict[str, float] = {}
    zeros, infinite = [], []
    with found.weights as weights:
        for name, info in found.tensors.items():
            if not info.dtype.is_floating_point or not info.numel:
                continue
            square = float(weights.read(name).double().square().sum())
            layer = name.rpartition(".lora_")[0] or name.rpartition(".")[0]
            squares[layer] = squares.get(layer, 0.0) + square
            infinite += [] if math.isfinite(square) else [name]
            zeros += [name] if square == 0 else []
    problems = [f"NaN or infinite values are in {_few(infinite)}"] if infinite else []
    if zeros:
        problems.append(f"all values are zero in {len(zeros)} tensors: {_few(zeros)}")
    layers = {name.removeprefix("base_model.model."): math.sqrt(square) for name, square in squares.items()}
    return layers, problems


def _few(value: Any) -> str:
    if not isinstance(value, (list, tuple, set)):
        return str(value)
    shown = ", ".join(map(str, [*value][:_SHOWN]))
    return shown if len(value) <= _SHOWN else f"{shown} and {len(value) - _SHOWN} more"
