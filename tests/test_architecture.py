"""The shape of the package: imports point one way, functions are short, the public names are what they claim to be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_modular

PACKAGE = Path(hf_modular.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# What each part may import of ours, beside itself. Below both halves lie the parts that name neither.
MAY_IMPORT = {
    "_version": set(),
    "autoload": {"adapters"},
    "checkpoints": {"_version"},
    "adapters": {"_version", "_reversible", "checkpoints"},
    "adapter_merging": {"_lazy", "_version", "_reversible", "checkpoints", "adapters", "merging"},
    "merging": {"_lazy", "_version", "checkpoints"},
    "fisher": {"_batches", "checkpoints", "merging"},
    "optim": set(),
    "_batches": set(),
    "calibration": {"_batches", "checkpoints", "merging"},
    "searching": {"_batches", "merging", "fisher"},
}
METHOD_MACHINERY = {
    "adapters": {"_method", "_kept"},
    "merging": {"_method", "_sparsify", "_consensus", "_gram", "_select"},
}
# The packages of merging, each of which imports only those before it.
MERGING = ("recipes", "sources", "engine", "assembly", "runs")


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, as dotted names below the package; not those for the type checker."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_modular"):
            base = (node.module or "").removeprefix("hf_modular").strip(".")
            found |= {base} if base.count(".") else {f"{base}.{name.name}".strip(".") for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {n.name.removeprefix("hf_modular.") for n in node.names if n.name.startswith("hf_modular.")}
    return found


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    allowed = MAY_IMPORT.get(part(path))
    if allowed is None:
        return
    foreign = {name.split(".")[0] for name in imports(path)} - {part(path)}
    assert foreign <= allowed


@pytest.mark.parametrize("family", METHOD_MACHINERY)
def test_a_method_imports_only_its_familys_machinery(family: str) -> None:
    for path in (PACKAGE / family).glob("[a-z]*.py"):
        modules = {name.split(".")[1] for name in imports(path) if name.startswith(f"{family}.")}
        assert modules <= METHOD_MACHINERY[family], path.name


@pytest.mark.parametrize("family", METHOD_MACHINERY)
def test_the_machinery_names_no_method(family: str) -> None:
    methods = {path.stem for path in (PACKAGE / family).glob("[a-z]*.py")}
    for path in (PACKAGE / family).rglob("_[a-z]*.py"):
        assert not {name.split(".")[1] for name in imports(path) if name.startswith(f"{family}.")} & methods, path.name


@pytest.mark.parametrize("layer", MERGING)
def test_a_merge_is_made_in_layers(layer: str) -> None:
    above = MERGING[MERGING.index(layer) + 1 :]
    for path in (PACKAGE / "merging" / layer).glob("*.py"):
        assert not {name.split(".")[1] for name in imports(path) if name.startswith("merging.")} & {*above}, path.name


def test_only_these_files_touch_pefts_tuners() -> None:
    touching = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        if any(word in path.read_text(encoding="utf-8") for word in ("peft.tuners", "peft.utils", "peft.mapping"))
    }
    assert touching <= {
        "adapter_merging/_live.py",
        "adapters/_layer.py",
        "adapters/_peft.py",
        "adapters/_quantised.py",
        "merging/sources/_adapted.py",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_are_short(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert code_lines(node) <= 50, f"{path.name}:{node.lineno} {node.name}"


def code_lines(node: ast.FunctionDef) -> int:
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_public_names_are_sorted_and_exist() -> None:
    assert hf_modular.__all__ == sorted(hf_modular.__all__, key=lambda name: (not name.isupper(), name))
    assert set(hf_modular.__all__) == {*hf_modular._HOME, "__version__"}
    assert all(getattr(hf_modular, name) is not None for name in hf_modular.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hf_modular.nothing


@pytest.mark.parametrize("module", ["hf_modular", "hf_modular.merging", "hf_modular.cli"])
def test_importing_is_cheap(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
