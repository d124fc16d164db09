"""What a model needs beside its weights: config, generation config, tokenizer or processor, chat template."""

import json
import shutil
from pathlib import Path
from typing import Any

from hf_modular.merging._sources import CONFIG, MODEL_FILES, PROCESSING_FILES, files, read_object

CHAT_TEMPLATE = "chat_template.jinja"


def copy_settings(
    model: Path, tokenizer: Path, target: Path, changes: dict[str, Any], chat_template: str | None
) -> None:
    """Copy the settings of a model and the tokenizer of another; change keys of the config, where there is one."""
    for path in (*files(model, MODEL_FILES), *files(tokenizer, PROCESSING_FILES)):
        shutil.copyfile(path, target / path.name)
    if changes and (target / CONFIG).is_file():
        config = read_object(target / CONFIG) | changes
        _write_object(target / CONFIG, {key: value for key, value in config.items() if key not in _left_out(changes)})
    if chat_template is not None:
        (target / CHAT_TEMPLATE).write_text(chat_template, "utf-8")


def _left_out(changes: dict[str, Any]) -> set[str]:
    return {key for key, value in changes.items() if value is None}


def config_changes(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """What the config of the reference model must say of the result's dtype."""
    return {"torch_dtype" if "torch_dtype" in config else "dtype": dtype} if dtype else {}


def _write_object(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
