"""What a card says about each kind of artifact: an adapter, a merged model, or another checkpoint."""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hf_modular._artifact import Artifact
from hf_modular._origins import Lookup, Origin, trace

OWN_TYPES = "HFM_"  # how the adapter types of this package begin; PEFT alone knows none of them


class Task(NamedTuple):
    auto_class: str
    pipeline_tag: str | None


# how a model class ends -> the class that loads it, and the Hub's name for its task
_TASKS = {
    "ForCausalLM": Task("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": Task("AutoModelForCausalLM", "text-generation"),
    "ForSequenceClassification": Task("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": Task("AutoModelForTokenClassification", "token-classification"),
    "ForQuestionAnswering": Task("AutoModelForQuestionAnswering", "question-answering"),
    "ForMaskedLM": Task("AutoModelForMaskedLM", "fill-mask"),
    "ForImageClassification": Task("AutoModelForImageClassification", "image-classification"),
    "ForAudioClassification": Task("AutoModelForAudioClassification", "audio-classification"),
}
# PEFT's task types
_TASK_TYPES = {
    "CAUSAL_LM": _TASKS["ForCausalLM"],
    "SEQ_CLS": _TASKS["ForSequenceClassification"],
    "TOKEN_CLS": _TASKS["ForTokenClassification"],
    "QUESTION_ANS": _TASKS["ForQuestionAnswering"],
    "SEQ_2_SEQ_LM": Task("AutoModelForSeq2SeqLM", None),
    "FEATURE_EXTRACTION": Task("AutoModel", "feature-extraction"),
}
_PROCESSORS = {
    "tokenizer_config.json": ("tokenizer", "AutoTokenizer"),
    "preprocessor_config.json": ("processor", "AutoImageProcessor"),
}
_HEAD = re.compile(r"\b(?:classifier|score|out_proj|head)\.weight$")
_NO_SETTINGS = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "revision")


NO_ORIGIN = Origin("the base model")


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


class Place(NamedTuple):
    """Where the artifact can be loaded from."""

    name: str
    revision: str | None = None

    @property
    def arguments(self) -> str:
        return arguments(self.name, revision=self.revision)


def arguments(name: str, **options: Any) -> str:
    """The arguments of a call of `from_pretrained`, as code."""
    given = [f"{key}={value!r}" for key, value in options.items() if value is not None]
    return ", ".join(['"' + name + '"', *given]).replace("'", '"')


# ---- adapters


def describe_adapter(artifact: Artifact, place: Place, base_name: str | None, lookup: Lookup) -> Subject:
    config = artifact.config
    peft_type = str(config.get("peft_type"))
    named = base_name or config.get("base_model_name_or_path")
    base = trace(named, config.get("revision"), lookup) if named else NO_ORIGIN
    task = _adapted_task(config)
    parameters = _parameters(artifact, peft_type)
    own = peft_type.startswith(OWN_TYPES)
    snippet = _adapter_snippet(artifact, place, base, own)
    return Subject(
        template="adapter.md",
        origins=[base],
        library_name="peft",
        tags=["hf-modular", _short(peft_type).lower(), *([f"base_model:adapter:{base.id}"] if base.id else [])],
        summary=f"{_short(peft_type)} adapter for {base.link}, {_total(parameters)} parameters.",
        snippet=snippet,
        pipeline_tag=task.pipeline_tag if task else None,
        relation="adapter" if base.id else None,
        own_type=peft_type if own else None,
        notes=_base_notes(base, snippet),
        variables={
            "base": _base_text(base),
            "method": _adapter_method(peft_type, config.get("peft_version")),
            "settings": [(name, code(value)) for name, value in sorted(config.items()) if _is_setting(name, value)],
            "parameters": parameters,
        },
    )


def _short(peft_type: str) -> str:
    return peft_type.removeprefix(OWN_TYPES)


def _total(parameters: list[tuple[str, int]]) -> str:
    return f"{sum(number for _, number in parameters):,}"


def _adapted_task(config: Mapping[str, Any]) -> Task | None:
    if config.get("task_type"):
        return _TASK_TYPES.get(config["task_type"])
    return task_of((config.get("auto_mapping") or {}).get("base_model_class"))


def task_of(model_class: str | None) -> Task | None:
    """The task of a class such as `LlamaForCausalLM`."""
    return next((task for end, task in _TASKS.items() if model_class and model_class.endswith(end)), None)


def _is_setting(name: str, value: Any) -> bool:
    return name not in _NO_SETTINGS and value not in (None, {}, [], "")


def code(value: Any) -> str:
    """A value as inline code in a table."""
    text = ", ".join(map(str, sorted(value, key=str))) if isinstance(value, (list, set)) else str(value)
    return "`" + text.replace("|", "\\|").replace("`", "'").replace("\n", " ") + "`"


def _parameters(artifact: Artifact, peft_type: str) -> list[tuple[str, int]]:
    """Trained parameters: the adapter's, and those of modules that were trained whole."""
    prefix = f".{peft_type.lower()}_"
    adapted = {name for name in artifact.tensors if prefix in name}
    if not adapted:  # a type whose parameters are named otherwise
        return [("all", _count(artifact, artifact.tensors))]
    layers = len({name.split(prefix)[0] for name in adapted})
    whole = artifact.tensors.keys() - adapted
    rows = [(f"adapter, on {layers} layers", _count(artifact, adapted))]
    return rows + ([("modules trained whole", _count(artifact, whole))] if whole else [])


def _count(artifact: Artifact, names: Iterable[str]) -> int:
    return sum(artifact.tensors[name].numel for name in names)


def _adapter_method(peft_type: str, version: str | None) -> str:
    if not peft_type.startswith(OWN_TYPES):
        return f"The adapter type is `{peft_type}` of PEFT{f' {version}' if version else ''}."
    from hf_modular.adapters import METHODS  # here, since it takes PEFT with it, which a merged model needs not

    methods = {str(config.type_name): config for config, _ in METHODS.values()}
    return about(methods[peft_type]) if peft_type in methods else f"The adapter type is `{peft_type}`."


def about(method: type) -> str:
    """The first paragraph of the module of a method: its name and its paper."""
    text = (sys.modules[method.__module__].__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def _base_text(base: Origin) -> str:
    if base == NO_ORIGIN:
        return "Unknown: none was stated."
    if base.id is None:
        return f"{base.link}: {base.note}."
    exact = "" if base.revision else " The revision it was trained on is unknown."
    return f"{base.link}{f', {base.note}' if base.note else ''}.{exact}"


def _base_notes(base: Origin, snippet: str) -> list[str]:
    if "base = ..." in snippet:
        return ["The base model is no model of transformers: put yours in the place of `...`."]
    if base.id is None:
        return ["The base model is not on the Hub: put the path of your copy in the place of `path/to/...`."]
    return []


def _adapter_snippet(artifact: Artifact, place: Place, base: Origin, own: bool) -> str:
    imports, load = _base_loading(artifact, base)
    own_import = [f"import hf_modular  # registers the adapter type {artifact.config['peft_type']} with PEFT"]
    processors = [name for name in _PROCESSORS if name in artifact.files]
    autos = [_PROCESSORS[name][1] for name in processors]
    return "\n".join(
        [
            f"# pip install {'hf_modular' if own else 'peft transformers'}",
            *(own_import if own else []),
            "from peft import PeftModel",
            *_transformers_import([*autos, *imports]),
            "",
            *load,
            f"model = PeftModel.from_pretrained(base, {place.arguments})",
            *_processor_lines(processors, place),
        ]
    )


def _transformers_import(names: list[str]) -> list[str]:
    return [f"from transformers import {', '.join(sorted(names))}"] if names else []


def _processor_lines(names: list[str], place: Place) -> list[str]:
    return [f"{_PROCESSORS[n][0]} = {_PROCESSORS[n][1]}.from_pretrained({place.arguments})" for n in names]


def _base_loading(artifact: Artifact, base: Origin) -> tuple[list[str], list[str]]:
    """What to import from transformers, and the lines that load the base model."""
    mapping = artifact.config.get("auto_mapping") or {}
    model_class, library = mapping.get("base_model_class"), mapping.get("parent_library") or ""
    task = _adapted_task(artifact.config)
    if model_class and task is None and not library.startswith("transformers"):
        return [], [f"base = ...  # your {model_class}, with the weights that the adapter was trained on"]
    loader = task.auto_class if task else model_class or "AutoModel"
    name = base.id or f"path/to/{base.label}"
    labels = _number_of_labels(artifact)
    call = arguments(name, revision=base.revision, num_labels=labels, ignore_mismatched_sizes=True if labels else None)
    return [loader], [f"base = {loader}.from_pretrained({call})"]


def _number_of_labels(artifact: Artifact) -> int | None:
    """The size of a classifier that was trained and saved whole: the base may have one of another size."""
    if not artifact.config.get("modules_to_save"):
        return None
    heads = [tensor.shape[0] for name, tensor in artifact.tensors.items() if _HEAD.search(name)]
    return heads[-1] if heads else None


# ---- checkpoints


def describe_model(artifact: Artifact, place: Place, base_name: str | None, lookup: Lookup) -> Subject:
    """A checkpoint that is not known to be a merge."""
    base = trace(base_name, None, lookup) if base_name else NO_ORIGIN
    task = _model_task(artifact)
    return Subject(
        template="model.md",
        origins=[base] if base_name else [],
        library_name="transformers",
        tags=["hf-modular"],
        summary=f"A {artifact.config.get('model_type') or 'transformers'} model with {_size(artifact)} parameters.",
        snippet=_model_snippet(artifact, place),
        pipeline_tag=task.pipeline_tag if task else None,
        variables={"base": _base_text(base)},
    )


def _size(artifact: Artifact) -> str:
    return f"{_count(artifact, artifact.tensors):,}"


def _model_task(artifact: Artifact) -> Task | None:
    return next(filter(None, map(task_of, artifact.config.get("architectures") or [])), None)


def _model_snippet(artifact: Artifact, place: Place) -> str:
    task = _model_task(artifact)
    architectures = artifact.config.get("architectures") or ["AutoModel"]
    loader = task.auto_class if task else architectures[0]
    processors = [name for name in _PROCESSORS if name in artifact.files]
    autos = [_PROCESSORS[name][1] for name in processors]
    return "\n".join(
        [
            *_transformers_import([*autos, loader]),
            "",
            f"model = {loader}.from_pretrained({place.arguments})",
            *_processor_lines(processors, place),
        ]
    )


def size_text(artifact: Artifact) -> str:
    """How many tensors and parameters, in which dtypes."""
    dtypes = Counter[str]()
    for tensor in artifact.tensors.values():
        dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel
    listed = ", ".join(f"{number:,} in {dtype}" for dtype, number in dtypes.most_common())
    return f"{len(artifact.tensors)} tensors with {_size(artifact)} elements ({listed})."
