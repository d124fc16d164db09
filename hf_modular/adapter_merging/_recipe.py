"""Merges of adapters as files: the recipes of `hf_modular.merging` with what adapters need."""

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

from peft import LoraConfig, PeftConfig
from pydantic import Field, StrictFloat, StrictInt

from hf_modular.adapter_merging._merge import WARN_ABOVE, Options
from hf_modular.adapter_merging._rmm_config import RMMConfig
from hf_modular.adapters import FLoRAConfig, HUTConfig, SSFConfig
from hf_modular.merging._method import Alias, MergeSettings
from hf_modular.merging.recipes._entries import COMPANIONS, ModelEntry
from hf_modular.merging.recipes._recipe import Problems, Recipe
from hf_modular.merging.recipes._yaml import Location

_TYPES = {"LORA": LoraConfig, "HFM_FLORA": FLoRAConfig, "HFM_HUT": HUTConfig, "HFM_SSF": SSFConfig}


class AdapterEntry(ModelEntry):
    """One of the adapters to merge."""

    task: str | None = Field(
        default=None, min_length=1, description="With `rmm` the name of its task, the last part of its own by default."
    )

    @property
    def task_name(self) -> str:
        return self.task or re.split(r"[\\/]", self.model.rstrip("/\\"))[-1].partition("@")[0]


class AdapterRecipe(Recipe):
    """What adapters to merge and how; the keys of a recipe file.

    Its models are adapters: folders, or repositories of the Hub as `name` or `name@revision`. A `base_model` is only
    needed where the effect of an adapter depends on it.
    """

    models: list[AdapterEntry] = Field(min_length=1, description="The adapters to merge, in order.")  # type: ignore[assignment]
    space: Literal["weights", "parameters"] = Field(
        default="weights", description="Whether what the adapters add to the weights is merged, or their parameters."
    )
    rank: StrictInt | StrictFloat | None = Field(
        default=None, description="Of the result, or the share of the squared norm that each layer must keep."
    )
    into: dict[str, Any] | None = Field(
        default=None, description="The type of the result as `peft_type`, and its settings, if it is to be no LoRA."
    )
    warn_above: float = Field(default=WARN_ABOVE, ge=0, description="The relative error from which on to warn.")
    seed: StrictInt = Field(default=0, ge=0, lt=2**64, description="For methods that draw random numbers.")

    @classmethod
    def methods(cls) -> Mapping[str, tuple[type[MergeSettings], Alias]]:
        return {**super().methods(), RMMConfig.name: (RMMConfig, Alias())}

    @property
    def is_reversible(self) -> bool:
        """Whether all adapters are kept."""
        return isinstance(self.kind, RMMConfig)

    @cached_property
    def options(self) -> Options:
        return Options(self.space, self.rank, _config(self.into), self.seed, self.warn_above)

    def problems(self) -> Problems:
        yield from self._model_problems()
        yield from super().problems()
        if self.is_reversible:
            yield from self._reversible_problems()
        try:
            _ = self.options
        except (ValueError, TypeError) as error:
            place = "into" if self.into is not None else "rank"
            yield (place,), str(error)

    def _model_problems(self) -> Problems:
        names = [entry.model for entry in self.models]
        for i, entry in enumerate(self.models):
            if entry.model in names[:i]:
                yield ("models", i, "model"), f"each adapter may be listed once, but {entry.model!r} is listed twice"
            for key in COMPANIONS:
                if getattr(entry, key) is not None:
                    yield ("models", i, key), "an adapter comes with nothing beside it"
            if entry.task is not None and not self.is_reversible:
                yield ("models", i, "task"), f"{self.merge_method!r} keeps no tasks apart"
        low, high = self.kind.model_counts
        if not low <= len(names) <= high:
            yield ("models",), f"{self.merge_method!r} merges from {low} to {high} adapters, but got {len(names)}"

    def _reversible_problems(self) -> Problems:
        """What means nothing where adapters are kept as they are, in one result of one kind."""
        beside = {"space": "weights", "rank": None, "into": None}
        for key in (key for key, default in beside.items() if getattr(self, key) != default):
            hint = ": put it under `parameters`" if key == "rank" else ""
            yield (key,), f"{self.merge_method!r} has no {key!r} of its result{hint}"
        places: list[tuple[Location, Mapping[str, Any]]] = [(("parameters",), self.parameters)]
        places += [(("models", i, "parameters"), entry.parameters) for i, entry in enumerate(self.models)]
        for place, parameters in places:
            for key, value in parameters.items():
                if (key == "weight" and value != 1) or isinstance(value, (list, dict)):
                    what = "weighs no adapters" if key == "weight" else f"has one {key!r} for all layers"
                    yield (*place, key), f"{self.merge_method!r} {what}"

    def to_yaml(self) -> str:
        """The recipe as a file that `load` reads."""
        import yaml

        content = self.model_dump(exclude_defaults=True) | {"seed": self.seed}
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _config(into: dict[str, Any] | None) -> PeftConfig | None:
    if into is None:
        return None
    settings = dict(into)
    kind = _TYPES.get(settings.pop("peft_type", None))
    if kind is None:
        raise ValueError(f"`into` must name one of {[*_TYPES]} as its `peft_type`, but got {into}.")
    return kind(**settings)
