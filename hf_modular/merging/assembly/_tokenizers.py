"""Tokenizers as the data in `tokenizer.json`: their vocabularies, and the union of several.

In a union the first tokenizer keeps its numbers, and the tokens that others have follow. They become part of its
model, with the merges that make them; where its kind allows none, they are found in texts as they are.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_modular.merging.sources._sources import files, read_object

TOKENIZER = "tokenizer.json"
_PARTS = ("tokenizer.json", "tokenizer.model", "vocab*", "merges.txt", "*.spm", "*.tiktoken", "spiece.model")
_KINDS = {"BPE", "WordPiece", "WordLevel"}  # whose tokens may have any numbers


class ConversionError(ValueError):
    """A tokenizer in a format that cannot be read here."""


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer and the model that it belongs to."""

    reference: str
    data: dict[str, Any]

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """The numbers of all tokens."""
        return self.own | {token["content"]: token["id"] for token in self.added}

    @property
    def added(self) -> list[dict[str, Any]]:
        return self.data.get("added_tokens") or []

    @cached_property
    def own(self) -> dict[str, int]:
        """The tokens that texts are cut into, without those that were added."""
        found = self.data["model"]["vocab"]
        return dict(found) if isinstance(found, dict) else {token: i for i, (token, _) in enumerate(found)}

    @property
    def kind(self) -> tuple[str, bool]:
        """What decides whether tokens of another tokenizer mean the same: the model, and whether it is of bytes."""
        return self.data["model"].get("type", "BPE"), "ByteLevel" in json.dumps(self.data.get("decoder"))


def load_tokenizer(reference: str, folder: Path) -> Tokenizer | None:
    """The tokenizer in a folder; None where there is none."""
    path = folder / TOKENIZER
    if not path.is_file() and not any(files(folder, _PARTS)):
        return None
    data = read_object(path) if path.is_file() else _converted(folder)
    tokenizer = Tokenizer(reference, data)
    try:
        vocabulary = tokenizer.vocabulary
        good = all(isinstance(token, str) and type(i) is int and i >= 0 for token, i in vocabulary.items())
    except (KeyError, TypeError, ValueError, AttributeError):
        good = False
    if not good:
        raise ValueError(f"{path} must hold a tokenizer with the numbers of its tokens, but does not")
    return tokenizer


def same_files(folders: Sequence[Path]) -> bool:
    """Whether the tokenizers of all folders that have one are the same, by the bytes of their files."""
    held = [{path.name: path.read_bytes() for path in files(folder, _PARTS)} for folder in folders]
    there = [contents for contents in held if contents]
    return all(contents == there[0] for contents in there)


def union(first: Tokenizer, others: Sequence[Tokenizer]) -> Tokenizer:
    """A tokenizer with the tokens of all, in which those of the first keep their numbers."""
    united = first
    for other in others:
        theirs = sorted(other.vocabulary, key=other.vocabulary.__getitem__)
        new = [token for token in theirs if token not in united.vocabulary]
        added = {token["content"]: token for token in other.added}
        regular = [token for token in new if token not in added]
        if regular and other.kind != first.kind:
            raise ValueError(
                f"the tokenizers of {first.reference} and {other.reference} are of different kinds, "
                f"{_spelled(first.kind)} and {_spelled(other.kind)}, and have no union: choose one of them"
            )
        own = regular if first.kind[0] in _KINDS else []
        united = _extended(united, {token: added.get(token) or _plain(token) for token in new}, own)
        united.data["model"].update(_merges(united.data["model"], other, {*own}))
    return _checked(united) if united is not first else first


def with_tokens(tokenizer: Tokenizer, tokens: Iterable[str]) -> Tokenizer:
    """A tokenizer with further tokens, which are found in texts as they are."""
    new = {token: _plain(token) for token in tokens if token not in tokenizer.vocabulary}
    return _checked(_extended(tokenizer, new, [])) if new else tokenizer


def _extended(tokenizer: Tokenizer, new: Mapping[str, Mapping[str, Any]], own: Collection[str]) -> Tokenizer:
    """A tokenizer with new tokens behind the others, `own` of them as part of its model."""
    start = max(tokenizer.vocabulary.values(), default=-1) + 1
    numbers = {token: start + i for i, token in enumerate(new)}
    added = [{**settings, "id": numbers[token]} for token, settings in new.items() if token not in own]
    data = {**deepcopy(dict(tokenizer.data)), "added_tokens": [*tokenizer.added, *added]}
    if tokenizer.kind[0] in _KINDS:  # added tokens, too, or they would be numbered anew when the file is read
        data["model"]["vocab"] |= tokenizer.vocabulary | numbers
    return Tokenizer(tokenizer.reference, data)


def _checked(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer that has the numbers it is meant to have when it is read."""
    import tokenizers

    try:
        found = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.data)).get_vocab()
    except Exception as error:  # tokenizers raises no narrower one
        raise ValueError(f"the tokenizer of {tokenizer.reference} cannot be extended: {error}") from error
    if found != tokenizer.vocabulary:
        moved = sorted(token for token in tokenizer.vocabulary if found.get(token) != tokenizer.vocabulary[token])
        law = f"the tokens of {tokenizer.reference} must keep their numbers when others are added"
        raise ValueError(f"{law}, but {len(moved)}, such as {moved[:1]}, do not: choose a tokenizer as it is")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Put a tokenizer in the place of another's files; settings such as the special tokens stay."""
    for path in [*files(folder, (*_PARTS, "added_tokens.json"))]:
        path.unlink()
    (folder / TOKENIZER).write_text(json.dumps(tokenizer.data, ensure_ascii=False, indent=2) + "\n", "utf-8")


def _converted(folder: Path) -> dict[str, Any]:
    """What transformers makes of other formats."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        data: dict[str, Any] = json.loads(found.backend_tokenizer.to_str())
    except Exception as error:  # whatever a file of somebody else's format can do
        raise ConversionError(
            f"transformers cannot turn the tokenizer in {folder} into {TOKENIZER}: {error}"
        ) from error
    return data


def _plain(token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    return {"content": token, **flags, "normalized": True}


def _merges(model: Mapping[str, Any], other: Tokenizer, new: set[str]) -> dict[str, Any]:
    """The merges of a BPE with those of another that make new tokens, which come last."""
    if "merges" not in model:
        return {}
    own, theirs = ([*map(_pair, merges)] for merges in (model["merges"], other.data["model"].get("merges", [])))
    return {"merges": own + [pair for pair in theirs if "".join(pair) in new]}


def _pair(merge: Any) -> list[str]:
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
        raise ValueError(f"a merge of a tokenizer must be two texts, but got {merge!r:.200}")
    return pair


def _spelled(kind: tuple[str, bool]) -> str:
    return f"{kind[0]}{' of bytes' if kind[1] else ''}"
