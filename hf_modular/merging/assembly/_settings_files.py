"""What a model needs beside its weights: config, generation config, tokenizer or processor, chat template."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_modular.merging.assembly._tokenizers import Tokenizer, save_tokenizer
from hf_modular.merging.recipes._chat_templates import NAMED, is_template
from hf_modular.merging.sources._dotted import changed
from hf_modular.merging.sources._sources import CONFIG, MODEL_FILES, PROCESSING_FILES, files, read_object

GENERATION = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Beside:
    """What the result needs beside its weights.

    Args:
        model: The folder of the model whose config it gets.
        tokenizer: The folder of the model whose tokenizer or processor it gets.
        config: What the config says differently.
        generation: What the generation config says differently.
        chat_template: The template, if it is not the tokenizer's.
        united: The tokenizer, if it is not the folder's as it is.
    """

    model: Path
    tokenizer: Path
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    chat_template: str | None = None
    united: Tokenizer | None = None

    def save(self, target: Path) -> None:
        """Write it all into a folder; keys of the configs are changed only where there are configs."""
        for path in (*files(self.model, MODEL_FILES), *files(self.tokenizer, PROCESSING_FILES)):
            shutil.copyfile(path, target / path.name)
        for name, changes in {CONFIG: self.config, GENERATION: self.generation}.items():
            if changes and (target / name).is_file():
                _write_object(target / name, changed(read_object(target / name), changes))
        if self.united is not None:
            save_tokenizer(self.united, target)
        if self.chat_template is not None:
            (target / CHAT_TEMPLATE).write_text(self.chat_template, "utf-8")


def chat_template(wanted: str | None, folders: Mapping[str, Path]) -> str | None:
    """The template that a recipe asks for, of the folders of the models; None for that of the tokenizer."""
    if wanted is None or is_template(wanted):
        return wanted
    if wanted in NAMED:
        return NAMED[wanted]
    if wanted == "auto":
        found = [template for folder in folders.values() if (template := template_of(folder))]
        return Counter(found).most_common(1)[0][0] if found else None
    if (template := template_of(folders[wanted])) is None:
        raise ValueError(f"`chat_template` names {wanted}, which has no chat template")
    return template


def template_of(folder: Path) -> str | None:
    """The chat template in a folder."""
    if (folder / CHAT_TEMPLATE).is_file():
        return (folder / CHAT_TEMPLATE).read_text("utf-8")
    path = folder / "tokenizer_config.json"
    found = read_object(path).get("chat_template") if path.is_file() else None
    if isinstance(found, list):  # several, each with a name
        found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def token_numbers(folder: Path, *, generation: bool) -> dict[str, Any]:
    """What a model's config or generation config says of special tokens."""
    path = folder / (GENERATION if generation else CONFIG)
    settings = read_object(path) if path.is_file() else {}
    return {key: value for key, value in settings.items() if key.endswith("_token_id")}


def config_changes(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """What the config of the reference model must say of the result's dtype."""
    return {"torch_dtype" if "torch_dtype" in config else "dtype": dtype} if dtype else {}


def _write_object(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
