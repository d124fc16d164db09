"""What a recipe merges with what: all of its models, the sources of slices of layers, or those of modules."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from hf_modular.merging.recipes._entries import OutputModule, OutputSlice, PlainEntry, SliceSource
from hf_modular.merging.recipes._settings import Settings, chained, translated
from hf_modular.merging.recipes._yaml import Location

if TYPE_CHECKING:
    from hf_modular.merging.recipes._recipe import MergeRecipe

Entry = TypeVar("Entry", bound=PlainEntry)
Problems = Iterator[tuple[Location, str]]


class Column(NamedTuple):
    """A model of a section, whose layers count from `first` on."""

    model: str
    first: int = 0
    number: int = 0  # among the sources of a slice


class Section(NamedTuple):
    """Tensors of the result that the same models are merged into: all of them, or those of some layers."""

    place: Location  # in the recipe
    base: Column | None
    models: list[Column]
    layers: int | None  # how many; None for all there are
    settings: Settings
    module: str | None = None  # the part of the model that it is about; None for the whole

    @property
    def columns(self) -> list[Column]:
        """The base, if there is one, and the models."""
        return [*([self.base] if self.base else []), *self.models]

    @property
    def lead(self) -> Column:
        """The model that the section is shaped after."""
        return self.columns[0]


def outputs(recipe: "MergeRecipe") -> dict[str | None, OutputModule]:
    """The modules of the result; one without a name is the whole model."""
    if recipe.modules is not None:
        return dict(recipe.modules.items())
    return {None: OutputModule.model_construct(models=recipe.models, slices=recipe.slices, parameters={})}


def listed(recipe: "MergeRecipe") -> list[str]:
    """The models that are merged, in order, without what lies beside them."""
    found: list[str] = []
    for output in outputs(recipe).values():
        found += [entry.model for entry in output.models]
        found += [source.model for part in output.slices or () for source in part.sources]
    return found


def sections(recipe: "MergeRecipe") -> Iterator[Section]:
    """The sections of the result, in order."""
    for name, output in outputs(recipe).items():
        place = _place(name)
        if output.slices is None:
            yield _of_models(recipe, name, output, place)
        for i, part in enumerate(output.slices or ()):
            yield _of_slice(recipe, name, output, part, (*place, "slices", i))


def content_problems(recipe: "MergeRecipe") -> Problems:
    """What is wrong with models, slices and modules, beside their settings."""
    given = [key for key in ("models", "slices", "modules") if getattr(recipe, key)]
    if len(given) != 1:
        both = "give one of `models`, `slices` and `modules`"
        yield ("models",), f"{both}, not {' and '.join(given)}" if given else "this key is missing"
        return
    if recipe.method.one_by_one and not recipe.models:
        yield (given[0],), f"{recipe.merge_method!r} takes whole models one after the other: give `models`"
    for name, output in outputs(recipe).items():
        place = _place(name)
        if recipe.modules is not None and bool(output.models) == bool(output.slices):
            yield place, "a module must have `models` or `slices`, and not both"
        elif output.slices is None:
            yield from _model_problems(recipe, output.models, place)
        for i, part in enumerate(output.slices or ()):
            yield from _range_problems(part, (*place, "slices", i, "sources"), in_module=name is not None)
            yield from _source_problems(recipe, part, (*place, "slices", i))


def inner_parameters(recipe: "MergeRecipe") -> Iterator[tuple[Location, Mapping[str, Any], bool]]:
    """The settings in modules and slices: where, which, and whether they are those of one model."""
    for name, output in outputs(recipe).items():
        place = _place(name)
        if name is not None:
            yield (*place, "parameters"), output.parameters, False
            for i, entry in enumerate(output.models):
                yield (*place, "models", i, "parameters"), entry.parameters, True
        for i, part in enumerate(output.slices or ()):
            yield (*place, "slices", i, "parameters"), part.parameters, False
            for j, source in enumerate(part.sources):
                yield (*place, "slices", i, "sources", j, "parameters"), source.parameters, True


def slice_base(recipe: "MergeRecipe", part: OutputSlice) -> SliceSource | None:
    """The source that is the base of a slice."""
    name = part.base_model or recipe.base_model
    if recipe.method.base_model == "unused":
        return None
    return next((source for source in part.sources if source.model == name), None)


def beside_the_base(recipe: "MergeRecipe", entries: Sequence[Entry]) -> list[Entry]:
    """The models that are merged into the base, which may be listed among them, as in mergekit."""
    if recipe.method.base_model == "unused":
        return [*entries]
    return [entry for entry in entries if entry.model != recipe.base_model]


def _place(module: str | None) -> Location:
    return () if module is None else ("modules", module)


def _of_models(recipe: "MergeRecipe", name: str | None, output: OutputModule, place: Location) -> Section:
    entries = beside_the_base(recipe, output.models)
    base = Column(recipe.base_model) if recipe.base_model and recipe.method.base_model != "unused" else None
    settings = _settings(recipe, [output.parameters], entries)
    return Section((*place, "models"), base, [Column(entry.model) for entry in entries], None, settings, name)


def _of_slice(
    recipe: "MergeRecipe", name: str | None, output: OutputModule, part: OutputSlice, place: Location
) -> Section:
    base = slice_base(recipe, part)
    columns = {id(source): Column(source.model, source.layer_range[0], j) for j, source in enumerate(part.sources)}
    sources = [source for source in part.sources if source is not base]
    settings = _settings(recipe, [part.parameters, output.parameters], sources)
    models = [columns[id(source)] for source in sources]
    return Section(place, columns[id(base)] if base else None, models, part.sources[0].count, settings, name)


def _settings(
    recipe: "MergeRecipe", near: Sequence[Mapping[str, Any]], models: Sequence[PlainEntry | SliceSource]
) -> Settings:
    """The settings of a section; the near ones go before those of the recipe."""
    alias = recipe.methods()[recipe.merge_method][1]
    shared = translated(recipe.parameters, alias)
    for parameters in reversed(near):
        shared = chained(translated(parameters, alias), shared)
    return Settings(recipe.kind, shared, [translated(model.parameters, alias) for model in models])


def _model_problems(recipe: "MergeRecipe", entries: Sequence[PlainEntry], place: Location) -> Problems:
    names = [entry.model for entry in entries]
    policy = recipe.method.base_model
    for i, name in enumerate(names):
        if name in names[:i]:
            law = "each model may be listed once"
            yield (*place, "models", i, "model"), f"{law}, but {name!r} is listed twice"
    if policy == "required" and recipe.base_model is None:
        yield ("merge_method",), f"{recipe.merge_method!r} needs a base_model, but the recipe has none"
    if policy == "unused" and not place and recipe.base_model not in (None, *names):
        yield ("base_model",), f"{recipe.merge_method!r} uses no base: remove it, or list it among the models"
    low, high = recipe.method.model_counts
    if not low <= (count := len(beside_the_base(recipe, entries))) <= high:
        found = f"but the recipe has {count} beside the base"
        yield (*place, "models"), f"{recipe.merge_method!r} merges from {low} to {high} models, {found}"


def _range_problems(part: OutputSlice, place: Location, *, in_module: bool) -> Problems:
    for j, source in enumerate(part.sources):
        first, end = source.layer_range
        nothing = in_module and first == end == 0  # of a module without layers
        if not (0 <= first < end or nothing):
            law = "must be [first, end) with 0 <= first < end"
            yield (*place, j, "layer_range"), f"{law}, but is [{first}, {end}]"
        elif source.count != part.sources[0].count:
            law = f"all sources of a slice must have as many layers, {part.sources[0].count} as the first"
            yield (*place, j, "layer_range"), f"{law}, but [{first}, {end}] are {source.count}"
        if (source.model, source.layer_range) in [(s.model, s.layer_range) for s in part.sources[:j]]:
            yield (*place, j), f"the same layers of {source.model!r} are listed twice"


def _source_problems(recipe: "MergeRecipe", part: OutputSlice, place: Location) -> Problems:
    base, name = slice_base(recipe, part), part.base_model or recipe.base_model
    if recipe.method.base_model == "required" and name is None:
        yield place, f"{recipe.merge_method!r} needs a base_model, but the recipe has none"
    elif recipe.method.base_model != "unused" and name is not None and base is None:
        yield (*place, "sources"), f"the base, {name!r}, must be listed among the sources, with its layers"
    low, high = recipe.method.model_counts
    if not low <= (count := len(part.sources) - (base is not None)) <= high:
        law = f"{recipe.merge_method!r} merges from {low} to {high} models"
        yield (*place, "sources"), f"{law}, but the slice has {count} beside the base"
