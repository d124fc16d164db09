"""What the cards of adapters, merged models and other checkpoints have in common."""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hf_modular.cards._artifact import Artifact
from hf_modular.cards._origins import Origin, is_hub_id


class Task(NamedTuple):
    auto_class: str
    pipeline_tag: str | None


# how a model class ends -> the class that loads it, and the Hub's name for its task
TASKS = {
    "ForCausalLM": Task("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": Task("AutoModelForCausalLM", "text-generation"),
    "ForSequenceClassification": Task("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": Task("AutoModelForTokenClassification", "token-classification"),
    "ForQuestionAnswering": Task("AutoModelForQuestionAnswering", "question-answering"),
    "ForMaskedLM": Task("AutoModelForMaskedLM", "fill-mask"),
    "ForImageClassification": Task("AutoModelForImageClassification", "image-classification"),
    "ForAudioClassification": Task("AutoModelForAudioClassification", "audio-classification"),
}
_PROCESSORS = {
    "tokenizer_config.json": ("tokenizer", "AutoTokenizer"),
    "preprocessor_config.json": ("processor", "AutoImageProcessor"),
}
_PATH_KEYS = ("_name_or_path", "name_or_path")
NO_ORIGIN = Origin("the base model")


class Place(NamedTuple):
    """Where the artifact can be loaded from."""

    name: str
    revision: str | None = None

    @property
    def arguments(self) -> str:
        return arguments(self.name, revision=self.revision)


@dataclass(frozen=True)
class Subject:
    """What a card is about."""

    template: str
    origins: list[Origin]
    library_name: str
    tags: list[str]
    summary: str
    snippet: str
    pipeline_tag: str | None = None
    relation: str | None = None  # to its base models, in the Hub's words
    own_type: str | None = None
    notes: list[str] = field(default_factory=list)  # on how to use it
    variables: dict[str, Any] = field(default_factory=dict)
    parents: list[Origin] = field(default_factory=list)  # what else it was made from
    public: dict[str, str] = field(default_factory=dict)  # files whose text would tell a path -> what to publish


def arguments(name: str, **options: Any) -> str:
    """The arguments of a call of `from_pretrained`, as code."""
    given = [f"{key}={json.dumps(v) if isinstance(v, str) else v}" for key, v in options.items() if v is not None]
    return ", ".join([json.dumps(name), *given])


def transformers_import(names: Iterable[str]) -> list[str]:
    listed = ", ".join(sorted(set(names)))
    return [f"from transformers import {listed}"] if listed else []


def processors(artifact: Artifact, place: Place) -> tuple[list[str], list[str]]:
    """The classes of the tokenizer and the image processor in the folder, and the lines that load them."""
    found = [_PROCESSORS[name] for name in _PROCESSORS if name in artifact.files]
    lines = [f"{variable} = {auto_class}.from_pretrained({place.arguments})" for variable, auto_class in found]
    return [auto_class for _, auto_class in found], lines


def task_of(model_class: str | None) -> Task | None:
    """The task of a class such as `LlamaForCausalLM`."""
    return next((task for end, task in TASKS.items() if model_class and model_class.endswith(end)), None)


def about(method: type) -> str:
    """The first paragraph of the module of a method: its name and its paper."""
    text = (sys.modules[method.__module__].__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def code(value: Any) -> str:
    """A value as inline code in a table."""
    text = ", ".join(map(str, sorted(value, key=str))) if isinstance(value, (list, set)) else str(value)
    return "`" + text.replace("|", "\\|").replace("`", "'").replace("\n", " ") + "`"


def count(artifact: Artifact, names: Iterable[str] | None = None) -> int:
    """How many numbers these tensors hold; all of them by default."""
    return sum(artifact.tensors[name].numel for name in (artifact.tensors if names is None else names))


def size_text(artifact: Artifact) -> str:
    """How many tensors and parameters, in which dtypes."""
    dtypes = Counter[str]()
    for tensor in artifact.tensors.values():
        dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel
    listed = ", ".join(f"{number:,} in {dtype}" for dtype, number in dtypes.most_common())
    return f"{len(artifact.tensors)} tensors with {count(artifact):,} elements ({listed})."


def without_paths(artifact: Artifact) -> dict[str, str]:
    """Settings files that say where on this machine they were loaded from -> their text without that."""
    public = {}
    for name in ("config.json", "tokenizer_config.json"):
        settings = artifact.read_json(name)
        paths = [key for key in _PATH_KEYS if settings.get(key) and not is_hub_id(str(settings[key]))]
        if paths:
            public[name] = dump({key: value for key, value in settings.items() if key not in paths})
    return public


def dump(content: dict[str, Any], **options: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, **options) + "\n"
