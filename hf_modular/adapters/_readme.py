"""The note in a saved adapter's README that says what to import before loading."""

import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers.integrations import PeftAdapterMixin

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

_KEEPS_NOTE = "keeps_note_of_hf_modular"
_NOTE = """\
## Loading this adapter

Its type, `{type_name}`, comes from the package `hf_modular`, which has to be imported before PEFT can load it:

```python
# pip install hf_modular
import hf_modular  # noqa: F401  registers {type_name} with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/or/repo/of/this/adapter")
```
"""


def add_loading_note(folder: Path, type_name: str, base_model: str | None) -> None:
    """Put the note behind the metadata of `folder/README.md`, which is made if there is none."""
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else _front_matter(base_model)
    if "import hf_modular" in text:
        return
    head, body = _split_front_matter(text)
    readme.write_text(f"{head}\n{_NOTE.format(type_name=type_name)}{body}", encoding="utf-8")


def keep_note_on_cards() -> None:
    """Have the cards that the Trainer writes over a README keep the note.

    It asks the model to complete its card: PEFT's model, or that of transformers with adapters of its own, which in
    transformers 5 has no such method and makes the Trainer fail.
    """
    for holder in (PeftModel, PeftAdapterMixin):
        complete = getattr(holder, "create_or_update_model_card", None)
        if not hasattr(complete, _KEEPS_NOTE):
            holder.create_or_update_model_card = _completing(complete)


def _completing(complete: Callable[[Any, str], None] | None) -> Callable[[Any, str], None]:
    def create_or_update_model_card(self: Any, output_dir: str) -> None:
        """Updates or creates the model card."""
        if complete is not None:
            complete(self, output_dir)
        for config in getattr(self, "peft_config", {}).values():
            if hasattr(config.peft_type, "added_by"):  # one of ours
                add_loading_note(Path(output_dir), config.peft_type.value, config.base_model_name_or_path)

    setattr(create_or_update_model_card, _KEEPS_NOTE, True)
    return create_or_update_model_card if complete is None else wraps(complete)(create_or_update_model_card)


def _front_matter(base_model: str | None) -> str:
    lines = ["library_name: peft", "tags:", "- hf-modular"]
    if base_model and _HUB_ID.fullmatch(base_model) and not Path(base_model).exists():  # no path: it is one here only
        lines.insert(0, f"base_model: {base_model}")
    return "---\n" + "\n".join(lines) + "\n---\n"


def _split_front_matter(text: str) -> tuple[str, str]:
    if text.startswith("---\n") and (end := text.find("\n---\n", 4)) >= 0:
        return text[: end + 5], text[end + 5 :]
    return "", text
