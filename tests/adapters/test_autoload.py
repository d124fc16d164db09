"""When the types are registered: after PEFT, whichever comes first, and without an import where the hook is on."""

import importlib
import importlib.util
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_modular import _after_peft, autoload


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def registrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A world with another, small package called `peft`; the list grows when our types would be registered."""
    found: list[str] = []
    (tmp_path / "peft.py").write_text("LOADED = __spec__.loader\n")
    real = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "peft"}
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, _after_peft._AfterPeft)])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_after_peft, "_register", lambda: found.append("registered"))
    for name in real:
        del sys.modules[name]
    yield found
    sys.modules.pop("peft")
    sys.modules.update(real)


def test_types_are_registered_at_once_where_peft_is_loaded(registrations: list[str]) -> None:
    importlib.import_module("peft")
    _after_peft.register_after_peft()
    assert registrations == ["registered"]


def test_types_are_registered_once_peft_is_loaded(registrations: list[str]) -> None:
    finders = list(sys.meta_path)
    _after_peft.register_after_peft()
    _after_peft.register_after_peft()
    assert registrations == []
    importlib.import_module("peft")
    assert registrations == ["registered"]
    assert sys.meta_path == finders


def test_being_imported_by_what_peft_imports_is_no_time_to_register(registrations: list[str], tmp_path: Path) -> None:
    """As when the hook is on, and a package that PEFT needs has a plugin that uses ours."""
    (tmp_path / "peft.py").write_text(f"from {_after_peft.__name__} import register_after_peft as r\nr()\nWHOLE = 1\n")
    _after_peft.register_after_peft()
    assert importlib.import_module("peft").WHOLE
    assert registrations == ["registered"]


def test_a_peft_that_was_found_by_somebody_else_is_extended(registrations: list[str]) -> None:
    """As by an import hook that stands before ours, and does not tell it."""
    _after_peft.register_after_peft()
    finders = list(sys.meta_path)
    sys.meta_path[:] = [finder for finder in finders if not isinstance(finder, _after_peft._AfterPeft)]
    importlib.import_module("peft")
    sys.meta_path[:] = finders
    _after_peft.register_after_peft()
    assert registrations == ["registered"]


def test_asking_whether_peft_is_installed_is_not_importing_it(registrations: list[str]) -> None:
    """transformers and accelerate ask, and import it later or never."""
    _after_peft.register_after_peft()
    assert importlib.util.find_spec("peft") is not None
    assert importlib.util.find_spec("peft") is not None
    assert registrations == []
    importlib.import_module("peft")
    assert registrations == ["registered"]


def test_peft_keeps_its_own_loader(registrations: list[str]) -> None:
    _after_peft.register_after_peft()
    module = importlib.import_module("peft")
    assert module.__loader__ is module.__spec__.loader is module.LOADED
    assert type(module.__loader__).__module__ == "_frozen_importlib_external"


def test_a_peft_that_cannot_be_extended_only_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that uses PEFT and nothing of ours must go on."""

    def fail(name: str) -> None:
        raise ImportError("BaseTuner has no inject_adapter")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.warns(RuntimeWarning, match="could not register its adapter types: BaseTuner has no inject_adapter"):
        _after_peft._register()


def test_importing_the_package_imports_neither_peft_nor_torch() -> None:
    code = "import hf_modular, sys; print([m for m in ('peft', 'torch', 'transformers') if m in sys.modules])"
    assert run("-c", code).stdout.strip() == "[]"


@pytest.fixture
def site_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages of its own, that the hook goes to instead of the real one."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    return tmp_path


PROGRAM = """
import site
from peft import PeftConfig

def load():
    try:
        return type(PeftConfig.from_pretrained({adapter!r})).__name__
    except KeyError as error:
        return repr(error)

print(load())
site.addsitedir({packages!r})  # what the start of an interpreter does with its site-packages
print(load())
"""


def test_without_us_peft_says_keyerror_and_the_hook_cures_it(site_packages: Path) -> None:
    (site_packages / "adapter_config.json").write_text('{"peft_type": "HFM_HUT", "r": 8}')
    assert autoload.main(["enable"]) == 0
    program = PROGRAM.format(adapter=str(site_packages), packages=str(site_packages))
    assert run("-c", program).stdout.splitlines() == ["KeyError('HFM_HUT')", "HUTConfig"]


def test_the_hook_comes_and_goes(site_packages: Path) -> None:
    assert autoload.main(["enable"]) == 0
    assert list(site_packages.iterdir()) == [autoload.hook_file()]
    assert autoload.main(["disable"]) == 0
    assert autoload.main(["disable"]) == 0
    assert list(site_packages.iterdir()) == []


def test_the_hook_survives_the_package(site_packages: Path) -> None:
    """It stays behind when the package is uninstalled, and must not break every interpreter then."""
    autoload.main(["enable"])
    code = (
        f"import site, importlib.util as u; site.addsitedir({str(site_packages)!r}); print(u.find_spec('hf_modular'))"
    )
    result = run("-I", "-S", "-c", code)
    assert (result.stdout.strip(), result.stderr) == ("None", "")


@pytest.mark.parametrize("arguments", [[], ["on"], ["enable", "now"]])
def test_other_words_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert autoload.main(arguments) == 2
    assert "enable|disable" in capsys.readouterr().err


def test_it_is_a_command_that_says_only_what_it_has_to() -> None:
    result = run("-W", "always", "-m", "hf_modular.autoload", "nonsense")
    assert (result.returncode, result.stderr) == (2, "usage: python -m hf_modular.autoload enable|disable\n")
