"""Where a model comes from: from the name or path that a config gives to what may be told to others.

A path on somebody's disk means nothing to a reader and is nobody's business, so it never gets into a card. It is
replaced by the Hub repository that the folder is a copy of, where that can be known.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # imported there, not listed

from hf_modular.cards._licenses import Terms, stated_terms

_SNAPSHOT = re.compile(r"models--(?P<id>.+?)/snapshots/(?P<sha>[0-9a-f]{40})")


@dataclass(frozen=True)
class Entry:
    """What the Hub says of a repository."""

    exists: bool
    sha: str | None = None
    metadata: Mapping[str, Any] | None = None  # of its card
    weights: Mapping[str, str] | None = None  # file -> sha256


# (repository, revision) -> its entry; None where nobody could be asked
Lookup = Callable[[str, str | None], Entry | None]


@dataclass(frozen=True)
class Origin:
    """A model that another was made from, as it may be told to others."""

    label: str  # a Hub id, or the bare name of a folder
    id: str | None = None  # its Hub id, if it is known
    revision: str | None = None
    terms: Terms | None = None
    metadata: Mapping[str, Any] | None = None
    note: str = ""  # what a reader should know about how far this is known

    @property
    def page(self) -> str:
        """A link to its repository, in Markdown."""
        return f"[{self.id}](https://huggingface.co/{self.id})" if self.id else f"`{self.label}`"

    @property
    def link(self) -> str:
        """The same with the revision."""
        return f"{self.page} at `{self.revision}`" if self.revision else self.page


def is_hub_id(name: str) -> bool:
    """Whether this can be a repository on the Hub and is not a path."""
    if Path(name).exists() or re.fullmatch(r"(.*/)?checkpoint-\d+", name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def cached_entry(repo_id: str, revision: str | None) -> Entry | None:
    """What the local cache knows of a repository; asks nobody."""
    readme = try_to_load_from_cache(repo_id, constants.REPOCARD_NAME, revision=revision)
    if not isinstance(readme, str):
        return None
    return Entry(exists=True, metadata=read_metadata(Path(readme).read_text(encoding="utf-8")))


def trace(name: str, revision: str | None = None, lookup: Lookup = cached_entry) -> Origin:
    """The model that a config calls `name`, which is a Hub id or a path."""
    if is_hub_id(name):
        return _on_hub(name, revision, lookup)
    folder = Path(name).expanduser()
    if copied := _SNAPSHOT.search(folder.resolve().as_posix()):
        return _on_hub(copied["id"].replace("--", "/", 1), copied["sha"], lookup)
    return _local(folder, lookup)


def _on_hub(repo_id: str, revision: str | None, lookup: Lookup) -> Origin:
    entry = lookup(repo_id, revision)
    if entry is None:
        return Origin(repo_id, repo_id, revision)
    if not entry.exists:
        return Origin(repo_id, note="no repository of this name is visible on the Hub")
    metadata = entry.metadata or {}
    return Origin(repo_id, repo_id, revision, stated_terms(metadata), metadata)


def _local(folder: Path, lookup: Lookup) -> Origin:
    """A folder that is not from the Hub's cache; older configs say in `_name_or_path` what they were loaded from."""
    label = re.split(r"[\\/]", folder.as_posix().rstrip("/"))[-1] or "a local folder"
    readme = folder / constants.REPOCARD_NAME
    metadata = read_metadata(readme.read_text(encoding="utf-8")) if readme.is_file() else {}
    here = Origin(label, None, None, stated_terms(metadata), metadata, note="a local folder, not on the Hub")
    claimed = _claimed_id(folder)
    if claimed is None:
        return here
    entry = lookup(claimed, None)
    if entry is None:
        note = "by what its config says; that its weights are unchanged was not checked"
        return replace(_on_hub(claimed, None, lookup), note=note)
    if entry.exists and _same_weights(folder, entry):
        return replace(_on_hub(claimed, None, lookup), revision=entry.sha)
    return replace(here, note=f"a local folder whose config names `{claimed}`, but its weights are not those")


def _claimed_id(folder: Path) -> str | None:
    try:
        claimed = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    return claimed if claimed and is_hub_id(claimed) else None


def _same_weights(folder: Path, entry: Entry) -> bool:
    weights = {path.name: path for path in folder.glob("*.safetensors")}
    published = {name: sha for name, sha in (entry.weights or {}).items() if name in weights}
    return (
        bool(weights)
        and weights.keys() == published.keys()
        and all(sha256_of(weights[name]) == sha for name, sha in published.items())
    )


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_metadata(card: str) -> dict[str, Any]:
    """The metadata block at the head of somebody else's card; empty if there is none or it is broken."""
    try:
        return parse_metadata(card)
    except ValueError:
        return {}


def parse_metadata(card: str) -> dict[str, Any]:
    """The metadata block at the head of a card; empty if there is none."""
    block = REGEX_YAML_BLOCK.search(card)
    try:
        metadata = yaml.safe_load(block.group(2)) if block else None
    except yaml.YAMLError as error:
        raise ValueError(f"The metadata block of {constants.REPOCARD_NAME} must be YAML, but: {error}.") from error
    if metadata is not None and not isinstance(metadata, dict):
        raise ValueError(f"The metadata block of {constants.REPOCARD_NAME} must be a mapping, but is {metadata!r}.")
    return metadata or {}
