"""A merge as a file: mergekit's YAML format, read strictly.

Unknown keys, unknown or impossible values, and keys of mergekit that this library does not have yet are refused with
their line; nothing is ignored. A setting may be a value, a list of numbers that is interpolated over the depth of the
model, or a list of values each with a `filter` on tensor names.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property, partial
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, model_validator

from hf_modular.merging._method import Alias, MergeMethod, MergeSettings, check_setting
from hf_modular.merging._settings import IGNORED, Settings, known, translated, word
from hf_modular.merging._yaml import Document, Location, read, spelled

DTypeName = Literal["float32", "bfloat16", "float16", "float64"]
Problems = Iterator[tuple[Location, str]]

COMPANIONS = ("fisher", "activations", "state")  # the keys of a model that name what a method needs beside its weights

_NOT_YET = {
    "slices": "stacking layers",
    "modules": "merging the modules of a model apart",
    "adapter": "merging base + adapter",
    "tokens": "choosing the embeddings of single tokens",
    "pad_to_multiple_of": "padding the vocabulary",
}


class RecipeError(ValueError):
    """What is wrong in a recipe, and where."""

    def __init__(self, problems: Iterable[tuple[Location, str]]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(f"{spelled(place)}: {message}" for place, message in self.problems))


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelEntry(_Strict):
    """One of the models to merge."""

    model: str = Field(min_length=1, description="A folder, or a Hub repository as `name` or `name@revision`.")
    parameters: dict[str, Any] = Field(default={}, description="The settings of this model, such as `weight`.")
    fisher: str | None = Field(
        default=None, min_length=1, description="A folder or repository with the model's Fisher information."
    )
    activations: str | None = Field(
        default=None, min_length=1, description="A folder or repository with the sizes of the model's activations."
    )
    state: str | None = Field(
        default=None, min_length=1, description="A folder with what a step of a method has to go on from."
    )

    @property
    def references(self) -> dict[str, str]:
        """The keys that name folders or repositories."""
        return {key: name for key in ("model", *COMPANIONS) if (name := getattr(self, key))}


class TokenizerChoice(_Strict):
    """Whose tokenizer the merged model gets."""

    source: str = Field(min_length=1, description="`base`, or one of the models.")


class Recipe(_Strict):
    """What the recipes of all kinds of merges have in common."""

    merge_method: str = Field(description="The method's name, or mergekit's name for it.")
    base_model: str | None = Field(default=None, min_length=1, description="What the models were fine-tuned from.")
    models: list[ModelEntry] = Field(min_length=1, description="The models to merge, in order.")
    parameters: dict[str, Any] = Field(default={}, description="The method's settings, or those of all models.")

    @classmethod
    def methods(cls) -> Mapping[str, tuple[type[MergeSettings], Alias]]:
        """The methods by the names that may be given for them."""
        return known()

    @classmethod
    def of(
        cls,
        method: MergeSettings,
        models: Sequence[str | Path],
        base_model: str | Path | None = None,
        weights: Sequence[float] | None = None,
        **more: Any,
    ) -> Self:
        """A recipe from a method's settings; `more` are further keys of a recipe."""
        weights = [1.0] * len(models) if weights is None else weights
        entries = [
            {"model": str(model), "parameters": {"weight": weight}}
            for model, weight in zip(models, weights, strict=True)
        ]
        settings = method.to_dict()
        base = {} if base_model is None else {"base_model": str(base_model)}
        name = {"merge_method": settings.pop("merge_method")}
        return cls.load(name | base | {"models": entries, "parameters": settings} | more)

    @classmethod
    def load(cls, recipe: "str | Path | Mapping[str, Any] | Recipe") -> Self:
        """A recipe from a file, a dictionary, or a recipe as it is."""
        if isinstance(recipe, cls):
            return recipe
        path = isinstance(recipe, (str, Path))
        document = read(Path(recipe)) if path else Document("the recipe", recipe)  # type: ignore[arg-type]
        try:
            return cls.model_validate(document.data)
        except ValidationError as error:
            problems = [document.place(*problem) for problem in _problems(error, cls)]
        raise ValueError(f"{document.name} cannot be used:\n" + "\n".join(f"  - {line}" for line in problems))

    @property
    def task_models(self) -> list[ModelEntry]:
        """The models that are merged into the base."""
        return self.models

    @cached_property
    def kind(self) -> MergeSettings:
        """The method, with the defaults of the name by which the recipe calls it."""
        kind, alias = self.methods()[self.merge_method]
        return kind(**alias.defaults)

    @cached_property
    def settings(self) -> Settings:
        alias = self.methods()[self.merge_method][1]
        models = [translated(entry.parameters, alias) for entry in self.task_models]
        return Settings(self.kind, translated(self.parameters, alias), models)

    def problems(self) -> Problems:
        """What is wrong beside the kinds of values; the method is known."""
        yield from _parameter_problems(self, self.parameters, ("parameters",))
        for i, entry in enumerate(self.models):
            yield from _parameter_problems(self, entry.parameters, ("models", i, "parameters"))

    @model_validator(mode="after")
    def _check(self) -> Self:
        if problems := [*_recipe_problems(self)]:
            raise RecipeError(problems)
        return self


class MergeRecipe(Recipe):
    """What to merge and how; the keys of a recipe file.

    Read one with `MergeRecipe.load`, or make one from a method's settings with `MergeRecipe.of`.
    """

    dtype: DTypeName | None = Field(default=None, description="The same as `out_dtype`, which goes first.")
    out_dtype: DTypeName | None = Field(
        default=None, description="The dtype of the result, the base's by default; arithmetic is always fp32 or wider."
    )
    tokenizer_source: str | None = Field(default=None, description="`base`, or one of the models.")
    tokenizer: TokenizerChoice | None = Field(default=None, description="The same as `tokenizer_source`.")
    chat_template: str | None = Field(default=None, description="A Jinja template for the merged model.")
    seed: StrictInt = Field(default=0, ge=0, lt=2**64, description="For methods that draw random numbers.")
    state: str | None = Field(
        default=None,
        min_length=1,
        description="A folder in which a method that takes the models one by one keeps what it knows of them.",
    )

    def to_yaml(self) -> str:
        """The recipe as a file that `load` reads."""
        import yaml

        content = self.model_dump(exclude_defaults=True) | {"seed": self.seed}
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)

    def renamed(self, names: Mapping[str, str]) -> Self:
        """The same recipe with other references to the same models."""
        models = [
            entry.model_copy(update={key: names[name] for key, name in entry.references.items()})
            for entry in self.models
        ]
        changes: dict[str, Any] = {"models": models, "base_model": names.get(self.base_model or "", self.base_model)}
        if self.tokenizer_source:
            changes["tokenizer_source"] = names.get(self.tokenizer_source, self.tokenizer_source)
        if self.tokenizer:
            source = names.get(self.tokenizer.source, self.tokenizer.source)
            changes["tokenizer"] = TokenizerChoice(source=source)
        return self.model_copy(update=changes)

    @property
    def task_models(self) -> list[ModelEntry]:
        """The models that are merged into the base, which may be listed among them, as in mergekit."""
        if self.method.base_model == "unused":
            return self.models
        return [entry for entry in self.models if entry.model != self.base_model]

    @property
    def companions(self) -> dict[str, list[str]]:
        """What there is beside the weights of the models, where."""
        given = {kind: [getattr(entry, kind) for entry in self.task_models] for kind in COMPANIONS}
        return {kind: [name for name in names if name] for kind, names in given.items() if any(names)}

    @property
    def reference_model(self) -> str:
        """The model that the result is shaped after: the base, or the first model."""
        return self.base_model or self.models[0].model

    @property
    def tokenizer_model(self) -> str:
        """The model whose tokenizer the result gets."""
        chosen = self.tokenizer.source if self.tokenizer else self.tokenizer_source
        return self.reference_model if chosen in (None, "base") else chosen

    @property
    def result_dtype(self) -> DTypeName | None:
        return self.out_dtype or self.dtype

    @property
    def method(self) -> MergeMethod:
        return cast(MergeMethod, self.kind)

    def problems(self) -> Problems:
        yield from _model_problems(self)
        yield from _tokenizer_problems(self)
        yield from super().problems()


def _recipe_problems(recipe: Recipe) -> Problems:
    names = recipe.methods()
    if recipe.merge_method in names:
        yield from recipe.problems()
        return
    near = difflib.get_close_matches(recipe.merge_method, names, n=1)
    hint = f": did you mean {near[0]!r}?" if near else ""
    yield ("merge_method",), f"there is no method {recipe.merge_method!r}, there are {sorted(names)}{hint}"


def _model_problems(recipe: MergeRecipe) -> Problems:
    names = [entry.model for entry in recipe.models]
    policy = recipe.method.base_model
    for i, name in enumerate(names):
        if name in names[:i]:
            yield ("models", i, "model"), f"each model may be listed once, but {name!r} is listed twice"
    if policy == "required" and recipe.base_model is None:
        yield ("merge_method",), f"{recipe.merge_method!r} needs a base_model, but the recipe has none"
    if policy == "unused" and recipe.base_model not in (None, *names):
        yield ("base_model",), f"{recipe.merge_method!r} uses no base: remove it, or list it among the models"
    low, high = recipe.method.model_counts
    if not low <= len(recipe.task_models) <= high:
        found = f"but the recipe has {len(recipe.task_models)} beside the base"
        yield ("models",), f"{recipe.merge_method!r} merges from {low} to {high} models, {found}"


def _tokenizer_problems(recipe: MergeRecipe) -> Problems:
    if recipe.tokenizer and recipe.tokenizer_source:
        yield ("tokenizer_source",), "give `tokenizer` or `tokenizer_source`, not both"
    place: Location = ("tokenizer", "source") if recipe.tokenizer else ("tokenizer_source",)
    models = {recipe.reference_model, *(entry.model for entry in recipe.models)}
    if recipe.tokenizer_model == "union":
        yield place, "merging vocabularies ('union') is not supported yet: choose 'base' or one of the models"
    elif recipe.tokenizer_model not in models:
        yield place, f"the tokenizer must be 'base' or one of {sorted(models)}, but got {recipe.tokenizer_model!r}"
    if recipe.chat_template is not None and not re.search(r"\{[{%]", recipe.chat_template):
        yield ("chat_template",), f"must be Jinja text; names such as {recipe.chat_template!r} are not supported yet"


def _parameter_problems(recipe: Recipe, parameters: Mapping[str, Any], place: Location) -> Problems:
    alias = recipe.methods()[recipe.merge_method][1]
    laws = {f.name: f.metadata for f in fields(recipe.kind)} | {"weight": {"per_model": True}}
    renamed = {ours for ours, _ in alias.keys.values()} - alias.keys.keys()
    for key, value in parameters.items():
        ours, convert = word(key, alias)
        if key in IGNORED:
            continue
        if ours not in laws or key in renamed:
            allowed = sorted(laws.keys() - renamed | alias.keys.keys())
            yield (*place, key), f"{recipe.merge_method!r} has no setting {key!r}, it has {allowed}"
        elif place[0] == "models" and not laws[ours].get("per_model"):
            yield (*place, key), f"{key!r} cannot differ between models: put it under the recipe's `parameters`"
        else:
            check = partial(_refusal, recipe.kind, ours, convert)
            yield from _setting_problems(value, (*place, key), check)


def _setting_problems(setting: Any, place: Location, check: Callable[[Any], str | None]) -> Problems:
    """What is wrong with a value, a gradient or filtered values."""
    if isinstance(setting, dict):
        if setting.keys() - {"filter"} != {"value"} or not isinstance(setting.get("filter"), (str, NoneType)):
            yield place, f"must have a `value` and may have a text as `filter`, but got {setting!r:.200}"
        else:
            yield from _setting_problems(setting["value"], (*place, "value"), check)
    elif isinstance(setting, list):
        kinds = {type(part) for part in setting}
        if not kinds or list in kinds or (dict in kinds and len(kinds) > 1):
            yield place, f"a list must hold values only, or filtered values only, but got {setting!r:.200}"
        for i, part in enumerate(setting):
            yield from _setting_problems(part, (*place, i), check)
    elif message := check(setting):
        yield place, message


def _refusal(method: MergeSettings, ours: str, convert: Callable[[Any], Any], value: Any) -> str | None:
    """What the method has against a single value."""
    try:
        if ours == "weight":
            check_setting("weight", value, float)
        else:
            replace(method, **{ours: convert(value)})
    except KeyError:
        return f"{value!r} is not one of the allowed values"
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def _problems(error: ValidationError, kind: type[Recipe]) -> Problems:
    """Pydantic's findings, in our words where its own say too little."""
    for found in error.errors():
        cause = found.get("ctx", {}).get("error")
        if isinstance(cause, RecipeError):
            yield from cause.problems
        elif found["type"] == "extra_forbidden":
            yield found["loc"], _unknown(found["loc"], kind)
        elif found["type"] == "missing":
            yield found["loc"], "this key is missing"
        else:
            yield found["loc"], f"{found['msg']}, but got {found['input']!r:.200}"


def _unknown(place: Location, recipe: type[Recipe]) -> str:
    if place[-1] in _NOT_YET:
        return f"{_NOT_YET[str(place[-1])]} is not supported yet"
    kinds: dict[str, type[BaseModel]] = {"models": ModelEntry, "tokenizer": TokenizerChoice}
    kind = kinds.get(str(place[0]), recipe)
    return f"there is no such key, there are {sorted(kind.model_fields)}"
