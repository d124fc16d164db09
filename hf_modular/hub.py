"""Publishing an adapter or a model on the Hub: checked first, with a card of its own, in one commit or not at all."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import NamedTuple, Unpack

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.errors import HTTPError as AnyHttpError  # type: ignore[attr-defined]  # its base class
from huggingface_hub.hf_api import RepoFile, RepoSibling

from hf_modular._version import __version__
from hf_modular.cards import Card, Facts, make_card
from hf_modular.cards._artifact import CARD, OWNED, Artifact, check_values, read_artifact
from hf_modular.cards._origins import Entry, Lookup
from hf_modular.cards._subject import Place
from hf_modular.cards._text import read_card

logger = logging.getLogger(__name__)

_REMEDIES = {
    401: "The Hub does not know this token: log in with `hf auth login`, set HF_TOKEN or pass `token`.",
    403: "This token may not write there: it needs write access to the namespace of the repository.",
    412: "Somebody committed to the repository during this upload, of which nothing was committed: look at what "
    "changed, and push again.",
}


class Target(NamedTuple):
    """A repository, as it was before the push."""

    id: str
    exists: bool
    private: bool
    head: str | None  # the commit of the branch; None if there is no such branch yet
    files: tuple[str, ...]  # at the head


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    accept_license: bool = False,
    **facts: Unpack[Facts],
) -> CommitInfo:
    """Publish an adapter or a model checkpoint with a model card, in one commit.

    The folder is checked before anything is sent: safetensors only, whole, finite and fitting their index. Optimizer
    states, caches, hidden files and whatever else is no part of the model stay behind and are named in the log.
    Weights and configs of an earlier upload that are not in the folder are removed by the same commit.

    Args:
        folder: What `save_pretrained` or `hf_modular.merge` wrote.
        repo_id: The repository; it is created if it does not exist.
        private: Create the repository as a private one.
        token: An access token; the saved one or `HF_TOKEN` by default.
        revision: The branch to commit to; it is created if it does not exist.
        accept_license: Publish though the parents of a merge are under licences that differ and are not permissive.
        facts: What the folder cannot say about itself, for the card; see `hf_modular.cards.Facts`.

    Returns:
        The commit.

    Raises:
        ValueError: If something in the folder must not be published, or the Hub holds something else afterwards.
        FileNotFoundError: If the folder holds neither an adapter nor a model.
        huggingface_hub.errors.HfHubHTTPError: If the Hub refuses.
        ConnectionError: If the Hub cannot be reached or does not take a file.
    """
    artifact = read_artifact(folder)
    check_values(artifact)
    api = HfApi(token=token, library_name="hf_modular", library_version=__version__)
    with _remedies():
        target = _target(api, repo_id, revision)
        _refuse_public(target, private)
        uploads = {name: _upload(artifact, name) for name in artifact.files}
        card = make_card(
            artifact,
            place=Place(target.id, revision),
            existing=_existing_card(api, artifact, target),
            lookup=_lookup(api),
            digest=lambda name: uploads[name].upload_info.sha256.hex(),
            facts=facts,
        )
        if not (private or target.private or accept_license):
            _refuse_unread_licenses(card)
        uploads |= {name: CommitOperationAdd(name, text.encode()) for name, text in card.subject.public.items()}
        uploads[CARD] = CommitOperationAdd(CARD, str(card.content).encode())  # last, over whatever was there
        return _commit(api, target, private, revision, list(uploads.values()), artifact)


def _target(api: HfApi, repo_id: str, revision: str | None) -> Target:
    full_id = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
    try:
        info = api.model_info(full_id)
    except RepositoryNotFoundError:
        return Target(full_id, exists=False, private=False, head=None, files=())
    try:
        at = api.model_info(full_id, revision=revision)
    except RevisionNotFoundError:
        return Target(full_id, exists=True, private=bool(info.private), head=None, files=_names(info.siblings))
    return Target(full_id, exists=True, private=bool(info.private), head=at.sha, files=_names(at.siblings))


def _names(siblings: Sequence[RepoSibling] | None) -> tuple[str, ...]:
    return tuple(sibling.rfilename for sibling in siblings or ())


def _refuse_public(target: Target, private: bool) -> None:
    if private and target.exists and not target.private:
        raise ValueError(
            f"{target.id} is public already, and private=True does not hide it: make it private in its settings, or "
            "push to another repository."
        )


def _refuse_unread_licenses(card: Card) -> None:
    if card.verdict.needs_consent:
        raise ValueError(
            f"This should not become public before somebody has read the licences: {card.verdict.reason}. State the "
            "licence of the result (`license`), push with private=True, or pass accept_license=True."
        )


def _upload(artifact: Artifact, name: str) -> CommitOperationAdd:
    return CommitOperationAdd(name, artifact.folder / name)


def _existing_card(api: HfApi, artifact: Artifact, target: Target) -> str | None:
    """The card that a person wrote, in the folder or on the Hub; otherwise whatever is there."""
    found = [artifact.read_text(CARD)]
    if target.head and CARD in target.files:
        path = api.hf_hub_download(target.id, CARD, revision=target.head)
        found.append(Path(path).read_text(encoding="utf-8"))
    there = [text for text in found if text]
    written = [text for text in there if read_card(text).body is not None]
    return next(iter(written + there), None)


def _lookup(api: HfApi) -> Lookup:
    """Asks the Hub about base models, each of them once."""

    @cache
    def ask(repo_id: str, revision: str | None) -> Entry:
        try:
            info = api.model_info(repo_id, revision=revision, files_metadata=True)
        except GatedRepoError:
            return Entry(exists=True)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return Entry(exists=False)
        weights = {file.rfilename: file.lfs.sha256 for file in info.siblings or () if file.lfs}
        return Entry(True, info.sha, info.card_data.to_dict() if info.card_data else None, weights)

    return ask


# ---- the commit


def _commit(
    api: HfApi,
    target: Target,
    private: bool,
    revision: str | None,
    uploads: list[CommitOperationAdd],
    artifact: Artifact,
) -> CommitInfo:
    if artifact.left_out:
        left_out = "\n".join(f"  {path}: {reason}" for path, reason in artifact.left_out.items())
        logger.warning("These files of %s are left out of the upload:\n%s", artifact.folder, left_out)
    parent = target.head or _create(api, target, private, revision)
    try:
        commit = api.create_commit(
            target.id,
            [*_removals(target, uploads), *uploads],
            commit_message=f"Upload {artifact.kind} with hf_modular",
            revision=revision,
            parent_commit=parent,
        )
    except RuntimeError as error:  # how the client reports the file that it could not send
        raise ConnectionError(f"{error} {error.__cause__} Nothing was committed; push again.") from error
    _refuse_difference(api, target.id, commit.oid, uploads)
    return commit


def _create(api: HfApi, target: Target, private: bool, revision: str | None) -> str:
    """Make the repository and the branch if they are missing; returns the branch's commit."""
    if not target.exists:
        api.create_repo(target.id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(target.id, branch=revision, exist_ok=True)
    return str(api.model_info(target.id, revision=revision).sha)


def _removals(target: Target, uploads: Sequence[CommitOperationAdd]) -> list[CommitOperationDelete]:
    """What an earlier upload left: loaders would prefer an old `model.safetensors` to new shards."""
    new = {upload.path_in_repo for upload in uploads}
    stale = [name for name in target.files if name not in new and any(fnmatch(name, owned) for owned in OWNED)]
    return [CommitOperationDelete(name) for name in stale]


def _refuse_difference(api: HfApi, repo_id: str, commit: str, uploads: Sequence[CommitOperationAdd]) -> None:
    """Compare what the Hub holds with what was sent."""
    listed = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    held = {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}
    wrong = [upload.path_in_repo for upload in uploads if not _is_held(upload, held.get(upload.path_in_repo))]
    if wrong:
        raise ValueError(
            f"{repo_id} must hold at {commit} what was sent, but {', '.join(wrong)} is missing or differs. See "
            "whether a .gitignore of the repository names it, and push again."
        )


def _is_held(upload: CommitOperationAdd, held: RepoFile | None) -> bool:
    if held is None:
        return False
    if held.lfs is not None:
        return held.lfs.sha256 == upload.upload_info.sha256.hex()
    with upload.as_file() as file:
        content = file.read()
    return held.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # git's name of a file


@contextmanager
def _remedies() -> Iterator[None]:
    """Say what to do about a refusal by the Hub."""
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code in _REMEDIES:
            error.append_to_message(f"\n\n{_REMEDIES[error.response.status_code]}")
        raise
    except AnyHttpError as error:
        raise ConnectionError(
            f"The connection to the Hub failed: {error}. Pushing again is safe: what is there is not sent twice."
        ) from error
