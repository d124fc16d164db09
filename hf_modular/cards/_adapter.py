"""What a card says about an adapter."""

import json
import re
from collections.abc import Mapping
from typing import Any

from hf_modular.cards._artifact import ADAPTER_CONFIG, Artifact
from hf_modular.cards._making import making_of
from hf_modular.cards._origins import Lookup, Origin, trace
from hf_modular.cards._subject import (
    NO_ORIGIN,
    TASKS,
    Place,
    Subject,
    Task,
    about,
    arguments,
    code,
    count,
    dump,
    processors,
    task_of,
    transformers_import,
    without_paths,
)

OWN_TYPES = "HFM_"  # how the adapter types of this package begin; PEFT alone knows none of them

# PEFT's task types
_TASK_TYPES = {
    "CAUSAL_LM": TASKS["ForCausalLM"],
    "SEQ_CLS": TASKS["ForSequenceClassification"],
    "TOKEN_CLS": TASKS["ForTokenClassification"],
    "QUESTION_ANS": TASKS["ForQuestionAnswering"],
    "SEQ_2_SEQ_LM": Task("AutoModelForSeq2SeqLM", None),
    "FEATURE_EXTRACTION": Task("AutoModel", "feature-extraction"),
}
_HEAD = re.compile(r"\b(?:classifier|score|out_proj|head)\.weight$")
_NO_SETTINGS = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "revision")
_TOLD_APART = ("errors", "tasks")
_SHOWN = 3  # tasks, beside the first


def describe_adapter(artifact: Artifact, place: Place, base_name: str | None, lookup: Lookup) -> Subject:
    config = artifact.config
    peft_type = str(config.get("peft_type"))
    short = peft_type.removeprefix(OWN_TYPES)
    named = base_name or config.get("base_model_name_or_path")
    base = trace(named, config.get("revision"), lookup) if named else NO_ORIGIN
    task = _task(config)
    snippet = _snippet(artifact, place, base)
    making = making_of(artifact, lookup)
    return Subject(
        template="adapter.md",
        origins=[base],
        library_name="peft",
        tags=["hf-modular", short.lower(), *([f"base_model:adapter:{base.id}"] if base.id else [])],
        summary=f"{short} adapter for {base.link}, {count(artifact):,} parameters.",
        snippet=snippet,
        pipeline_tag=task.pipeline_tag if task else None,
        relation="adapter" if base.id else None,
        own_type=peft_type if short != peft_type else None,
        notes=_notes(base, snippet),
        variables={
            "base": _base_text(base),
            "method": _method(peft_type, config.get("peft_version")),
            "settings": [(name, code(value)) for name, value in sorted(config.items()) if _is_setting(name, value)],
            "parameters": _parameters(artifact, peft_type),
            "tasks": _tasks(config),
            "p": config.get("p"),
            **making.variables,
        },
        parents=making.parents,
        public=without_paths(artifact) | _public_config(config, base) | making.public,
    )


def _public_config(config: Mapping[str, Any], base: Origin) -> dict[str, str]:
    """The config with the base model's Hub id, or none, in the place of a path on this machine."""
    told = {"base_model_name_or_path": base.id, "revision": base.revision}
    if all(config.get(key) == value for key, value in told.items()):
        return {}
    return {ADAPTER_CONFIG: dump({**config, **told}, sort_keys=True)}


def _task(config: Mapping[str, Any]) -> Task | None:
    if config.get("task_type"):
        return _TASK_TYPES.get(config["task_type"])
    return task_of((config.get("auto_mapping") or {}).get("base_model_class"))


def _tasks(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The tasks that it holds, and how far each is from the adapter that it was."""
    errors = config.get("errors") or {}
    return [(code(task), f"{errors[task]:.3g}" if task in errors else "unknown") for task in config.get("tasks") or []]


def _is_setting(name: str, value: Any) -> bool:
    return name not in (*_NO_SETTINGS, *_TOLD_APART) and value not in (None, {}, [], "")


def _parameters(artifact: Artifact, peft_type: str) -> list[tuple[str, int]]:
    """Trained parameters: the adapter's, and those of modules that were trained whole."""
    prefix = f".{peft_type.lower()}_"
    adapted = {name for name in artifact.tensors if prefix in name}
    if not adapted:  # a type whose parameters are named otherwise
        return [("all", count(artifact))]
    layers = len({name.split(prefix)[0] for name in adapted})
    whole = artifact.tensors.keys() - adapted
    rows = [(f"adapter, on {layers} layers", count(artifact, adapted))]
    return rows + ([("modules trained whole", count(artifact, whole))] if whole else [])


def _method(peft_type: str, version: str | None) -> str:
    if not peft_type.startswith(OWN_TYPES):
        return f"The adapter type is `{peft_type}` of PEFT{f' {version}' if version else ''}."
    from hf_modular.adapters import METHODS  # here, since it takes PEFT with it, which a merged model needs not

    methods = {str(config.type_name): config for config, _ in METHODS.values()}
    return about(methods[peft_type]) if peft_type in methods else f"The adapter type is `{peft_type}`."


def _base_text(base: Origin) -> str:
    if base == NO_ORIGIN:
        return "Unknown: none was stated."
    if base.id is None:
        return f"{base.link}: {base.note}."
    exact = "" if base.revision else " The revision it was trained on is unknown."
    return f"{base.link}{f', {base.note}' if base.note else ''}.{exact}"


def _notes(base: Origin, snippet: str) -> list[str]:
    if "base = ..." in snippet:
        return ["The base model is no model of transformers: put yours in the place of `...`."]
    if base.id is None:
        return ["The base model is not on the Hub: put the path of your copy in the place of `path/to/...`."]
    return []


def _snippet(artifact: Artifact, place: Place, base: Origin) -> str:
    peft_type = str(artifact.config.get("peft_type"))
    own = peft_type.startswith(OWN_TYPES)
    base_classes, load_base = _base_loading(artifact, base)
    processor_classes, load_processors = processors(artifact, place)
    return "\n".join(
        [
            f"# pip install {'hf_modular' if own else 'peft transformers'}",
            *([f"import hf_modular  # registers the adapter type {peft_type} with PEFT"] if own else []),
            "from peft import PeftModel",
            *transformers_import([*base_classes, *processor_classes]),
            "",
            load_base,
            f"model = PeftModel.from_pretrained(base, {place.arguments})",
            *_setting_a_task(artifact.config.get("tasks") or []),
            *load_processors,
        ]
    )


def _setting_a_task(tasks: list[str]) -> list[str]:
    if not tasks:
        return []
    first, *others = map(json.dumps, tasks)
    hint = f"  # or {', '.join(others[:_SHOWN])}{', ...' if len(others) > _SHOWN else ''}" if others else ""
    return [f"model.set_task({first}){hint}"]


def _base_loading(artifact: Artifact, base: Origin) -> tuple[list[str], str]:
    """What to import from transformers, and the line that loads the base model."""
    mapping = artifact.config.get("auto_mapping") or {}
    model_class, library = mapping.get("base_model_class"), mapping.get("parent_library") or ""
    task = _task(artifact.config)
    if model_class and task is None and not library.startswith("transformers"):
        return [], f"base = ...  # your {model_class}, with the weights that the adapter was trained on"
    loader = task.auto_class if task else model_class or "AutoModel"
    labels = _number_of_labels(artifact)
    options = {"num_labels": labels, "ignore_mismatched_sizes": True} if labels else {}
    call = arguments(base.id or f"path/to/{base.label}", revision=base.revision, **options)
    return [loader], f"base = {loader}.from_pretrained({call})"


def _number_of_labels(artifact: Artifact) -> int | None:
    """The size of a classifier that was trained and saved whole: the base may have one of another size."""
    if not artifact.config.get("modules_to_save"):
        return None
    heads = [tensor.shape[0] for name, tensor in artifact.tensors.items() if _HEAD.search(name)]
    return heads[-1] if heads else None
