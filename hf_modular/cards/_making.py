"""What a card says of how an adapter came about that was merged from others, or extracted from a fine-tuned model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_modular import merging
from hf_modular.adapter_merging import RMMConfig
from hf_modular.cards._artifact import MERGE_RECIPE, MERGE_REPORT, Artifact
from hf_modular.cards._model import public_texts, read_recipe, split_reference
from hf_modular.cards._origins import Lookup, Origin, trace
from hf_modular.cards._subject import about, code


@dataclass(frozen=True)
class Making:
    """Nothing, of an adapter that was trained."""

    parents: list[Origin] = field(default_factory=list)
    variables: dict[str, Any] = field(default_factory=dict)
    public: dict[str, str] = field(default_factory=dict)  # files -> their text with no path in it


def making_of(artifact: Artifact, lookup: Lookup) -> Making:
    """What the report in the folder says."""
    report = artifact.read_json(MERGE_REPORT)
    if not report.get("adapters"):
        return Making()
    recipe, settings = read_recipe(artifact), report.get("settings") or {}
    origins = {name: trace(*split_reference(name), lookup) for name in _references(report, recipe)}
    public = public_texts(artifact, recipe, report, origins)
    made = {
        "how": _how(str(report.get("method"))),
        "parents": [_row(name, origins.get(name)) for name in report["adapters"]],
        "error": f"{report.get('error', 0):.3g}",
        "storage": f"{settings['storage']:.3g}" if "storage" in settings else None,
        "recipe": public.get(MERGE_RECIPE, artifact.read_text(MERGE_RECIPE) or "").strip(),
        "decisions": _told(public, report),
    }
    parents = [origin for name in report["adapters"] if (origin := origins.get(name))]
    return Making(parents, {"made": made}, public)


def _references(report: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    """The folders and repositories among what the report names: adapters in memory are neither."""
    if report.get("method") == "extract":
        return [*report["adapters"], str((report.get("settings") or {}).get("base"))]
    base = [str(recipe["base_model"])] if recipe.get("base_model") else []
    return [str(entry["model"]) for entry in recipe.get("models") or []] + base


def _how(method: str) -> str:
    if method == "extract":
        return "Extracted from the difference of a fine-tuned model and its base."
    known = {**merging.METHODS, RMMConfig.name: RMMConfig}
    return f"Merged by `{method}`.{f' {about(known[method])}' if method in known else ''}"


def _row(name: str, origin: Origin | None) -> dict[str, str]:
    if origin is None:
        return {"name": code(name), "license": "unknown"}
    note = f" ({origin.note})" if origin.note and not origin.id else ""
    return {"name": f"{origin.link}{note}", "license": f"`{origin.terms}`" if origin.terms else "unknown"}


def _told(public: Mapping[str, str], report: Mapping[str, Any]) -> list[str]:
    """The notes of the report as it is published."""
    text = public.get(MERGE_REPORT)
    return list((json.loads(text) if text else report).get("notes") or [])
