"""A merge as a file: mergekit's YAML format, read strictly.

Unknown keys, unknown or impossible values, and keys of mergekit that this library does not have are refused with their
line; nothing is ignored. A setting may be a value, a list of numbers that is interpolated over the depth of the
model, or a list of values each with a `filter` on tensor names.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property, partial
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Self, cast

from pydantic import BaseModel, Field, StrictInt, ValidationError, model_validator

from hf_modular.merging._method import Alias, MergeMethod, MergeSettings, check_setting
from hf_modular.merging.recipes._chat_templates import NAMED, is_template
from hf_modular.merging.recipes._entries import (
    COMPANIONS,
    ModelEntry,
    OutputModule,
    OutputSlice,
    PlainEntry,
    SliceSource,
    Strict,
    TokenChoice,
    TokenizerChoice,
)
from hf_modular.merging.recipes._sections import (
    Section,
    beside_the_base,
    content_problems,
    inner_parameters,
    listed,
    sections,
)
from hf_modular.merging.recipes._settings import IGNORED, Settings, known, translated, word
from hf_modular.merging.recipes._yaml import Document, Location, read, spelled

DTypeName = Literal["float32", "bfloat16", "float16", "float64"]
Problems = Iterator[tuple[Location, str]]

_REFERENCES = {"model", "base_model", "source", "tokenizer_source", "heads", "chat_template", *COMPANIONS}

# Settings of mergekit's methods, which it takes for these, too, without effect.
_PASSED_OVER = {"density", "epsilon", "gamma", "lambda", "normalize", "rescale", "select_topk", "t", "weight"}
_OF_MERGEKIT = {
    *("linear", "slerp", "nuslerp", "multislerp", "karcher", "task_arithmetic", "sce", "model_stock", "nearswap"),
    *("arcee_fusion", "passthrough"),
}

_REFUSED = {  # keys of mergekit
    "residual_weight": "mergekit reads this key and does nothing with it: remove it",
    "layer_range": "a range of layers is given under `slices`, for each of the `sources`",
}


class RecipeError(ValueError):
    """What is wrong in a recipe, and where."""

    def __init__(self, problems: Iterable[tuple[Location, str]]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(f"{spelled(place)}: {message}" for place, message in self.problems))


class Recipe(Strict):
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
            found = cls.model_validate(document.data)
            found.__dict__["document"] = document
            return found
        except ValidationError as error:
            problems = [document.place(*problem) for problem in _problems(error, cls)]
        raise ValueError(f"{document.name} cannot be used:\n" + "\n".join(f"  - {line}" for line in problems))

    @cached_property
    def document(self) -> Document:
        """Where the recipe comes from, so that what is wrong can be named with its line."""
        return Document("the recipe", {})

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
            yield from _parameter_problems(self, entry.parameters, ("models", i, "parameters"), per_model=True)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if problems := [*_recipe_problems(self)]:
            raise RecipeError(problems)
        return self


class MergeRecipe(Recipe):
    """What to merge and how; the keys of a recipe file.

    Read one with `MergeRecipe.load`, or make one from a method's settings with `MergeRecipe.of`.
    """

    models: list[ModelEntry] = Field(default=[], min_length=1, description="The models to merge, in order.")
    slices: list[OutputSlice] | None = Field(
        default=None, min_length=1, description="The layers of the result, in order, in the place of `models`."
    )
    modules: dict[str, OutputModule] | None = Field(
        default=None, min_length=1, description="What each module of the model is merged of, in the place of both."
    )
    dtype: DTypeName | None = Field(
        default=None,
        description="The dtype of the result where `out_dtype` does not say it, and of the arithmetic if it is "
        "`float64`. Else that is in fp64 for averages and task arithmetic, and in fp32 for the other methods, after "
        "which about 1 in 7,000 results in bf16 is one unit in the last place from the exact value rounded.",
    )
    out_dtype: DTypeName | None = Field(default=None, description="The dtype of the result, the base's by default.")
    tokenizer_source: str | None = Field(
        default=None,
        min_length=1,
        description="Whose tokenizer the result gets: `base`, `union`, or one of the models.",
    )
    tokenizer: TokenizerChoice | None = Field(default=None, description="The same in detail.")
    vocab: Literal["error", "truncate", "pad"] = Field(
        default="error", description="What to do with vocabularies of different sizes when no tokenizer is chosen."
    )
    heads: str = Field(
        default="error", min_length=1, description="`base`, or one of the models, whose head the result gets."
    )
    chat_template: str | None = Field(
        default=None, min_length=1, description="A Jinja template, its name, one of the models, or `auto`."
    )
    base_precision: Literal["original", "dequantized"] | None = Field(
        default=None, description="Whether models may be quantised ones, which are then dequantised."
    )
    adapter_base: Literal["same", "any"] = Field(
        default="same", description="Whether adapters must have been trained on the model that they are given with."
    )
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
        plain = _renamed(self.model_dump(exclude_unset=True, exclude={"parameters"}), names)
        return type(self).load(plain | {"parameters": self.parameters} if self.parameters else plain)

    @property
    def references(self) -> list[str]:
        """All folders and repositories that the recipe names, each once, the reference model first."""
        entries = [name for entry in self.models for name in entry.references.values()]
        return [*dict.fromkeys([self.reference_model, *entries, *listed(self)])]

    @cached_property
    def sections(self) -> list[Section]:
        """What is merged with what: all models, the sources of each slice, or those of each module."""
        return [*sections(self)]

    @property
    def task_models(self) -> list[ModelEntry]:
        """The models that are merged into the base, which may be listed among them, as in mergekit."""
        return beside_the_base(self, self.models)

    @property
    def companions(self) -> dict[str, list[str]]:
        """What there is beside the weights of the models, where."""
        given = {kind: [getattr(entry, kind) for entry in self.task_models] for kind in COMPANIONS}
        return {kind: [name for name in names if name] for kind, names in given.items() if any(names)}

    @property
    def reference_model(self) -> str:
        """The model that the result is shaped after: the base, or the first model."""
        if self.base_model:
            return self.base_model
        return listed(self)[0]

    @property
    def tokenizer_choice(self) -> TokenizerChoice | None:
        """What the recipe says of the tokenizer."""
        return TokenizerChoice(source=self.tokenizer_source) if self.tokenizer_source else self.tokenizer

    @property
    def tokenizer_model(self) -> str:
        """The model whose tokenizer the result gets, or begins with."""
        source = self.tokenizer_choice.source if self.tokenizer_choice else "base"
        return self.reference_model if source in ("base", "union") else source

    @property
    def result_dtype(self) -> DTypeName | None:
        return self.out_dtype or self.dtype

    @property
    def in_fp64(self) -> bool:
        """Whether the arithmetic is to be in fp64, whatever the dtype of the result."""
        return self.dtype == "float64"

    @property
    def method(self) -> MergeMethod:
        return cast(MergeMethod, self.kind)

    def problems(self) -> Problems:
        yield from (problems := [*content_problems(self)])
        if problems and problems[0][0] == ("models",) and not self.models:
            return
        yield from _tokenizer_problems(self)
        yield from super().problems()
        for place, parameters, per_model in inner_parameters(self):
            yield from _parameter_problems(self, parameters, place, per_model=per_model)


def _recipe_problems(recipe: Recipe) -> Problems:
    names = recipe.methods()
    if recipe.merge_method in names:
        yield from recipe.problems()
        return
    near = difflib.get_close_matches(recipe.merge_method, names, n=1)
    hint = f": did you mean {near[0]!r}?" if near else ""
    yield ("merge_method",), f"there is no method {recipe.merge_method!r}, there are {sorted(names)}{hint}"


def _tokenizer_problems(recipe: MergeRecipe) -> Problems:
    if recipe.tokenizer and recipe.tokenizer_source:
        yield ("tokenizer_source",), "give `tokenizer` or `tokenizer_source`, not both"
    choice = recipe.tokenizer_choice
    if choice and recipe.vocab != "error":
        yield ("vocab",), "a tokenizer decides which rows the embeddings have: give one of the two"
    models = {recipe.reference_model, *listed(recipe)}
    place: Location = ("tokenizer", "source") if recipe.tokenizer else ("tokenizer_source",)
    if choice and choice.source not in {"base", "union", *models}:
        allowed = f"'base', 'union' or one of {sorted(models)}"
        yield place, f"the tokenizer must be {allowed}, but got {choice.source!r}"
    for token, origin in choice.tokens.items() if choice else ():
        if origin.model is not None and origin.model not in models:
            law = f"the embedding must come from one of {sorted(models)}"
            yield ("tokenizer", "tokens", token), f"{law}, but got {origin.model!r}"
    if recipe.heads not in {"error", "base", *models}:
        yield ("heads",), f"must be 'error', 'base' or one of {sorted(models)}, but got {recipe.heads!r}"
    if (wanted := recipe.chat_template) and not (is_template(wanted) or wanted in {"auto", *NAMED, *models}):
        known = f"Jinja text, 'auto', one of {sorted(NAMED)}, or one of {sorted(models)}"
        yield ("chat_template",), f"must be {known}, but got {wanted!r:.200}"


def _renamed(content: Any, names: Mapping[str, str]) -> Any:
    """What a recipe holds, with other references in all places where models are named."""
    if isinstance(content, list):
        return [_renamed(part, names) for part in content]
    if not isinstance(content, dict):
        return content
    return {
        key: names.get(value, value)
        if key in _REFERENCES and isinstance(value, str)
        else value
        if key == "parameters"
        else _renamed(value, names)
        for key, value in content.items()
    }


def _parameter_problems(
    recipe: Recipe, parameters: Mapping[str, Any], place: Location, *, per_model: bool = False
) -> Problems:
    alias = recipe.methods()[recipe.merge_method][1]
    laws = {f.name: f.metadata for f in fields(recipe.kind)} | {"weight": {"per_model": True}}
    renamed = {ours for ours, _ in alias.keys.values()} - alias.keys.keys()
    for key, value in parameters.items():
        ours, convert = word(key, alias)
        if key in IGNORED:
            continue
        if ours not in laws or key in renamed:
            allowed = sorted(laws.keys() - renamed | alias.keys.keys())
            idle = key in _PASSED_OVER and recipe.merge_method in _OF_MERGEKIT
            hint = "; mergekit passes over it, so remove it" if idle else ""
            yield (*place, key), f"{recipe.merge_method!r} has no setting {key!r}, it has {allowed}{hint}"
        elif per_model and not laws[ours].get("per_model"):
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
    if place[-1] in _REFUSED:
        return _REFUSED[str(place[-1])]
    models: type[BaseModel] = ModelEntry
    if place[0] == "modules" and len(place) > 2:
        place, models, recipe = place[2:], PlainEntry, OutputModule  # type: ignore[assignment]
    kinds: dict[str, type[BaseModel]] = {"models": models, "tokenizer": TokenizerChoice, "slices": OutputSlice}
    kind = (
        SliceSource if "sources" in place else TokenChoice if "tokens" in place else kinds.get(str(place[0]), recipe)
    )
    return f"there is no such key, there are {sorted(kind.model_fields)}"
