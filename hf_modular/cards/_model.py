"""What a card says about a merged model, or about another checkpoint."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from hf_modular import merging
from hf_modular.cards._artifact import ADAPTER_WEIGHTS, MERGE_RECIPE, MERGE_REPORT, Artifact
from hf_modular.cards._origins import Lookup, Origin, trace
from hf_modular.cards._subject import (
    NO_ORIGIN,
    Place,
    Subject,
    Task,
    about,
    code,
    count,
    dump,
    processors,
    task_of,
    transformers_import,
    without_paths,
)

_SHOWN_FILES = 3


class Parent(NamedTuple):
    """A model that was merged."""

    reference: str  # as the recipe names it
    weight: str
    origin: Origin
    files: Mapping[str, Mapping[str, Any]]  # of its weights, with their sha256


def describe_model(artifact: Artifact, place: Place, base_name: str | None, lookup: Lookup) -> Subject:
    """A checkpoint, merged or not."""
    if recipe := read_recipe(artifact):
        return _describe_merge(artifact, place, recipe, lookup)
    return _describe(artifact, place, base_name, lookup)


def _describe(artifact: Artifact, place: Place, base_name: str | None, lookup: Lookup) -> Subject:
    base = trace(base_name, None, lookup) if base_name else NO_ORIGIN
    task = _task(artifact)
    return Subject(
        template="model.md",
        origins=[base],
        library_name="transformers",
        tags=["hf-modular"],
        summary=f"{_kind(artifact)} model with {count(artifact):,} parameters.",
        snippet=_snippet(artifact, place),
        pipeline_tag=task.pipeline_tag if task else None,
        variables={"base": base.link if base != NO_ORIGIN else "Unknown: none was stated."},
        public=without_paths(artifact),
    )


def _describe_merge(artifact: Artifact, place: Place, recipe: dict[str, Any], lookup: Lookup) -> Subject:
    report = artifact.read_json(MERGE_REPORT)
    parents = [*_parents(recipe, report, lookup)]
    task = _task(artifact)
    method = str(report.get("merge_method") or recipe.get("merge_method"))
    origins = {parent.reference: parent.origin for parent in parents}
    public = public_texts(artifact, recipe, report, origins)
    return Subject(
        template="merge.md",
        origins=[parent.origin for parent in parents],
        library_name="transformers",
        tags=["hf-modular", "merge", method.replace("_", "-")],
        summary=f"{_kind(artifact)} model with {count(artifact):,} parameters, merged by `{method}`.",
        snippet=_snippet(artifact, place),
        pipeline_tag=task.pipeline_tag if task else None,
        relation="merge" if any(parent.origin.id for parent in parents) else None,
        variables={
            "parents": [_row(parent) for parent in parents],
            "method": _method(method),
            "recipe": public.get(MERGE_RECIPE, artifact.read_text(MERGE_RECIPE) or "").strip(),
            "seed": report.get("seed", recipe.get("seed")),
            "replay": _replay(parents),
            "decisions": report.get("notes") or [],
            "cost": _cost(report),
            "verified": _verified(report.get("verification") or {}),
        },
        public=without_paths(artifact) | public,
    )


def _kind(artifact: Artifact) -> str:
    return str(artifact.config.get("model_type") or "transformers")


def _task(artifact: Artifact) -> Task | None:
    return next(filter(None, map(task_of, artifact.config.get("architectures") or [])), None)


def _snippet(artifact: Artifact, place: Place) -> str:
    task = _task(artifact)
    loader = task.auto_class if task else (artifact.config.get("architectures") or ["AutoModel"])[0]
    classes, load_processors = processors(artifact, place)
    return "\n".join(
        [
            *transformers_import([loader, *classes]),
            "",
            f"model = {loader}.from_pretrained({place.arguments})",
            *load_processors,
        ]
    )


# ---- merges


def read_recipe(artifact: Artifact) -> dict[str, Any]:
    """The recipe in the folder; empty if there is none."""
    try:
        recipe = yaml.safe_load(artifact.read_text(MERGE_RECIPE) or "{}")
    except yaml.YAMLError as error:
        raise ValueError(f"{artifact.folder / MERGE_RECIPE} must be YAML, but: {error}.") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{artifact.folder / MERGE_RECIPE} must hold a mapping, but holds a {type(recipe).__name__}.")
    return recipe


def _parents(recipe: Mapping[str, Any], report: Mapping[str, Any], lookup: Lookup) -> Iterator[Parent]:
    """The base and the models, each once."""
    base = str(recipe.get("base_model") or "")
    given = {base: ["base"]} if base else {}
    for model, weight in _weights(recipe, {}):
        if model != base and weight not in given.setdefault(model, []):  # several of them in slices and modules
            given[model].append(weight)
    weights = {model: ", ".join(several) for model, several in given.items()}
    inputs = {entry["model"]: entry.get("files") or {} for entry in report.get("inputs") or []}
    for part, (weight, files) in _by_part(weights, inputs).items():
        yield Parent(part, weight, trace(*split_reference(part), lookup), files)


def _weights(recipe: Mapping[str, Any], shared: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The models of a recipe, of its slices and of its modules, each with its weight there."""
    shared = {**shared, **(recipe.get("parameters") or {})}
    for entry in [*(recipe.get("models") or []), *(recipe.get("sources") or [])]:
        settings = shared | (entry.get("parameters") or {})
        yield str(entry["model"]), code(settings["weight"]) if "weight" in settings else "default"
    for part in [*(recipe.get("slices") or []), *(recipe.get("modules") or {}).values()]:
        yield from _weights(part, shared)


def _by_part(
    weights: Mapping[str, str], inputs: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Weights and files of models and of the adapters on them, each once."""
    from hf_modular.merging.sources._sources import split_adapter

    found: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for reference, weight in weights.items():
        model, adapter = split_adapter(reference)
        files = inputs.get(reference, {})
        own = {name: file for name, file in files.items() if name != ADAPTER_WEIGHTS}
        if adapter is None:
            found[model] = (weight, files)
        else:
            found.setdefault(model, ("under an adapter", own))
            found[adapter] = (f"{weight}, an adapter", {n: f for n, f in files.items() if n == ADAPTER_WEIGHTS})
    return found


def split_reference(reference: str) -> tuple[str, str | None]:
    """A folder, or a repository as `name` or `name@revision`."""
    name, _, revision = reference.partition("@")
    return (reference, None) if Path(reference).expanduser().exists() else (name, revision or None)


def _row(parent: Parent) -> dict[str, str]:
    origin = parent.origin
    return {
        "model": origin.page if origin.id else f"{origin.page} ({origin.note})",
        "identity": code(origin.revision) if origin.revision else _digests(parent.files),
        "weight": parent.weight,
        "license": f"`{origin.terms}`" if origin.terms else "unknown",
    }


def _digests(files: Mapping[str, Mapping[str, Any]]) -> str:
    digests = [str(described["sha256"]) for described in files.values() if described.get("sha256")]
    if not digests:
        return "unknown"
    more = f"<br>and {len(digests) - _SHOWN_FILES} more in `{MERGE_REPORT}`" if len(digests) > _SHOWN_FILES else ""
    return "<br>".join(f"`{digest}`" for digest in digests[:_SHOWN_FILES]) + more


def _method(name: str) -> str:
    methods = merging.METHODS
    return about(methods[name]) if name in methods else f"The method is `{name}`."


def _replay(parents: list[Parent]) -> str:
    absent = [f"`{parent.origin.label}`" for parent in parents if parent.origin.id is None]
    run = f"`hf-modular merge {MERGE_RECIPE} OUTPUT` makes the same weights again, bit for bit"
    if absent:
        return f"{run}, for whoever has {', '.join(absent)} and puts the paths into the recipe."
    unpinned = any(parent.origin.revision is None for parent in parents)
    return f"{run}{', as long as the models on the Hub are not changed' if unpinned else ''}."


def _cost(report: Mapping[str, Any]) -> str | None:
    if not {"seconds", "peak_memory", "device"} <= report.keys():
        return None
    versions = ", ".join(f"{name} {version}" for name, version in (report.get("versions") or {}).items())
    memory = f"{report['peak_memory'] / 1e9:.1f} GB of memory"
    by = f" by {versions}" if versions else ""
    return f"Merged in {report['seconds']:.1f} s with {memory} on `{report['device']}`{by}."


def _verified(found: Mapping[str, Any]) -> str | None:
    """What was found when the result was read again."""
    if "tensors_compared" not in found:
        return None
    parts = [f"{found['tensors_compared']} tensors were computed again, in memory, and are the same"]
    if found.get("loads"):
        parts.append("transformers loads the model with no tensor missing or left over")
    if adapter := found.get("adapter"):
        parts.append(
            f"its outputs are within {adapter['largest_difference']:.2g} of those of the model with the adapter, "
            f"which changes them by up to {adapter['adapter_effect']:.2g} (KL divergence {adapter['kl']:.2g}, the "
            f"same first choice for {adapter['top1']:.1%} of positions)"
        )
    return f"Verified on the disk: {'; '.join(parts)}."


def public_texts(
    artifact: Artifact, recipe: dict[str, Any], report: dict[str, Any], origins: Mapping[str, Origin]
) -> dict[str, str]:
    """Recipe and report with what can be told in the place of paths on this machine, if there are any."""
    if all(split_reference(name)[0] == origin.id for name, origin in origins.items()):
        return {}
    told = {name: _reference(origin) for name, origin in origins.items()}
    texts = {
        MERGE_RECIPE: yaml.safe_dump(_replaced(recipe, told), sort_keys=False, allow_unicode=True),
        MERGE_REPORT: dump(_replaced(report, told)),
    }
    return {name: text for name, text in texts.items() if name in artifact.files}


def _reference(origin: Origin) -> str:
    if origin.id is None:
        return f"path/to/{origin.label}"
    return f"{origin.id}@{origin.revision}" if origin.revision else origin.id


def _replaced(value: Any, told: Mapping[str, str]) -> Any:
    """A copy with every string in it replaced; paths inside longer texts too."""
    if isinstance(value, dict):
        return {_replaced(key, told): _replaced(item, told) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, told) for item in value]
    if not isinstance(value, str) or value in told:
        return told.get(value, value) if isinstance(value, str) else value
    for path in sorted(filter(lambda name: "/" in name, told), key=len, reverse=True):
        value = value.replace(path, told[path])
    return value
