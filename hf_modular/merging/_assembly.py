"""What the result is made of: for each part of its tensors the models, the settings, and the names in the models."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_modular.checkpoints import TensorInfo
from hf_modular.merging._architecture import architecture
from hf_modular.merging._engine import Inputs
from hf_modular.merging._layers import LayerStack, Place, before_and_after, layer_stack, stacked_config
from hf_modular.merging._method import MergeMethod
from hf_modular.merging._names import agree, known
from hf_modular.merging._preflight import TensorLike
from hf_modular.merging._recipe import Column, MergeRecipe, Section
from hf_modular.merging._settings import Resolved, depths
from hf_modular.merging._sources import Source


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
        config: The keys of the config that differ from the reference model's; None for one to leave out.
    """

    parts: list[Part]
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)

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
    found = (_stacked if recipe.slices is not None else _whole)(recipe, sources)
    return replace(
        found, problems=[*found.problems, *misfits(found.plan, sources[recipe.reference_model], found.config)]
    )


def _whole(recipe: MergeRecipe, sources: Mapping[str, Source]) -> Assembly:
    """All layers of all models."""
    [section] = recipe.sections
    reference = sources[recipe.reference_model]
    models = [sources[column.model] for column in section.models]
    names = agree(reference, models)
    tensors = reference.tensors
    plan = _plan({name: tensors[name] for name in names.names}, recipe)
    settings = {name: section.settings.at(name, depth) for name, depth in depths(plan).items()}
    base = sources[section.base.model] if section.base else None
    part = Part(plan, settings, base, models, reference, recipe.method)
    return Assembly([part], names.notes, config=_untied(names.untied))


def misfits(plan: Mapping[str, TensorLike], reference: Source, changes: Mapping[str, Any]) -> Iterator[str]:
    """How the result differs from the model that transformers would build by its config, where that was changed."""
    before = known(reference)
    if not changes or not reference.tensors.keys() <= before.shapes.keys():
        return
    config = {key: value for key, value in {**reference.config, **changes}.items() if value is not None}
    after = architecture(config)
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


def _untied(untied: bool) -> dict[str, Any]:
    return {"tie_word_embeddings": False} if untied else {}


def _stacked(recipe: MergeRecipe, sources: Mapping[str, Source]) -> Assembly:
    """Slices of layers, one behind the other; what is outside the layers comes from the first and the last slice."""
    sliced = [sources[column.model] for section in recipe.sections for column in _columns(section)]
    names = agree(sources[recipe.reference_model], sliced)
    stacks, problems = _stacks([sources[recipe.reference_model], *sliced])
    problems += [] if problems else [*_range_problems(recipe, stacks)]
    if problems:
        return Assembly([], names.notes, problems)
    slicer = _Slicer(recipe, sources, stacks)
    parts = [slicer.part(i) for i in range(len(recipe.sections))]
    leads = [(slicer.lead(section), _lead(section).first, section.layers or 0) for section in recipe.sections]
    config, problems = stacked_config(leads)
    untied = any(name in part.plan for part in parts for name in sources[recipe.reference_model].tied)
    return Assembly(parts, names.notes, problems, config | _untied(untied))


@dataclass(frozen=True)
class _Slicer:
    recipe: MergeRecipe
    sources: Mapping[str, Source]
    stacks: Mapping[str, LayerStack]

    def lead(self, section: Section) -> Source:
        """The model after which a slice is shaped."""
        return self.sources[_lead(section).model]

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
        source, count = self.sources[column.model], self.recipe.sections[index].layers or 0
        own, result = self.stacks[column.model], self.stacks[self.recipe.reference_model]
        names = {name: name for name in self._outside(source, own, index)}
        for name in source.tensors:
            place = own.place(name)
            if place and 0 <= (inner := place.layer - column.first) < count:
                names[result.name(Place(self._first(index) + inner, place.rest))] = name
        return Renamed(source, names)

    def _outside(self, source: Source, stack: LayerStack, index: int) -> list[str]:
        """What a model gives to a slice of the tensors outside the layers."""
        before, after = before_and_after(source, stack)
        first, last = index == 0, index == len(self.recipe.sections) - 1
        return [*(before if first else []), *(after if last else [])]


def _columns(section: Section) -> list[Column]:
    return [*([section.base] if section.base else []), *section.models]


def _lead(section: Section) -> Column:
    return _columns(section)[0]


def _stacks(sources: Sequence[Source]) -> tuple[dict[str, LayerStack], list[str]]:
    stacks, problems = {}, []
    for source in {source.reference: source for source in sources}.values():
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
