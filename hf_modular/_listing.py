"""All methods with their settings, read off the dataclasses that define them."""

from collections.abc import Iterator
from dataclasses import MISSING, Field, asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Setting:
    name: str
    default: Any
    help: str
    law: str | None = None  # the interval that a number must be in
    per_model: bool = False  # whether a recipe may give each model its own value


@dataclass(frozen=True)
class Method:
    family: str  # "adapter" or "merge"
    name: str
    config: str  # its class in hf_modular
    summary: str
    settings: list[Setting]
    also_called: list[str]  # mergekit's names

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """For people."""
        also = f" ({', '.join(self.also_called)} in mergekit)" if self.also_called else ""
        yield f"{self.name}{also}: {self.summary}"
        for setting in self.settings:
            law = f" In {setting.law}." if setting.law else ""
            each = " Each model may have its own." if setting.per_model else ""
            yield f"    {setting.name}={setting.default!r}: {setting.help}{law}{each}"


def merge_methods() -> list[Method]:
    from hf_modular.adapter_merging import RMMConfig
    from hf_modular.merging import METHODS
    from hf_modular.merging._method import MergeSettings

    configs: list[type[MergeSettings]] = [*METHODS.values(), RMMConfig]  # the last one is for adapters only
    return [_method("merge", config.name, config, MergeSettings, list(config.aliases)) for config in configs]


def adapter_methods() -> list[Method]:
    from hf_modular.adapters import METHODS, AdapterConfig

    return [_method("adapter", name, config, AdapterConfig, []) for name, (config, _) in METHODS.items()]


def _method(family: str, name: str, config: type[Any], common: type[Any], also_called: list[str]) -> Method:
    """Settings are the fields beside those that all methods of the family have, such as PEFT's own."""
    shared = {f.name for f in fields(common)}
    own = [_setting(f) for f in fields(config) if f.name not in shared]
    return Method(family, name, config.__name__, (config.__doc__ or "").strip().splitlines()[0], own, also_called)


def _setting(f: Field[Any]) -> Setting:
    default = f.default if f.default_factory is MISSING else f.default_factory()
    meta = f.metadata
    return Setting(f.name, default, meta.get("help", ""), meta.get("law"), bool(meta.get("per_model")))
