"""The pytest plugin that runs PEFT's own test modules on one of our methods, or on one of PEFT's for comparison.

The modules are imported as they are. The lists in their parametrize marks are replaced, everything that has no such
list is deselected, and the outcome is written down as JSON.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conformance.methods import (
    BASELINES,
    DIFFERENT_ON_PURPOSE,
    METHODS,
    NAMED,
    NOT_ABOUT_ADAPTERS,
    NOT_ASKED,
    PASSES_AS,
    WRITTEN_FOR_LORA,
    rows_of_list,
    rows_of_test,
)
from peft import PeftConfig
from PIL import Image


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--method", required=True, help="The adapter method that the tests are run on.")
    parser.addoption("--outcome", help="The file for the numbers.")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Outcome(config), "conformance-outcome")
    config.pluginmanager.register(Selection(config.getoption("--method")), "conformance-selection")


class AlwaysSeen(dict[str, int]):
    """In place of PEFT's memory of the models that were fetched already: all are, so that nothing goes online."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 0


def cat_image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))


class Selection:
    """Which tests are run, and with which rows."""

    def __init__(self, method: str) -> None:
        self.method = METHODS.get(method)
        self.config: type[PeftConfig] = self.method.config if self.method else BASELINES[method]
        self.chosen: set[Any] = set()  # the test functions that got rows
        self.seen: set[str] = set()  # the names of all tests and lists

    @pytest.hookimpl(tryfirst=True)
    def pytest_collectstart(self, collector: pytest.Collector) -> None:
        if isinstance(collector, pytest.Session):
            self._go_offline()
        if isinstance(collector, pytest.Module):
            self._fill(collector.obj)
            self._answer_for_ours(collector.obj)

    def _go_offline(self) -> None:
        sys.path.insert(0, str(Path.cwd()))
        from tests import testing_utils

        testing_utils._HUB_MODEL_ACCESSES = AlwaysSeen()
        testing_utils.load_cat_image = cat_image

    def _fill(self, module: ModuleType) -> None:
        lists = {id(value): name for name, value in vars(module).items() if isinstance(value, (list, tuple))}
        self.seen.update(lists.values())
        for test in _tests_of(module):
            self.seen |= {test.__name__, place_of(test)}
            if test.__name__ in WRITTEN_FOR_LORA and self.method:
                self.chosen.add(test)
            if refused(test):
                continue
            test.pytestmark = [self._filled(mark, test, module, lists) for mark in getattr(test, "pytestmark", [])]

    def _filled(self, mark: pytest.Mark, test: Any, module: ModuleType, lists: dict[int, str]) -> pytest.Mark:
        if mark.name != "parametrize":
            return mark
        names, old = mark.args[:2]
        rows = self._rows(test, module, lists.get(id(old)), old)
        if not rows:
            return mark
        self.chosen.add(test)
        kwargs = {key: value for key, value in mark.kwargs.items() if key != "ids"}
        return pytest.mark.parametrize(names, rows, **kwargs).mark

    def _rows(self, test: Any, module: ModuleType, name: str | None, old: Any) -> list[Any] | None:
        if self.method is None:
            return [row for row in old if _concerns(row, self.config)]
        if name is not None:
            return rows_of_list(self.method, module.__name__.rpartition(".")[2], name)
        # an inline list of the tests in the table; a second mark of theirs holds plain values
        return rows_of_test(self.method, test.__name__) if any(_is_config(row) for row in old) else None

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Function]) -> None:
        if gone := sorted(NAMED - self.seen):
            raise pytest.UsageError(f"PEFT's tests have no {gone} any more; methods.py has to follow.")
        kept = [item for item in items if _function(item) in self.chosen]
        config.hook.pytest_deselected(items=[item for item in items if _function(item) not in self.chosen])
        items[:] = kept
        for item in kept if self.method else []:
            for (test, rows), reason in self.method.cannot.items():
                if item.originalname == test and rows in item.name:
                    item.add_marker(pytest.mark.skip(reason))

    @pytest.fixture(autouse=True)
    def our_class_takes_the_place(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        if self.method is None:
            return
        test = request.node.originalname
        for name, module, config, *rows in PASSES_AS:
            if name == test and all(row in request.node.name for row in rows):
                monkeypatch.setattr(f"tests.{module}.{config}", self.config)
        if test in WRITTEN_FOR_LORA:
            monkeypatch.setattr(request.module, "LoraConfig", partial(self.config, **self.method.anywhere))

    def _answer_for_ours(self, module: ModuleType) -> None:
        """Let PEFT's questions about what a type can do be answered by our table."""
        if self.method is None:
            return
        short = module.__name__.rpartition(".")[2]
        for name in (name for m, name in NOT_ASKED if m == short):
            setattr(module, name, lambda *args: None)
        if self.method.unmergeable:
            for asking in (module, sys.modules["tests.testing_common"]):
                if hasattr(asking, "_skip_if_merging_not_supported"):
                    asking._skip_if_merging_not_supported = lambda *args: pytest.skip(self.method.unmergeable)


def place_of(test: Any) -> str:
    return f"{test.__name__} in {test.__module__.rpartition('.')[2]}"


def refused(test: Any) -> bool:
    return any(key in NOT_ABOUT_ADAPTERS or key in DIFFERENT_ON_PURPOSE for key in (test.__name__, place_of(test)))


def _tests_of(module: ModuleType) -> Iterator[Any]:
    holders = [module, *(v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__)]
    for holder in holders:
        yield from (v for n, v in vars(holder).items() if n.startswith("test_") and callable(v))


def _concerns(row: Any, config: type[PeftConfig]) -> bool:
    parts = row if isinstance(row, tuple) else (row,)
    return any(part is config or type(part) is config for part in parts)


def _is_config(row: Any) -> bool:
    parts = row if isinstance(row, tuple) else (row,)
    return any(isinstance(p, PeftConfig) or (isinstance(p, type) and issubclass(p, PeftConfig)) for p in parts)


def _function(item: pytest.Function) -> Any:
    return getattr(item.function, "__func__", item.function)


class Outcome:
    """Counts what came out, and why tests were skipped."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.counts: Counter[str] = Counter()
        self.skips: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and isinstance(report.longrepr, tuple):
            self.counts["skipped"] += 1
            self.skips[report.longrepr[2].removeprefix("Skipped: ")] += 1
        elif report.failed:
            self.counts["failed"] += 1
        elif report.when == "call":
            self.counts["passed"] += 1

    def pytest_sessionfinish(self) -> None:
        path = self.config.getoption("--outcome")
        if path and not hasattr(self.config, "workerinput"):
            outcome = {**self.counts, "skips": dict(self.skips)}
            Path(path).write_text(json.dumps(outcome), encoding="utf-8")
