"""Model cards for adapters, merged models and other checkpoints, from what their folder says.

A card states what is known and says "Unknown" for the rest; nothing in it is guessed, and no path of anybody's disk
gets into it. Text that a person wrote stays: only its metadata are completed.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypedDict, Unpack

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_modular._version import __version__
from hf_modular.cards._adapter import describe_adapter
from hf_modular.cards._artifact import CARD, Artifact, read_artifact
from hf_modular.cards._licenses import Terms, Verdict, resolve, stated_terms
from hf_modular.cards._model import describe_model
from hf_modular.cards._origins import Lookup, cached_entry, is_hub_id, sha256_of
from hf_modular.cards._subject import NO_ORIGIN, Place, Subject, size_text
from hf_modular.cards._text import DATA, LIMITS, PROCEDURE, CardText, read_card, seal

NO_PLACE = Place("path/to/this/folder")


class Facts(TypedDict, total=False):
    """What a folder cannot say about itself.

    Args:
        base_model (`str`): The Hub id of the base model, where the adapter's config has a path.
        summary (`str`): What it is, to begin the card with.
        license (`str`): The licence, as the Hub spells it.
        language (`str | list[str]`): ISO 639 codes.
        pipeline_tag (`str`): The Hub's name of the task.
        datasets (`list[str]`): Hub ids of the training data.
        training_data (`str`): What it was trained on, in prose.
        training_procedure (`str`): How, in prose.
        metrics (`list[EvalResult]`): Evaluation results.
        limits (`str`): What it is meant for, and what it cannot do.
    """

    base_model: str
    summary: str
    license: str
    language: str | list[str]
    pipeline_tag: str
    datasets: list[str]
    training_data: str
    training_procedure: str
    metrics: list[EvalResult]
    limits: str


@dataclass(frozen=True)
class Card:
    """A card, and what was found out on the way."""

    content: ModelCard
    subject: Subject
    verdict: Verdict  # on the licence


def save_card(folder: str | Path, **facts: Unpack[Facts]) -> Path:
    """Write the folder's `README.md`; asks nobody, so licences of base models come from the local cache only.

    Args:
        folder: An adapter or a model checkpoint.
        facts: What the folder cannot say about itself, see `Facts`.

    Returns:
        The path of the card.
    """
    artifact = read_artifact(folder)
    card = make_card(artifact, existing=artifact.read_text(CARD), facts=facts)
    path = artifact.folder / CARD
    card.content.save(path)
    return path


def make_card(
    artifact: Artifact,
    *,
    place: Place = NO_PLACE,
    existing: str | None = None,
    lookup: Lookup = cached_entry,
    digest: Callable[[str], str] | None = None,
    facts: Facts | None = None,
) -> Card:
    """The card of a folder.

    Args:
        place: The repository that it will be in.
        existing: The text of the card that is there already.
        lookup: Asked for what the Hub says of base models.
        digest: The sha256 of a file of the folder, if somebody has it already.
        facts: What the folder cannot say about itself.
    """
    facts = _checked(facts or {})
    old = read_card(existing or "")
    title = place.name.split("/")[-1] if place != NO_PLACE else artifact.folder.resolve().name
    subject = _describe(artifact, place, facts, old, lookup)
    verdict = _license_verdict(subject, facts, old)
    data = _card_data(subject, title, verdict, facts, old)
    if old.body is not None:
        return Card(_completed(data, old.body, subject), subject, verdict)
    digest = digest or (lambda name: sha256_of(artifact.folder / name))
    content = ModelCard.from_template(
        data,
        template_str=_template("head.md", "usage.md", subject.template, "tail.md"),
        title=title,
        **_usage(subject),
        summary="\n\n".join(filter(None, [facts.get("summary") or old.summary, subject.summary])),
        **subject.variables,
        training_data=facts.get("training_data") or old.told.get(DATA),
        datasets=_dataset_list(data),
        procedure=facts.get("training_procedure") or old.told.get(PROCEDURE),
        results=[_result_row(result) for result in data.eval_results or []],
        trainer_results=old.results,
        limits=facts.get("limits") or old.told.get(LIMITS),
        license_text=_license_text(subject, verdict),
        size_text=size_text(artifact),
        digests=[(name, digest(name)) for name in artifact.weight_files],
        made_with=f"This card was made by hf_modular {__version__} from the files of this repository.",
    )
    content.text = "\n" + seal(content.text)
    return Card(content, subject, verdict)


def _checked(facts: Facts) -> Facts:
    if unknown := facts.keys() - Facts.__annotations__.keys():
        raise TypeError(f"A card has no {sorted(unknown)}; it may be told {sorted(Facts.__annotations__)}.")
    if (base := facts.get("base_model")) and not is_hub_id(base):
        raise ValueError(f"`base_model` must be the id of a Hub repository, but got {base!r}.")
    for name, text in facts.items():
        if isinstance(text, str) and re.search("^##? ", text, re.MULTILINE):
            raise ValueError(f"`{name}` goes into a section of the card: its headings must begin with ###.")
    return facts


def _describe(artifact: Artifact, place: Place, facts: Facts, old: CardText, lookup: Lookup) -> Subject:
    stated = old.metadata.get("base_model") if old.body is not None else None
    base_name = facts.get("base_model") or (stated if isinstance(stated, str) and is_hub_id(stated) else None)
    describe = describe_adapter if artifact.kind == "adapter" else describe_model
    return describe(artifact, place, base_name, lookup)


# ---- licence


def _license_verdict(subject: Subject, facts: Facts, old: CardText) -> Verdict:
    """What a person said decides; otherwise what the parents allow."""
    if said := facts.get("license"):
        return Verdict(Terms(said), "stated by its publisher")
    stated = stated_terms(old.metadata)
    if stated and str(stated) != old.derived_license:
        return Verdict(stated, "stated by its publisher")
    return resolve({origin.label: origin.terms for origin in [*subject.origins, *subject.parents]})


def _license_text(subject: Subject, verdict: Verdict) -> str:
    stated = f"`{verdict.terms}`: {verdict.reason}." if verdict.terms else f"Unknown: {verdict.reason}."
    known = [origin for origin in [*subject.origins, *subject.parents] if origin != NO_ORIGIN]
    parents = "\n".join(f"- {origin.link}: {_terms_text(origin.terms)}" for origin in known)
    caveat = "Licences were compared by name; this is not legal advice."
    return "\n\n".join(filter(None, [stated, parents, caveat]))


def _terms_text(terms: Terms | None) -> str:
    if terms is None:
        return "unknown"
    return f"[{terms}]({terms.link})" if terms.link and terms.link.startswith("http") else f"`{terms}`"


# ---- metadata


def _card_data(subject: Subject, title: str, verdict: Verdict, facts: Facts, old: CardText) -> ModelCardData:
    ours = {
        "base_model": _one_or_many([origin.id for origin in subject.origins if origin.id]),
        "base_model_relation": subject.relation,
        "library_name": subject.library_name,
        "pipeline_tag": facts.get("pipeline_tag") or subject.pipeline_tag,
        **_license_data(verdict.terms),
        "language": facts.get("language"),
        "datasets": facts.get("datasets"),
    }
    known = {key: value for key, value in ours.items() if value}
    before = _cleaned(old)
    merged = before | known if old.body is None else known | before
    merged["tags"] = list(dict.fromkeys([*before.get("tags", []), *subject.tags]))
    if metrics := facts.get("metrics"):
        merged.pop("model-index", None)
        merged |= {"eval_results": list(metrics), "model_name": title}
    return ModelCardData(**merged)


def _one_or_many(ids: Sequence[str]) -> str | list[str] | None:
    distinct = list(dict.fromkeys(ids))
    return distinct[0] if len(distinct) == 1 else distinct or None


def _license_data(terms: Terms | None) -> dict[str, str | None]:
    if terms is None:
        return {}
    return {"license": terms.id, "license_name": terms.name, "license_link": terms.link}


def _cleaned(old: CardText) -> dict[str, Any]:
    """The metadata that were there, without what is found out anew: what a program wrote may be a path."""
    anew = {
        "tags",
        "licence",
        "license",
        "license_name",
        "license_link",
        "base_model",
    }  # `licence` is TRL's, and empty
    cleaned = {key: value for key, value in old.metadata.items() if key not in anew}
    cleaned["tags"] = [tag for tag in _as_list(old.metadata.get("tags")) if not tag.startswith("base_model:")]
    if old.body is None:
        cleaned.pop("base_model_relation", None)
    elif ids := [base for base in _as_list(old.metadata.get("base_model")) if is_hub_id(base)]:
        cleaned["base_model"] = _one_or_many(ids)
    return cleaned


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


# ---- text


def _template(*names: str) -> str:
    folder = files("hf_modular.cards") / "templates"
    return "".join((folder / name).read_text(encoding="utf-8") for name in names)


def _usage(subject: Subject) -> dict[str, Any]:
    snippet = f"```python\n{subject.snippet}\n```"
    return {"snippet": snippet, "own_type": subject.own_type, "notes": subject.notes}


def _completed(data: ModelCardData, body: str, subject: Subject) -> ModelCard:
    """Somebody's card with its metadata completed, and with what to import if the text does not say so."""
    template = "---\n{{ card_data }}\n---\n{{ body }}"
    if subject.own_type and "import hf_modular" not in body:
        template += "\n" + _template("usage.md")
    return ModelCard.from_template(data, template_str=template, body=body, **_usage(subject))


def _dataset_list(data: ModelCardData) -> str | None:
    datasets = [data.datasets] if isinstance(data.datasets, str) else data.datasets or []
    return ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in datasets) or None


def _result_row(result: EvalResult) -> dict[str, Any]:
    return {
        "dataset": result.dataset_name,
        "split": result.dataset_split or "unknown",
        "metric": result.metric_name or result.metric_type,
        "value": result.metric_value,
    }
