"""Telling text that a person wrote in a README from text that a program made.

PEFT, the Trainer and huggingface_hub write template cards that say nothing; a new card replaces them. What they
measured is carried over: the Trainer's account of its run and its results. A card of ours ends in a seal, a hash of
its text: while the seal fits, nobody has edited it, and it may be made again with what it was told before.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from hf_modular.cards._origins import parse_metadata

UNKNOWN = "Unknown"
# sections that hold what a card was told; the others are made from the files
DATA, PROCEDURE, LIMITS = "Training data", "Training procedure", "Intended use and limits"

_SEAL = re.compile(r"\n*<!-- hf_modular card ([0-9a-f]{16}): a text that you change is kept -->\n*\Z")
_SECTION = r"^## {}\n(.*?)(?=^## |\Z)"
_PROCEDURE = re.compile(_SECTION.format(PROCEDURE), re.DOTALL | re.MULTILINE)
_RESULTS = re.compile(
    r"^(?:It achieves the following results on the evaluation set:\n|The Trainer's results on its evaluation set:\n\n)"
    r"((?:- .*\n?)+)",
    re.MULTILINE,
)
_INTRODUCTION = re.compile(r"\A\s*# .*?\n\n(.*?)\n## How to use", re.DOTALL)
_TRAINER = "This model card has been generated automatically according to the information the Trainer had access to"
_LOADING_NOTE = re.compile(r"^## Loading this adapter\n.*?^```python\n.*?^```\n", re.DOTALL | re.MULTILINE)
_GENERATED = re.compile(
    r"""
    (?:\#\#\#\ Framework\ versions
    | -\ (?:PEFT|Transformers|Pytorch|Datasets|Tokenizers)\ \S+
    | This\ is\ the\ model\ card\ of\ a\ 🤗\ transformers\ model\ that\ has\ been\ pushed\ on\ the\ Hub\..*
    )\s*""",
    re.VERBOSE,
)
_GENERATED_BY_TRAINER = re.compile(
    r"""
    (?:<!--\ This\ model\ card\ has\ been\ generated\ automatically.*
    | should\ probably\ proofread\ and\ complete\ it,\ then\ remove\ this\ comment\.\ -->
    | \#\ .*
    | \#\#\ (?:Model\ description|Intended\ uses\ &\ limitations|Training\ and\ evaluation\ data)
    | More\ information\ needed
    | This\ model\ (?:was\ trained\ from\ scratch|is\ a\ fine-tuned\ version\ of)\ .*
    )\s*""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class CardText:
    """A README, taken apart."""

    metadata: dict[str, Any]
    body: str | None  # what a person wrote; None if nobody did
    told: dict[str, str]  # sections of a card that a program made -> their text
    summary: str | None  # what a card of ours was told to begin with
    results: str | None  # the Trainer's list of results
    derived_license: str | None  # what an earlier card of ours found out; it may have changed


def read_card(text: str) -> CardText:
    """Take a README apart."""
    block = REGEX_YAML_BLOCK.search(text)
    body = (text[block.end() :] if block else text).replace("\r\n", "\n")
    results = _RESULTS.search(body)
    return CardText(
        metadata=parse_metadata(text),
        body=None if _is_generated(body) else body,
        told={name: told for name in (DATA, PROCEDURE, LIMITS) if (told := _section(body, name))},
        summary=_summary(body),
        results=results[1].strip() if results else None,
        derived_license=_derived_license(body),
    )


def seal(body: str) -> str:
    """The text with a seal that breaks when it is edited."""
    return f"{body.strip()}\n\n<!-- hf_modular card {_digest(body)}: a text that you change is kept -->\n"


def _is_generated(body: str) -> bool:
    if sealed := _SEAL.search(body):
        return _digest(body[: sealed.start()]) == sealed[1]
    by_trainer = _TRAINER in body
    rest = _LOADING_NOTE.sub("", _RESULTS.sub("", _PROCEDURE.sub("", body)))
    return all(_is_template_line(line, by_trainer) for line in rest.splitlines())


def _is_template_line(line: str, by_trainer: bool) -> bool:
    if line.strip() in _template_lines() or _GENERATED.fullmatch(line):
        return True
    return by_trainer and _GENERATED_BY_TRAINER.fullmatch(line) is not None


@cache
def _template_lines() -> frozenset[str]:
    """The lines of huggingface_hub's template, filled with nothing."""
    return frozenset(line.strip() for line in ModelCard.from_template(ModelCardData()).text.splitlines())


def _derived_license(body: str) -> str | None:
    found = re.search(r"^## Licence\n\n`(.+?)`: (?!stated by)", body, re.MULTILINE)
    return found[1] if found and _SEAL.search(body) else None


def _section(body: str, name: str) -> str | None:
    """A section's text, without what is made from metadata and versions; None if it says that nothing is known."""
    found = re.search(_SECTION.format(re.escape(name)), body, re.DOTALL | re.MULTILINE)
    text = re.split(r"^### Framework versions|^Datasets: ", found[1] if found else "", flags=re.MULTILINE)[0].strip()
    return None if not text or text.startswith(UNKNOWN) else text


def _summary(body: str) -> str | None:
    """The paragraphs of a card of ours before the last one of its introduction, which is made from the files."""
    found = _INTRODUCTION.match(body) if _SEAL.search(body) else None
    told = found[1].strip().rpartition("\n\n")[0] if found else None
    return told or None


def _digest(body: str) -> str:
    return hashlib.sha256(body.strip().encode()).hexdigest()[:16]
