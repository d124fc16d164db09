"""Registering the adapter types at the right moment, and the opt-in hook that does it without an import.

`import hf_modular` registers the types as soon as PEFT is imported, whichever of the two comes first. Programs
that never import this package can be given the types too:

    python -m hf_modular.autoload enable     # in the environment's site-packages, for every program
    python -m hf_modular.autoload disable
"""

import importlib
import importlib.util
import sys
import sysconfig
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

# Run at the start of every interpreter, so it must cost nothing and survive the package being uninstalled.
_HOOK = 'import importlib.util as u; u.find_spec("hf_modular") and __import__("hf_modular")\n'


def register_after_peft() -> None:
    """Register the adapter types now if PEFT is loaded, else right after it will be."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())


def _register() -> None:
    try:
        importlib.import_module("hf_modular.adapters")
    except ImportError as error:  # a program that only uses PEFT must not break because of us
        warnings.warn(f"hf_modular could not register its adapter types: {error}", RuntimeWarning, stacklevel=2)


class _AfterPeft(MetaPathFinder):
    """Finds `peft` as everybody else does, and has its loader register our types when it is done."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("peft")
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader  # PEFT keeps its own loader for whoever asks for it later
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register()


def hook_file() -> Path:
    """Where the hook lies when it is enabled."""
    return Path(sysconfig.get_paths()["purelib"]) / "hf_modular_autoload.pth"


def main(arguments: Sequence[str]) -> int:
    """`enable` or `disable` the hook of the running environment; exit code 2 for anything else."""
    if list(arguments) == ["enable"]:
        hook_file().write_text(_HOOK, encoding="utf-8")
        sys.stdout.write(
            f"Enabled: every program of this environment can load hf_modular's adapters ({hook_file()}).\n"
        )
        return 0
    if list(arguments) == ["disable"]:
        hook_file().unlink(missing_ok=True)
        sys.stdout.write("Disabled.\n")
        return 0
    sys.stderr.write("usage: python -m hf_modular.autoload enable|disable\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
