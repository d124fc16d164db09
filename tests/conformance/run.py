"""PEFT's own tests, run on the adapter methods of this package: a yardstick that we did not write.

    python -m conformance.run [METHOD ...] [--baseline] [--write FILE] [-k EXPRESSION] [--jobs N]

with tests/ in PYTHONPATH.

The tests are those of the installed PEFT, taken from its source distribution and kept, like everything else that is
fetched or made, in `.peers/conformance`. The models that they load from the Hub are made here; nothing goes online
while they run. The exit code is 1 if a test fails.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from conformance.methods import BASELINES, DIFFERENT_ON_PURPOSE, METHODS, NOT_ABOUT_ADAPTERS
from conformance.models import make_hub_cache

from hf_modular.adapters import METHODS as ALL_METHODS

HERE = Path(__file__).parent
CACHE = HERE.parent.parent / ".peers" / "conformance"
MODULES = [
    "custom_models",
    "decoder_models",
    "encoder_decoder_models",
    "feature_extraction_models",
    "seq_classifier",
    "vision_models",
    "config",
]
DIFFUSERS = "diffusers==0.42.1"  # imported by PEFT's tests, and by nothing else here

Outcome = dict[str, Any]


def main(arguments: list[str]) -> int:
    options = _options(arguments)
    if without := sorted(ALL_METHODS.keys() - METHODS.keys()):
        sys.exit(f"No settings in {HERE / 'methods.py'} for {without}.")
    source, site = _peft_source(), _diffusers()
    make_hub_cache(CACHE / "hub")
    names = options.methods or [*METHODS, *(BASELINES if options.baseline else [])]
    outcomes = {name: _run(name, source, site, options) for name in names}
    sys.stdout.write(report(outcomes))
    if options.write:
        options.write.write_text(f"{_introduction()}{report(_kept())}", encoding="utf-8")
    return int(any(outcome.get("failed") or not outcome.get("passed") for outcome in outcomes.values()))


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run PEFT's own tests on the adapter methods of this package.")
    known = [*METHODS, *BASELINES]
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"{', '.join(known)}; default: all of ours")
    parser.add_argument("--baseline", action="store_true", help=f"run {' and '.join(BASELINES)} of PEFT beside ours")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the latest outcome of each method here")
    parser.add_argument("-k", dest="keyword", default="", help="only the tests that this pytest expression selects")
    parser.add_argument("--jobs", default="2", help="the number of processes (default: 2)")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.methods) - set(known)):
        parser.error(f"unknown methods {unknown}; there are {known}")
    return options


# -- what is fetched ----------------------------------------------------------------------------------------------


def _peft_source() -> Path:
    """The tests of the installed PEFT, out of its source distribution."""
    version = importlib.metadata.version("peft")
    folder = CACHE / f"peft-{version}"
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        _pip("download", "--no-deps", "--no-binary", "peft", "--dest", temporary, f"peft=={version}")
        with tarfile.open(Path(temporary) / f"peft-{version}.tar.gz") as archive:
            archive.extractall(temporary, filter="data")
        made = Path(temporary) / folder.name
        (made / "tests" / "__init__.py").touch()  # the tests import each other, but the archive lacks the file
        made.rename(folder)
    return folder


def _diffusers() -> Path:
    folder = CACHE / DIFFUSERS.replace("==", "-")
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            made = Path(temporary) / "site"
            _pip("install", "--no-deps", "--target", str(made), DIFFUSERS)
            made.rename(folder)
    return folder


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)


# -- running ------------------------------------------------------------------------------------------------------


def _run(method: str, source: Path, site: Path, options: argparse.Namespace) -> Outcome:
    with tempfile.TemporaryDirectory() as temporary:
        outcome = Path(temporary) / "outcome.json"
        command = [sys.executable, "-m", "pytest", *_pytest_options(), "--method", method, "--outcome", str(outcome)]
        command += ["-n", options.jobs, *(["-k", options.keyword] if options.keyword else [])]
        command += [f"tests/test_{module}.py" for module in MODULES]
        sys.stdout.write(f"\n== {method}\n")
        sys.stdout.flush()
        subprocess.run(command, cwd=source, env=_environment(site, temporary), check=False)
        if not outcome.exists():
            return {}
        if not options.keyword:
            _outcomes().mkdir(exist_ok=True)
            shutil.copy(outcome, _outcomes() / f"{method}.json")
        return json.loads(outcome.read_text(encoding="utf-8"))


def _outcomes() -> Path:
    return CACHE / f"outcomes-{importlib.metadata.version('peft')}"


def _kept() -> dict[str, Outcome]:
    """What the latest whole run of each method gave; a run of all of them takes long."""
    files = {name: _outcomes() / f"{name}.json" for name in (*METHODS, *BASELINES)}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}


def _pytest_options() -> list[str]:
    # warnings stay on, since the tests look at them; only the long list at the end is left out
    settings = ["-c", str(HERE / "pytest.ini"), "--rootdir", ".", "-p", "no:cacheprovider", "-p", "conformance.plugin"]
    return [*settings, "-q", "--tb=short", "--disable-warnings", "-rfE"]


def _environment(site: Path, home: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parent.parent), str(site)]),
        "HF_HOME": home,
        "HF_HUB_CACHE": str(CACHE / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }


# -- what comes out -----------------------------------------------------------------------------------------------


def _introduction() -> str:
    files = ", ".join(f"`test_{module}`" for module in MODULES)
    return (
        "# PEFT's own tests on our adapter methods\n\n"
        f"Made by `make conformance BASELINE=1`: the tests of PEFT {importlib.metadata.version('peft')} that are "
        f"about all of its methods ({files}), unchanged, with our configs in the place of PEFT's. Each method is run "
        "with several settings, and on more places the more kinds of layers it adapts, so that the numbers of cases "
        "differ. `lora` and `hira` are PEFT's own, with PEFT's rows.\n"
    )


def report(outcomes: dict[str, Outcome]) -> str:
    """The numbers, and why tests were skipped or left out, in Markdown."""
    lines = ["", "| method | passed | failed | skipped |", "| --- | ---: | ---: | ---: |"]
    for name, outcome in outcomes.items():
        counts = " | ".join(str(outcome.get(key, 0)) for key in ("passed", "failed", "skipped"))
        lines.append(f"| {name} | {counts} |")
    for name, outcome in outcomes.items():
        if outcome.get("skips"):
            lines += ["", f"Skipped with {name}:", ""]
            lines += [f"- {n} × {why}" for why, n in sorted(outcome["skips"].items(), key=lambda item: -item[1])]
    for title, table in (
        ("Left out for every method:", NOT_ABOUT_ADAPTERS),
        ("Left out because ours differs on purpose:", DIFFERENT_ON_PURPOSE),
    ):
        if table:
            lines += ["", title, "", *(f"- `{test}`: {why}" for test, why in table.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
