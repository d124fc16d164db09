"""The parts of a recipe: models, slices of layers, modules, and whose tokenizer with which tokens."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator

# The keys of a model that name what a method needs beside its weights.
COMPANIONS = ("fisher", "forget", "activations", "state")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, data: Any) -> Any:
        """A key without a value is as good as none."""
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}


class WithAdapter(Strict):
    """What names a model: `model: base+adapter`, or `adapter` as a key beside `model`."""

    model: str = Field(
        min_length=1,
        description="A folder, or a Hub repository as `name` or `name@revision`; with an adapter, `model+adapter`.",
    )

    @model_validator(mode="before")
    @classmethod
    def _join(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "adapter" not in data:
            return data
        model, adapter = data.get("model"), data["adapter"]
        if not (isinstance(model, str) and isinstance(adapter, str) and adapter):
            raise ValueError(f"`adapter` must be a folder or a Hub repository beside a `model`, but got {adapter!r}")
        return {key: value for key, value in data.items() if key != "adapter"} | {"model": f"{model}+{adapter}"}


class PlainEntry(WithAdapter):
    """One of the models to merge, by its weights alone."""

    parameters: dict[str, Any] = Field(default={}, description="The settings of this model, such as `weight`.")


class ModelEntry(PlainEntry):
    """One of the models to merge."""

    fisher: str | None = Field(
        default=None, min_length=1, description="A folder or repository with the model's Fisher information."
    )
    forget: str | None = Field(default=None, min_length=1, description="The same on what the model is to forget.")
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


class SliceSource(WithAdapter):
    """Some layers of a model."""

    layer_range: tuple[StrictInt, StrictInt] = Field(description="The first layer, and the one behind the last.")
    parameters: dict[str, Any] = Field(default={}, description="The settings of this model in this slice.")

    @property
    def count(self) -> int:
        """How many layers."""
        return self.layer_range[1] - self.layer_range[0]


class OutputSlice(Strict):
    """Consecutive layers of the result, each merged from one layer of each source."""

    sources: list[SliceSource] = Field(min_length=1, description="Layers of models, as many of each.")
    base_model: str | None = Field(default=None, min_length=1, description="The base of this slice, a source.")
    parameters: dict[str, Any] = Field(default={}, description="The settings in this slice.")


class OutputModule(Strict):
    """A part of the result, such as an encoder, merged in its own way."""

    models: list[PlainEntry] = Field(default=[], min_length=1, description="The models to merge, in order.")
    slices: list[OutputSlice] | None = Field(
        default=None, min_length=1, description="The layers of the module, in order, in the place of `models`."
    )
    parameters: dict[str, Any] = Field(default={}, description="The settings in this module.")


class TokenOrigin(Strict):
    """Where the embedding of a token comes from, if not from a model's token of the same name."""

    kind: Literal["zero", "model_token"] = Field(description="Zeros, or the embedding of another token.")
    model: str | None = Field(default=None, min_length=1, description="The model that has the other token.")
    token: str | None = Field(default=None, description="The other token.")
    token_id: StrictInt | None = Field(default=None, ge=0, description="The same by its number.")

    @model_validator(mode="after")
    def _check(self) -> "TokenOrigin":
        named = (self.token is not None) + (self.token_id is not None)
        if self.kind == "zero" and (named or self.model is not None):
            raise ValueError("`kind: zero` needs nothing else")
        if self.kind == "model_token" and (named != 1 or self.model is None):
            raise ValueError("`kind: model_token` needs a `model`, and a `token` or a `token_id`")
        return self


class TokenChoice(Strict):
    """The embedding of a token."""

    source: str | TokenOrigin | None = Field(default=None, description="A model, zeros, or another token of a model.")
    force: bool = Field(default=False, description="Also in models that have an embedding of their own.")

    @property
    def model(self) -> str | None:
        """The model that the embedding comes from."""
        return self.source.model if isinstance(self.source, TokenOrigin) else self.source


class TokenizerChoice(Strict):
    """Whose tokenizer the merged model gets, with which tokens."""

    source: str = Field(default="union", min_length=1, description="`base`, `union`, or one of the models.")
    tokens: dict[str, TokenChoice] = Field(default={}, description="Tokens, added where they are not there.")
    pad_to_multiple_of: StrictInt | None = Field(default=None, ge=1, description="Of the number of embeddings.")
