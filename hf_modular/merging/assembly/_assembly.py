"""What the result is made of: for each part of its tensors the models, the settings, and the names in the models."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_modular import merging
from hf_modular.checkpoints import TensorInfo
from hf_modular.merging._method import MergeMethod
from hf_modular.merging.assembly._heads import Heads, choose_head, head_names, labels
from hf_modular.merging.assembly._layers import Piece, Place, before_and_after, stacked_config
from hf_modular.merging.assembly._modules import Module, module_named, modules, spelled
from hf_modular.merging.assembly._tokenizers import Tokenizer
from hf_modular.merging.assembly._vocabulary import one_vocabulary
from hf_modular.merging.engine._engine import Inputs
from hf_modular.merging.engine._preflight import TensorLike
from hf_modular.merging.recipes._recipe import MergeRecipe
from hf_modular.merging.recipes._sections import Column, Section
from hf_modular.merging.recipes._settings import Resolved, depths
from hf_modular.merging.sources._dotted import at
from hf_modular.merging.sources._names import agree, known
from hf_modular.merging.sources._sources import Source

_TIED = "tie_word_embeddings"


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
    columns = (column for section in recipe.sections for column in section.columns)
    named = dict.fromkeys([recipe.reference_model, *(column.model for column in columns)])
    models = {name: sources[name] for name in named}
    reference = models[recipe.reference_model]
    notes = agree([*models.values()])
    vocabulary = one_vocabulary(recipe, models)
    last = _last(recipe, reference)
    tail = {name: models[name] for name in _of_the_head(recipe, last)}
    heads = choose_head(recipe, tail, vocabulary.models)
    views = {name: _without(view, heads.names) for name, view in vocabulary.models.items()}
    found = (_whole if recipe.models else _modular)(recipe, models, views)
    head = [_head(recipe, heads, vocabulary.models[heads.kept])] if heads.kept else []
    if recipe.method.one_by_one and (head or views != models):
        method = repr(recipe.merge_method)
        return Assembly(
            [], problems=[f"{method} cannot change heads or vocabularies: merge models that have the same"]
        )
    parts = [*found.parts, *head]
    apart = {name for source in models.values() for name in (*source.tied, *source.untied)}
    tied = any(name in part.plan for part in parts for name in apart)
    said = labels(reference, models[heads.kept or (recipe.reference_model if recipe.models else last.lead.model)])
    config = {**found.config, **vocabulary.config, **said, **({_TIED: False} if tied else {})}
    planned = {name: tensor for part in parts for name, tensor in part.plan.items()}
    problems = [*vocabulary.problems, *heads.problems, *found.problems]
    problems += [] if problems else [*misfits(planned, reference, config)]
    notes += [
        *vocabulary.notes,
        *_idle_filters(recipe, {*planned, *(name for view in models.values() for name in view.tensors)}),
    ]
    return Assembly(parts, notes, problems, config, vocabulary.tokenizer)


def _idle_filters(recipe: MergeRecipe, names: Collection[str]) -> Iterator[str]:
    for wanted in dict.fromkeys(text for section in recipe.sections for text in section.settings.filters):
        if names and not any(wanted in name for name in names):
            yield f"the filter {wanted!r} fits the name of no tensor: what it is to set is not set"


def _last(recipe: MergeRecipe, reference: Source) -> Section:
    """What gives the head: the last section, or of modules the last one of that which the head is in."""
    if recipe.modules:
        head = head_names(reference, reference.tensors)
        with_head = [module for module in modules(reference, recipe.modules) if head & {*module.outside}]
        found = [section for section in recipe.sections if any(section.module in module.names for module in with_head)]
        return (found or recipe.sections)[-1]
    return recipe.sections[-1]


def _of_the_head(recipe: MergeRecipe, last: Section) -> list[str]:
    """The models of which one or all give the head, the reference first."""
    chosen = [] if recipe.heads in ("error", "base") else [recipe.heads]
    first = [recipe.reference_model] if recipe.models or recipe.heads != "error" else []
    return [*dict.fromkeys([*first, *chosen, *(column.model for column in last.columns)])]


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
    after = known(reference, changes)
    if not after.shapes:
        yield f"transformers cannot make a model of the result, whose config would say {changes}"
        return
    for key, value in changes.items():
        told = key != _TIED and None not in (value, at(before.config, key))  # some models ignore what is said of ties
        if told and (read := at(after.config, key)) != value:
            yield f"the config of the result must say `{key}` is {value}, but transformers would make it {read}"
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


def _modular(recipe: MergeRecipe, models: Mapping[str, Source], views: Mapping[str, Inputs]) -> Assembly:
    """Each module of the model from its own models, or from slices of their layers, one behind the other."""
    cut, problems = _cut(recipe, models)
    problems += [] if problems else [*_range_problems(recipe, cut)]
    if problems:
        return Assembly([], problems=problems)
    slicers = [
        _Slicer(recipe, models, views, there, [s for s in recipe.sections if s.module == name])
        for name, there in cut.items()
    ]
    config: dict[str, Any] = {}
    for slicer in slicers:
        changes, found = slicer.config()
        config |= changes
        problems += found
    return Assembly([part for slicer in slicers for part in slicer.parts()], problems=problems, config=config)


@dataclass(frozen=True)
class _Slicer:
    """One module of the result: slices of its layers; what is outside them comes from the first and the last slice."""

    recipe: MergeRecipe
    models: Mapping[str, Source]
    views: Mapping[str, Inputs]
    cut: Mapping[str, Module]  # of each model
    sections: Sequence[Section]

    def parts(self) -> list[Part]:
        return [self.part(i) for i in range(len(self.sections))]

    def config(self) -> tuple[dict[str, Any], list[str]]:
        """What the config of the reference model must say of the layers; and what is wrong with it."""
        reference, result = self.models[self.recipe.reference_model], self.cut[self.recipe.reference_model].stack
        if result is None or not reference.config:
            return {}, []
        pieces = [
            Piece(self.models[section.lead.model], stack, section.lead.first, self._count(i))
            for i, section in enumerate(self.sections)
            if (stack := self.cut[section.lead.model].stack)
        ]
        return stacked_config(pieces, reference, result)

    def part(self, index: int) -> Part:
        section = self.sections[index]
        lead = self._renamed(section.lead, index)
        plan = _plan(lead.tensors, self.recipe)
        first, last = self._first(index), self._count(index) - 1
        result = self.cut[self.recipe.reference_model].stack
        places = {name: place for name in plan if result and (place := result.place(name))}
        depth = {name: (place.layer - first) / last if last else 1.0 for name, place in places.items()}
        models = [self._renamed(column, index) for column in section.models]
        own = {name: [model.names.get(name, name) for model in models] for name in plan}
        return Part(
            plan=plan,
            settings={name: section.settings.at(name, depth.get(name, 0.0), own[name]) for name in plan},
            base=self._renamed(section.base, index) if section.base else None,
            models=models,
            carrier=lead,
            fallback=self.recipe.method,
        )

    def _count(self, index: int) -> int:
        """How many layers a section has."""
        section = self.sections[index]
        return self.cut[section.lead.model].layers if section.layers is None else section.layers

    def _first(self, index: int) -> int:
        """The number of a section's first layer in the result."""
        return sum(map(self._count, range(index)))

    def _renamed(self, column: Column, index: int) -> Renamed:
        """What a model gives to a section, under the names of the result."""
        view, count = self.views[column.model], self._count(index)
        own, result = self.cut[column.model].stack, self.cut[self.recipe.reference_model].stack
        names = {name: name for name in self._outside(column.model, index) if name in view.tensors}
        for name in view.tensors:
            place = own.place(name) if own else None
            if place and result and 0 <= (inner := place.layer - column.first) < count:
                names[result.name(Place(self._first(index) + inner, place.rest))] = name
        return Renamed(view, names)

    def _outside(self, model: str, index: int) -> list[str]:
        """What a model gives to a section of the tensors outside the layers."""
        module = self.cut[model]
        if module.stack is None:
            return [*module.outside]
        before, after = before_and_after(self.models[model], module.stack, module.outside)
        first, last = index == 0, index == len(self.sections) - 1
        return [*(before if first else []), *(after if last else [])]


Cut = dict[str | None, dict[str, Module]]  # the modules by their names in the recipe, of each model


def _cut(recipe: MergeRecipe, models: Mapping[str, Source]) -> tuple[Cut, list[str]]:
    """The modules of all models that give to them, and what is wrong with their names."""
    cut: Cut = {}
    problems: list[str] = []
    for section in recipe.sections:
        there = cut.setdefault(section.module, {})
        for name in dict.fromkeys([recipe.reference_model, *(column.model for column in section.columns)]):
            try:
                there[name] = module_named(section.module, models[name], recipe.modules or ())
            except ValueError as error:
                place = ("slices",) if section.module is None else ("modules", section.module)
                problems.append(recipe.document.place(place, str(error)))
    if not problems and recipe.modules:
        problems += _forgotten(recipe, models[recipe.reference_model])
    return cut, [*dict.fromkeys(problems)]


def _forgotten(recipe: MergeRecipe, reference: Source) -> Iterator[str]:
    """Modules of which nothing, or two things, are said."""
    names = recipe.modules or {}
    for module in modules(reference, names):
        said = [name for name in names if name in module.names]
        if len(said) > 1:
            yield recipe.document.place(("modules", said[1]), f"it is the same module as {said[0]!r}")
    if lacking := [module for module in modules(reference, names) if not {*module.names} & names.keys()]:
        law = f"all modules of {reference.reference} must be given, but {spelled(lacking)} is missing"
        yield recipe.document.place(("modules",), f"{law}: say which `models` it comes from")


def _range_problems(recipe: MergeRecipe, cut: Cut) -> Iterator[str]:
    for i, section in enumerate(recipe.sections):
        lead = cut[section.module][section.lead.model].layers
        if not lead and i and recipe.sections[i - 1].module == section.module:
            yield recipe.document.place(section.place, "a module without layers must be one slice")
        for column in section.columns:
            count = cut[section.module][column.model].layers
            end = column.first + (lead if section.layers is None else section.layers)
            if section.layers is None and count != lead:
                law = f"the models must have as many layers here, {lead} as {section.lead.model}"
                yield recipe.document.place(section.place, f"{law}, but {column.model} has {count}")
            elif end > count or (section.layers == 0 and count):
                place = (*section.place, "sources", column.number, "layer_range")
                law = f"{column.model} has the layers [0, {count}]"
                yield recipe.document.place(place, f"{law}, but got [{column.first}, {end}]")
