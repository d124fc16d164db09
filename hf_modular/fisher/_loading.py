"""Models and texts by name, for commands that compute something of a model on data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

ADAPTER_CONFIG = "adapter_config.json"

_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def load_model(name: str, device: str = "auto") -> nn.Module:
    """A model as its checkpoint has it, or an adapter on its base model; from a folder or the Hub, safetensors only.

    With `device="auto"` each process of `accelerate launch` gets its own, and a single one the accelerator if there is
    one.
    """
    import transformers
    from accelerate import PartialState

    if _is_adapter(name):
        from peft import PeftConfig, PeftModel

        base = PeftConfig.from_pretrained(name).base_model_name_or_path
        return PeftModel.from_pretrained(load_model(base, device), name)
    config = transformers.AutoConfig.from_pretrained(name)
    architecture = (config.architectures or [None])[0]
    kind = getattr(transformers, str(architecture), None)
    if kind is None:
        raise ValueError(f"the config of {name} must name an architecture of transformers, but has {architecture!r}")
    model: nn.Module = kind.from_pretrained(name, use_safetensors=True)
    return model.to(PartialState().device if device == "auto" else device)


def load_texts(
    dataset: str,
    split: str,
    tokenizer: str,
    columns: Sequence[str],
    *,
    label: str | None = "label",
    max_length: int = 128,
    examples: int | None = None,
    seed: int = 0,
) -> Any:
    """A `datasets.Dataset` of tokens without padding, `examples` of them drawn by the seed.

    Args:
        dataset: A file (.json, .jsonl, .csv, .parquet, .txt), a folder made by `save_to_disk`, or a name of the Hub.
        tokenizer: The model whose tokenizer is used, or an adapter.
        columns: Those of the text, or of a pair of texts. With none the data has tokens already.
        label: The column of the labels, kept as `labels` if it is there.
    """
    from transformers import AutoTokenizer

    rows = _rows(dataset, split)
    if missing := [column for column in columns if column not in rows.column_names]:
        raise ValueError(f"{dataset} must have the columns {missing}, but has {rows.column_names}")
    if examples is not None and examples < len(rows):
        rows = rows.shuffle(seed=seed).select(range(examples))
    if label in rows.column_names and label != "labels":
        rows = rows.rename_column(label, "labels")
    if not columns:
        return rows
    tokens = AutoTokenizer.from_pretrained(_base_of(tokenizer))

    def tokenized(batch: Mapping[str, list[str]]) -> dict[str, Any]:
        return dict(tokens(*(batch[column] for column in columns), truncation=True, max_length=max_length))

    others = [column for column in rows.column_names if column != "labels"]
    return rows.map(tokenized, batched=True, remove_columns=others)


def _rows(dataset: str, split: str) -> Any:
    import datasets

    path = Path(dataset)
    if path.is_file():
        if path.suffix not in _FORMATS:
            raise ValueError(f"a data file must be one of {sorted(_FORMATS)}, but got {dataset}")
        return datasets.load_dataset(_FORMATS[path.suffix], data_files=dataset, split="train")
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        found = datasets.load_from_disk(dataset)
        return found[split] if isinstance(found, datasets.DatasetDict) else found
    return datasets.load_dataset(dataset, split=split)


def _is_adapter(name: str) -> bool:
    from huggingface_hub import file_exists

    if Path(name).is_dir():
        return (Path(name) / ADAPTER_CONFIG).is_file()
    return file_exists(name, ADAPTER_CONFIG)


def _base_of(name: str) -> str:
    """An adapter's base model, else the model itself; an adapter's folder may have the tokenizer, too."""
    if (Path(name) / "tokenizer_config.json").is_file() or not _is_adapter(name):
        return name
    from peft import PeftConfig

    return str(PeftConfig.from_pretrained(name).base_model_name_or_path)
