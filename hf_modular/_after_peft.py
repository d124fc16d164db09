"""Registering the adapter types at the right moment: when PEFT is imported, be it before this package or after it."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_after_peft() -> None:
    """Register the adapter types now if PEFT is loaded, else right after it will be."""
    peft = sys.modules.get("peft")
    waiting = any(isinstance(finder, _AfterPeft) for finder in sys.meta_path)
    if peft is not None and not (waiting and _is_half_loaded(peft)):
        _register()
    elif not waiting:
        sys.meta_path.insert(0, _AfterPeft())


def _is_half_loaded(module: ModuleType) -> bool:
    """Whether it is being imported, so that whoever asks is something that it imports."""
    return getattr(module.__spec__, "_initializing", False)


def _register() -> None:
    try:
        importlib.import_module("hf_modular.adapters")
    except ImportError as error:  # a program that only uses PEFT must not break because of us
        warnings.warn(f"hf_modular could not register its adapter types: {error}", RuntimeWarning, stacklevel=2)


class _AfterPeft(MetaPathFinder):
    """Finds `peft` as everybody else does, and has its loader register our types when it is done.

    It stays until PEFT is imported: libraries also ask for its spec only to see whether it is installed.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next((found for f in others if (found := f.find_spec(fullname, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader, self)
        return spec


class _ThenRegister(Loader):
    def __init__(self, loader: Loader, finder: MetaPathFinder) -> None:
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader  # PEFT keeps its own loader for whoever asks for it later
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        _register()
