"""Merging adapters into adapters, and extracting them from fine-tuned models. Everything is loaded on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_modular.adapter_merging._extract import extract_adapter
    from hf_modular.adapter_merging._folders import merge_adapter_files
    from hf_modular.adapter_merging._merge import merge_adapters
    from hf_modular.adapter_merging._recipe import AdapterRecipe
    from hf_modular.adapter_merging._report import AdapterReport

_HOME = {
    "AdapterRecipe": "_recipe",
    "AdapterReport": "_report",
    "extract_adapter": "_extract",
    "merge_adapter_files": "_folders",
    "merge_adapters": "_merge",
}

__all__ = [
    "AdapterRecipe",
    "AdapterReport",
    "extract_adapter",
    "merge_adapter_files",
    "merge_adapters",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
