"""Merging adapters into adapters, and extracting them from fine-tuned models. Everything is loaded on first use."""

from typing import TYPE_CHECKING

from hf_modular._lazy import attributes

if TYPE_CHECKING:
    from hf_modular.adapter_merging._extract import extract_adapter
    from hf_modular.adapter_merging._folders import merge_adapter_files
    from hf_modular.adapter_merging._merge import merge_adapters
    from hf_modular.adapter_merging._new_task import add_task
    from hf_modular.adapter_merging._recipe import AdapterRecipe
    from hf_modular.adapter_merging._report import AdapterReport
    from hf_modular.adapter_merging._rmm_config import RMMConfig

_HOME = {
    "AdapterRecipe": "_recipe",
    "AdapterReport": "_report",
    "RMMConfig": "_rmm_config",
    "add_task": "_new_task",
    "extract_adapter": "_extract",
    "merge_adapter_files": "_folders",
    "merge_adapters": "_merge",
}

__all__ = [
    "AdapterRecipe",
    "AdapterReport",
    "RMMConfig",
    "add_task",
    "extract_adapter",
    "merge_adapter_files",
    "merge_adapters",
]


__getattr__ = attributes(__name__, _HOME)


def __dir__() -> list[str]:
    return __all__
