"""Models whose vocabularies differ, brought into one: a row of the embeddings for each token of the result.

A model that lacks a token is given an embedding for it: that of the base if the base has one, else the mean over the
models that have one, which is mergekit's rule. Rows that belong to no token are a model's own where it has such a row,
else the mean of its other rows.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from hf_modular.checkpoints import TensorInfo
from hf_modular.merging.assembly._tokenizers import (
    ConversionError,
    Tokenizer,
    load_tokenizer,
    same_files,
    union,
    with_tokens,
)
from hf_modular.merging.engine._engine import Inputs
from hf_modular.merging.engine._preflight import TensorLike
from hf_modular.merging.recipes._entries import TokenChoice, TokenizerChoice, TokenOrigin
from hf_modular.merging.recipes._recipe import MergeRecipe
from hf_modular.merging.sources._names import known
from hf_modular.merging.sources._sources import Source

ABSENT = -2  # not -1: the row after it would look like its successor
_SHOWN = 5  # tokens that are noted
_ROWS_LIMIT = 1 << 21  # several times more than any model has
_ROWS = 512  # read at a time for a mean

Lender = tuple[Inputs, int]  # a model and one of its rows
Given = dict[int, tuple[list[tuple[str, int]], bool]]  # row -> the rows it comes from, and whether for all models


@dataclass(frozen=True, eq=False)
class Rows:
    """Where a model's rows of the result come from.

    Args:
        own: The model's own row for each, or ABSENT.
        lent: For absent ones the rows of other models whose mean is taken; none for zeros. What is in neither is the
            mean of all rows that are.
    """

    own: Tensor  # (rows,)
    lent: Mapping[int, Sequence[Lender]]

    def __len__(self) -> int:
        return len(self.own)

    @property
    def known(self) -> Iterator[tuple[int, int]]:
        """Where rows that are no mean of the others begin and end, a few at a time."""
        rows = [row for row, own in enumerate(self.own.tolist()) if own != ABSENT or row in self.lent]
        starts = [0, *(i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1), len(rows)]
        for start, end in pairwise(starts):
            for first in range(start, end, _ROWS):
                yield rows[first], rows[min(first + _ROWS, end) - 1] + 1


@dataclass(frozen=True, eq=False)
class Aligned:
    """A model with the rows of the result."""

    origin: Inputs
    names: frozenset[str]  # of the tensors whose first axis is the vocabulary
    rows: Rows
    _means: dict[str, Tensor] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    @property
    def reference(self) -> str:
        return self.origin.reference

    @cached_property
    def tensors(self) -> Mapping[str, TensorLike]:
        return {name: self._info(name, tensor) for name, tensor in self.origin.tensors.items()}

    def fill(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out`, flat, with elements from flat index `start` on."""
        if name not in self.names:
            self.origin.fill(name, start, out)
            return
        width = math.prod(self.tensors[name].shape[1:])
        first, end = start // width, -(-(start + out.numel()) // width)
        block = out.new_empty(end - first, width)
        self._read(name, first, block)
        out.copy_(block.view(-1)[start - first * width :][: out.numel()])

    def _info(self, name: str, tensor: TensorLike) -> TensorLike:
        return TensorInfo(tensor.dtype, (len(self.rows), *tensor.shape[1:])) if name in self.names else tensor

    def _read(self, name: str, first: int, block: Tensor) -> None:
        """Fill a block of rows, those that are neighbours in the model at once."""
        width = block.shape[1]
        own = self.rows.own[first : first + len(block)]
        ends = [*((own.diff() != 1).nonzero().flatten() + 1).tolist(), len(own)]
        for start, end in zip([0, *ends], ends, strict=False):
            if own[start] == ABSENT:
                block[start] = self._given(name, first + start, block[start])
            else:
                self.origin.fill(name, int(own[start]) * width, block[start:end].view(-1))

    def _given(self, name: str, row: int, like: Tensor) -> Tensor:  # (width,)
        if row not in self.rows.lent:
            return self._mean(name, like)
        total, part = torch.zeros_like(like), torch.empty_like(like)
        lenders = self.rows.lent[row]
        for lender, number in lenders:
            lender.fill(name, number * len(like), part)
            total += part
        return total / max(len(lenders), 1)

    def _mean(self, name: str, like: Tensor) -> Tensor:  # (width,)
        """The mean of the rows that belong to tokens, made once."""
        with self._lock:
            if name not in self._means:
                total, count = torch.zeros(len(like), dtype=torch.float64, device=like.device), 0
                for first, end in self.rows.known:
                    block = like.new_empty(end - first, len(like))
                    self._read(name, first, block)
                    total += block.double().sum(0)
                    count += end - first
                self._means[name] = total / max(count, 1)
            return self._means[name].to(like)


@dataclass(frozen=True)
class Vocabulary:
    """The models with one vocabulary, and what follows from it.

    Args:
        models: The models by their references.
        config: What the config says differently.
        tokenizer: The tokenizer of the result, if it is not that of a model as it is.
    """

    models: Mapping[str, Inputs]
    config: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    notes: Sequence[str] = ()
    problems: Sequence[str] = ()


def one_vocabulary(recipe: MergeRecipe, sources: Mapping[str, Source]) -> Vocabulary:
    """The models of a recipe with the vocabulary that it asks for."""
    try:
        return _Vocabularies(recipe, sources).result()
    except ValueError as error:
        return Vocabulary(sources, problems=[str(error)])


@dataclass(frozen=True, eq=False)
class _Vocabularies:
    recipe: MergeRecipe
    sources: Mapping[str, Source]

    def result(self) -> Vocabulary:
        choice = self.recipe.tokenizer_choice
        plain = choice is None or not _needs_tokenizers(choice)
        if plain and self._one_shape() and same_files([source.processing for source in self.sources.values()]):
            return Vocabulary(self.sources)  # without asking transformers, which takes seconds to import
        if choice is None and self._one_shape():
            return self._alike()
        if not any(self.names.values()):
            return self._refuse_choice()
        if choice and (self.tokenizers or _needs_tokenizers(choice)):
            return self._by_tokens(choice)
        return self._by_numbers()

    def _one_shape(self) -> bool:
        """Whether tensors of one name have one shape in all models."""
        shapes: dict[str, tuple[int, ...]] = {}
        tensors = (item for source in self.sources.values() for item in source.tensors.items())
        return all(shapes.setdefault(name, tuple(tensor.shape)) == tuple(tensor.shape) for name, tensor in tensors)

    @cached_property
    def names(self) -> dict[str, frozenset[str]]:
        """The tensors of each model whose first axis is the vocabulary."""
        return {reference: _vocabulary_tensors(source) for reference, source in self.sources.items()}

    @cached_property
    def sizes(self) -> dict[str, int]:
        """How many rows the embeddings of each model have."""
        found = {
            reference: {source.tensors[name].shape[0] for name in self.names[reference]}
            for reference, source in self.sources.items()
        }
        for reference, sizes in found.items():
            if len(sizes) > 1:
                raise ValueError(f"all embeddings of {reference} must have as many rows, but have {sorted(sizes)}")
        return {reference: sizes.pop() for reference, sizes in found.items() if sizes}

    @cached_property
    def tokenizers(self) -> dict[str, Tokenizer]:
        """The tokenizers of the models that have one; where all are the same, they are one."""
        found = {name: load_tokenizer(name, source.processing) for name, source in self.sources.items()}
        return {name: tokenizer for name, tokenizer in found.items() if tokenizer}

    def _refuse_choice(self) -> Vocabulary:
        choice = self.recipe.tokenizer_choice
        if choice and _needs_tokenizers(choice):
            raise ValueError("the tokenizer cannot be changed of models that have no embeddings of tokens")
        return Vocabulary(self.sources)

    # ---- rows by their numbers

    def _by_numbers(self) -> Vocabulary:
        """Row i of one model belongs to row i of another."""
        sizes, policy = self.sizes, self.recipe.vocab
        if len({*sizes.values()}) == 1:
            return self._alike()  # of the embeddings, at least
        size = _sensible(min(sizes.values()) if policy == "truncate" else max(sizes.values()))
        problems = (
            [] if policy != "error" else [f"the vocabularies must have one size, but {_of_each(sizes)}: {_WAYS}"]
        )
        rows = {name: range(min(own, size)) for name, own in sizes.items()}
        models = self._aligned(size, {name: dict(zip(of, of, strict=True)) for name, of in rows.items()}, {})
        tokenizer = load_tokenizer(self.recipe.tokenizer_model, self.sources[self.recipe.tokenizer_model].processing)
        if tokenizer and policy == "truncate" and (last := max(tokenizer.vocabulary.values())) >= size:
            problems.append(
                f"the tokenizer of {tokenizer.reference} has tokens up to {last}, but `vocab: truncate` leaves {size} "
                "rows: choose the tokenizer of a model that has no more, or `vocab: pad`"
            )
        notes = [] if policy == "error" else self._numbering()[0]
        return Vocabulary(models, self._config(size), notes=notes, problems=problems)

    def _alike(self) -> Vocabulary:
        """Vocabularies of one size, whose tokens must have the same numbers."""
        notes, problems = self._numbering()
        return Vocabulary(self.sources, notes=notes, problems=problems)

    def _numbering(self) -> tuple[list[str], list[str]]:
        """What to note of tokens that have another number in another model; and what is wrong, if nobody allows it."""
        notes: list[str] = []
        problems: list[str] = []
        try:
            tokenizers = [*self.tokenizers.values()]
        except ConversionError as error:
            return [f"whether a token has one number in all models is unknown: {error}"], []
        for first, other in zip(tokenizers[:1] * len(tokenizers), tokenizers[1:], strict=False):
            both = first.vocabulary.keys() & other.vocabulary.keys()
            moved = sorted(token for token in both if first.vocabulary[token] != other.vocabulary[token])
            single = sorted(first.vocabulary.keys() ^ other.vocabulary.keys())
            pair = f"the tokenizers of {first.reference} and {other.reference}"
            found = f"{len(moved)} of {len(both)} common tokens, such as {moved[:1]}"
            if moved and self.recipe.vocab == "error":
                problems.append(f"{pair} must give a token the same number, but {found}, have not: {_WAYS}")
            elif moved:
                notes.append(f"{pair} differ in the numbers of {found}: rows of different tokens were merged")
            elif single and self.recipe.vocab == "error":
                notes.append(
                    f"{pair} differ in {len(single)} tokens, such as {single[0]!r}: embeddings were merged by number"
                )
        return notes, problems

    # ---- rows by their tokens

    def _by_tokens(self, choice: TokenizerChoice) -> Vocabulary:
        """A row of one model belongs to the row of another that has the same token."""
        own = self.tokenizers.get(self.recipe.tokenizer_model)
        if own is None:
            raise ValueError(f"{self.recipe.tokenizer_model} must have a tokenizer to be the result's, but has none")
        if lacking := [name for name in self.sources if name not in self.sizes]:
            raise ValueError(f"{lacking[0]} has no tensor that its config would make the embeddings of its tokens")
        others = [tokenizer for name, tokenizer in self.tokenizers.items() if name != self.recipe.tokenizer_model]
        united = union(own, others) if choice.source == "union" else own
        result = with_tokens(united, [*choice.tokens])
        size = max(max(result.vocabulary.values()) + 1, self.sizes[self.recipe.tokenizer_model])
        if choice.pad_to_multiple_of:
            size = -(-size // choice.pad_to_multiple_of) * choice.pad_to_multiple_of
        _sensible(size)
        without = [name for name in self.sizes if name not in self.tokenizers]
        notes = [f"{name} has no tokenizer; it was taken to be that of {own.reference}" for name in without]
        vocabularies = {name: self.tokenizers.get(name, own).vocabulary for name in self.sizes}
        plain = not any(origin.force for origin in choice.tokens.values())
        tokenizer = None if result.vocabulary == own.vocabulary else result
        if plain and {*self.sizes.values()} == {size} and all(v == result.vocabulary for v in vocabularies.values()):
            return Vocabulary(self.sources, notes=notes)
        rows = {name: self._rows(name, vocabularies[name], result.vocabulary, size) for name in self.sizes}
        held = {row for own in rows.values() for row in own}
        orphans: Given = {row: ([], False) for row in result.vocabulary.values() if row not in held}
        given = orphans | self._given(choice.tokens, result.vocabulary, vocabularies)
        named = [token for token, row in result.vocabulary.items() if row in orphans and not given[row][0]]
        notes += [f"no model has an embedding of the token {token!r}: it is zeros" for token in named[:_SHOWN]]
        models = self._aligned(size, rows, given)
        return Vocabulary(models, self._config(size), tokenizer, notes)

    def _rows(self, name: str, own: Mapping[str, int], result: Mapping[str, int], size: int) -> dict[int, int]:
        """The rows of the result that a model has -> its own; for rows without a token those without one."""
        rows = {row: own[token] for token, row in result.items() if token in own and own[token] < self.sizes[name]}
        taken = {*own.values(), *result.values()}
        return rows | {row: row for row in range(min(size, self.sizes[name])) if row not in taken}

    def _given(
        self,
        tokens: Mapping[str, TokenChoice],
        result: Mapping[str, int],
        vocabularies: Mapping[str, Mapping[str, int]],
    ) -> Given:
        """Of the rows whose embeddings the recipe gives: where they come from, and whether for all models."""
        found: Given = {}
        for token, choice in tokens.items():
            if isinstance(choice.source, TokenOrigin) and choice.source.kind == "zero":
                found[result[token]] = ([], choice.force)
            elif choice.model is not None:
                row = self._row_of(token, choice, vocabularies[choice.model], choice.model)
                found[result[token]] = ([(choice.model, row)], choice.force)
            elif choice.force:
                raise ValueError(f"the embedding of the token {token!r} is forced, so it must have a `source`")
        return found

    def _row_of(self, token: str, choice: TokenChoice, vocabulary: Mapping[str, int], model: str) -> int:
        other = choice.source if isinstance(choice.source, TokenOrigin) else None
        wanted = token if other is None else other.token
        row = vocabulary.get(wanted, self.sizes[model]) if wanted is not None else other.token_id if other else None
        if row is None or row >= self.sizes[model]:
            raise ValueError(
                f"the embedding of the token {token!r} must come from a row of {model}, but it has none for "
                f"{wanted if wanted is not None else row!r} among its {self.sizes[model]}"
            )
        return row

    # ---- both

    def _aligned(
        self,
        size: int,
        rows: Mapping[str, Mapping[int, int]],
        given: Given,
    ) -> dict[str, Inputs]:
        """The models with `size` rows, of which they have those in `rows`."""
        forced = {row for row, (_, force) in given.items() if force}
        chosen = {row: lenders for row, (lenders, _) in given.items()}
        held = {row for own in rows.values() for row in own}
        lacking = {row for row in held if any(row not in own for own in rows.values())} | forced | chosen.keys()
        lent = {row: chosen[row] if row in chosen else self._lenders(row, rows) for row in sorted(lacking)}
        there = {row: [(self.sources[lender], i) for lender, i in lenders] for row, lenders in lent.items()}
        models: dict[str, Inputs] = dict(self.sources)
        for name, own in rows.items():
            numbers = torch.full((size,), ABSENT)
            numbers[[*own]] = torch.tensor([*own.values()], dtype=torch.int64)
            numbers[[*forced]] = ABSENT
            models[name] = Aligned(self.sources[name], self.names[name], Rows(numbers, there))
        return models

    def _lenders(self, row: int, rows: Mapping[str, Mapping[int, int]]) -> list[tuple[str, int]]:
        """The base if it has the row, else all models that have it."""
        base = self.recipe.base_model or ""
        if row in rows.get(base, {}):
            return [(base, rows[base][row])]
        return [(name, own[row]) for name, own in rows.items() if row in own]

    def _config(self, size: int) -> dict[str, Any]:
        return {known(self.sources[self.recipe.reference_model]).vocabulary_key: size}


_WAYS = (
    "choose a tokenizer (`tokenizer_source: base`, `union` or a model), by which embeddings are merged token by "
    "token, or a `vocab` policy (`truncate` or `pad`), by which they are merged row by row"
)


def _needs_tokenizers(choice: TokenizerChoice) -> bool:
    return choice.source == "union" or bool(choice.tokens) or choice.pad_to_multiple_of is not None


def _sensible(size: int) -> int:
    if size > _ROWS_LIMIT:
        raise ValueError(f"the embeddings may have up to {_ROWS_LIMIT:,} rows, but would have {size:,}")
    return size


def _of_each(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} has {size}" for name, size in sizes.items())


def _vocabulary_tensors(source: Source) -> frozenset[str]:
    found = known(source).vocabulary & source.tensors.keys()
    if found or known(source).shapes:
        return frozenset(found)
    size = source.config.get("vocab_size")
    return frozenset(name for name, tensor in source.tensors.items() if len(tensor.shape) and tensor.shape[0] == size)
