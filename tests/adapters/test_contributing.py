"""The example of CONTRIBUTING.md is a method, and keeps the contract by the test that stands there."""

import re
import sys
from pathlib import Path
from types import ModuleType

from hf_modular.adapters import _method

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")

example = ModuleType("input_scale_example")
sys.modules[example.__name__] = example
for block in re.findall(r"```python\n(.*?)```", TEXT.partition("## Adding an adapter")[2].partition("\n## ")[0], re.S):
    exec(block, vars(example))


class TestExample(example.TestInputScale):  # type: ignore[name-defined, misc]
    kinds = ("Linear", "Conv1D", "Conv2d", "Embedding", "LayerNorm", "PReLU")


def test_the_names_in_the_text_are_there() -> None:
    for name in ("require_rank", "require_choice", "require_matrix", "LowRank", "Site"):
        assert name in TEXT
        assert hasattr(_method, name)
    assert (Path(__file__).parent / "table.py").exists()
