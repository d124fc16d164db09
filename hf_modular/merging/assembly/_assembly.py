"""What the result is made of: for each part of its tensors the models, the settings, and the names in the models."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_modular import merging
from hf_modular.checkpoints import TensorInfo
from hf_modular.merging._method import MergeMethod
from hf_modular.merging.assembly._heads import Heads, choose_head, labels
from hf_modular.merging.assembly._layers import LayerStack, Place, before_and_after, layer_stack, stacked_config
from hf_modular.merging.assembly._tokenizers import Tokenizer
from hf_modular.merging.assembly._vocabulary import one_vocabulary
from hf_modular.merging.engine._engine import Inputs
from hf_modular.merging.engine._preflight import TensorLike
from hf_modular.merging.recipes._recipe import Column, MergeRecipe, Section
from hf_modular.merging.recipes._settings import Resolved, depths
from hf_modular.merging.sources._architecture import architecture
from hf_modular.merging.sources._names import agree, known
from hf_modular.merging.sources._sources import Source


@dataclass(frozen=True, eq=False)
class Part:
    """Tensors of the result that come from the same models.

    Args:
        plan: The dtype and shape of each.
        settings: The method and its settings for each.
        base: What the models were fine-tuned from, for methods that use one.
        carrier: Gives the tensors that hold no floating-point numbers.
        fallback: The method where there are no tensors.
    """

    plan: Mapping[str, TensorInfo]
    settings: Mapping[str, Resolved]
    base: Inputs | None
    models: Sequence[Inputs]
    carrier: Inputs
    fallback: MergeMethod
    copied: bool = False  # whether it is a model's as it is, whatever the recipe's method

    @property
    def method(self) -> MergeMethod:
        """The method with the settings of the first tensor."""
        return next((resolved.method for resolved in self.settings.values()), self.fallback)

    @property
    def reference(self) -> dict[str, TensorLike]:
        """The tensors after which the result is shaped."""
        return {name: self.carrier.tensors[name] for name in self.plan}


@dataclass(frozen=True)
class Assembly:
    """All parts, and what the config must say of the result.

    Args:
        problems: Why it cannot be made.
        config: The keys of the config that differ from the reference model's.
        tokenizer: The tokenizer, if it is not that of a model as it is.
    """

    parts: list[Part]
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None

    @property
    def plan(self) -> dict[str, TensorInfo]:
        """The tensors of the result."""
        return {name: tensor for part in self.parts for name, tensor in part.plan.items()}


@dataclass(frozen=True, eq=False)
class Renamed:
    """A model whose tensors go by the names that they have in the result."""

    origin: Inputs
    names: Mapping[str, str]  # the result's -> the model's

    @property
    def reference(self) -> str:
        return self.origin.reference

    @cached_property
    def tensors(self) -> Mapping[str, TensorLike]:
        there = self.origin.tensors
        return {name: there[own] for name, own in self.names.items() if own in there}

    def fill(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out`, flat, with elements from flat index `start` on."""
        self.origin.fill(self.names[name], start, out)


def assemble(recipe: MergeRecipe, sources: Mapping[str, Source]) -> Assembly:
    """What a recipe makes of its open models."""
    columns = (column for section in recipe.sections for column in _columns(section))
    named = dict.fromkeys([recipe.reference_model, *(column.model for column in columns)])
    models = {name: sources[name] for name in named}
    reference = models[recipe.reference_model]
    notes = agree([*models.values()])
    vocabulary = one_vocabulary(recipe, models)
    tail = {name: models[name] for name in _of_the_head(recipe)}
    heads = choose_head(recipe, tail, vocabulary.models)
    views = {name: _without(view, heads.names) for name, view in vocabulary.models.items()}
    found = (_stacked if recipe.slices is not None else _whole)(recipe, models, views)
    head = [_head(recipe, heads, vocabulary.models[heads.kept])] if heads.kept else []
    if recipe.method.one_by_one and (head or views != models):
        method = repr(recipe.merge_method)
        return Assembly(
            [], problems=[f"{method} cannot change heads or vocabularies: merge models that have the same"]
        )
    parts = [*found.parts, *head]
    tied = any(name in part.plan for part in parts for name in reference.tied)
    last = _lead(recipe.sections[-1]).model if recipe.slices else recipe.reference_model
    said = labels(reference, models[heads.kept or last])
    config = {**found.config, **vocabulary.config, **said, **({"tie_word_embeddings": False} if tied else {})}
    planned = {name: tensor for part in parts for name, tensor in part.plan.items()}
    problems = [*vocabulary.problems, *heads.problems, *found.problems]
    problems += [] if problems else [*misfits(planned, reference, config)]
    return Assembly(parts, [*notes, *vocabulary.notes], problems, config, vocabulary.tokenizer)


def _of_the_head(recipe: MergeRecipe) -> list[str]:
    """The models of which one or all give the head, the reference first."""
    chosen = [] if recipe.heads in ("error", "base") else [recipe.heads]
    return [*dict.fromkeys([*_reference(recipe), *chosen, *(c.model for c in _columns(recipe.sections[-1]))])]


def _reference(recipe: MergeRecipe) -> list[str]:
    return [recipe.reference_model] if recipe.slices is None or recipe.heads != "error" else []


def _without(model: Inputs, names: Collection[str]) -> Inputs:
    if not names:
        return model
    return Renamed(model, {name: name for name in model.tensors if name not in names})


def _head(recipe: MergeRecipe, heads: Heads, kept: Inputs) -> Part:
    """The head of one model, as it is."""
    copy = merging.METHODS["passthrough"]()
    view = Renamed(kept, {name: name for name in kept.tensors if name in heads.names})
    plan = _plan(view.tensors, recipe)
    return Part(plan, dict.fromkeys(plan, Resolved(copy, (1.0,), {})), None, [view], view, copy, copied=True)


def _whole(recipe: MergeRecipe, models: Mapping[str, Source], views: Mapping[str, Inputs]) -> Assembly:
    """All layers of all models."""
    [section] = recipe.sections
    reference = views[recipe.reference_model]
    plan = _plan(reference.tensors, recipe)
    settings = {name: section.settings.at(name, depth) for name, depth in depths(plan).items()}
    base = views[section.base.model] if section.base else None
    merged = [views[column.model] for column in section.models]
    return Assembly([Part(plan, settings, base, merged, reference, recipe.method)])


def misfits(plan: Mapping[str, TensorLike], reference: Source, changes: Mapping[str, Any]) -> Iterator[str]:
    """How the result differs from the model that transformers would build by its config, where that was changed."""
    if not changes:  # and transformers is not asked: to import it takes seconds
        return
    before = known(reference)
    if not reference.tensors.keys() <= before.shapes.keys():
        return
    after = architecture({**reference.config, **changes})
    if not after.shapes:
        yield f"transformers cannot make a model of the result, whose config would say {changes}"
        return
    usual = before.shapes.keys() - reference.tensors.keys()  # buffers, and what is tied
    for name in plan.keys() | (after.shapes.keys() - usual - after.tied.keys()):
        planned = tuple(plan[name].shape) if name in plan else "no shape"
        if planned != (shape := after.shapes.get(name, "no shape")):
            yield f"{name} must have {shape} by the config of the result, but would have {planned}"


def _plan(tensors: Mapping[str, TensorLike], recipe: MergeRecipe) -> dict[str, TensorInfo]:
    dtype = getattr(torch, recipe.result_dtype) if recipe.result_dtype else None
    return {
        name: TensorInfo(dtype if dtype and tensor.dtype.is_floating_point else tensor.dtype, tuple(tensor.shape))
        for name, tensor in tensors.items()
    }


def _stacked(recipe: MergeRecipe, models: Mapping[str, Source], views: Mapping[str, Inputs]) -> Assembly:
    """Slices of layers, one behind the other; what is outside the layers comes from the first and the last slice."""
    stacks, problems = _stacks(models.values())
    problems += [] if problems else [*_range_problems(recipe, stacks)]
    if problems:
        return Assembly([], problems=problems)
    slicer = _Slicer(recipe, models, views, stacks)
    leads = [(models[_lead(section).model], _lead(section).first, section.layers or 0) for section in recipe.sections]
    config, problems = stacked_config(leads)
    return Assembly([slicer.part(i) for i in range(len(recipe.sections))], problems=problems, config=config)


@dataclass(frozen=True)
class _Slicer:
    recipe: MergeRecipe
    models: Mapping[str, Source]
    views: Mapping[str, Inputs]
    stacks: Mapping[str, LayerStack]

    def part(self, index: int) -> Part:
        section = self.recipe.sections[index]
        lead = self._renamed(_lead(section), index)
        plan = _plan(lead.tensors, self.recipe)
        first, last = self._first(index), (section.layers or 0) - 1
        result = self.stacks[self.recipe.reference_model]
        places = {name: place for name in plan if (place := result.place(name))}
        depth = {name: (place.layer - first) / last if last else 1.0 for name, place in places.items()}
        return Part(
            plan=plan,
            settings={name: section.settings.at(name, depth.get(name, 0.0)) for name in plan},
            base=self._renamed(section.base, index) if section.base else None,
            models=[self._renamed(column, index) for column in section.models],
            carrier=lead,
            fallback=self.recipe.method,
        )

    def _first(self, index: int) -> int:
        """The number of a slice's first layer in the result."""
        return sum(section.layers or 0 for section in self.recipe.sections[:index])

    def _renamed(self, column: Column, index: int) -> Renamed:
        """What a model gives to a slice, under the names of the result."""
        view, count = self.views[column.model], self.recipe.sections[index].layers or 0
        own, result = self.stacks[column.model], self.stacks[self.recipe.reference_model]
        names = {name: name for name in self._outside(column.model, index) if name in view.tensors}
        for name in view.tensors:
            place = own.place(name)
            if place and 0 <= (inner := place.layer - column.first) < count:
                names[result.name(Place(self._first(index) + inner, place.rest))] = name
        return Renamed(view, names)

    def _outside(self, model: str, index: int) -> list[str]:
        """What a model gives to a slice of the tensors outside the layers."""
        before, after = before_and_after(self.models[model], self.stacks[model])
        first, last = index == 0, index == len(self.recipe.sections) - 1
        return [*(before if first else []), *(after if last else [])]


def _columns(section: Section) -> list[Column]:
    return [*([section.base] if section.base else []), *section.models]


def _lead(section: Section) -> Column:
    return _columns(section)[0]


def _stacks(models: Iterable[Source]) -> tuple[dict[str, LayerStack], list[str]]:
    stacks, problems = {}, []
    for source in models:
        try:
            stacks[source.reference] = layer_stack(source)
        except ValueError as error:
            problems.append(str(error))
    return stacks, problems


def _range_problems(recipe: MergeRecipe, stacks: Mapping[str, LayerStack]) -> Iterator[str]:
    for i, part in enumerate(recipe.slices or ()):
        for j, source in enumerate(part.sources):
            count = stacks[source.model].layers
            if source.layer_range[1] > count:
                place = ("slices", i, "sources", j, "layer_range")
                law = f"{source.model} has the layers [0, {count}], but got {[*source.layer_range]}"
                yield recipe.document.place(place, law)
