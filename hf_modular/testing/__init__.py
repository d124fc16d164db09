"""The contracts that every method must keep, as test classes to inherit; for methods of other packages too."""

from typing import TYPE_CHECKING

from hf_modular._lazy import attributes

if TYPE_CHECKING:
    from hf_modular.testing._adapters import (
        ALL_LAYERS,
        CONV_LAYERS,
        EMBEDDINGS,
        LINEAR_LAYERS,
        NORMS,
        WEIGHT_MATRICES,
        AdapterCase,
        AdapterContract,
        LayerKind,
    )
    from hf_modular.testing._merging import MergeCase, MergeContract

# Loaded on first use: the contract of one family does not need what the other one does.
_HOME = {
    "ALL_LAYERS": "_adapters",
    "CONV_LAYERS": "_adapters",
    "EMBEDDINGS": "_adapters",
    "LINEAR_LAYERS": "_adapters",
    "NORMS": "_adapters",
    "WEIGHT_MATRICES": "_adapters",
    "AdapterCase": "_adapters",
    "AdapterContract": "_adapters",
    "LayerKind": "_adapters",
    "MergeCase": "_merging",
    "MergeContract": "_merging",
}

__all__ = [
    "ALL_LAYERS",
    "CONV_LAYERS",
    "EMBEDDINGS",
    "LINEAR_LAYERS",
    "NORMS",
    "WEIGHT_MATRICES",
    "AdapterCase",
    "AdapterContract",
    "LayerKind",
    "MergeCase",
    "MergeContract",
]


__getattr__ = attributes(__name__, _HOME)


def __dir__() -> list[str]:
    return __all__
