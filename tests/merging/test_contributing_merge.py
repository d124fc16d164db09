"""The merge method of CONTRIBUTING.md is one."""

import re
import sys
from pathlib import Path
from types import ModuleType

import torch

from hf_modular.merging import merge_state_dicts

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLE = next(code for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "MidrangeConfig" in code)


def test_the_example_merges() -> None:
    example = ModuleType("midrange_example")
    sys.modules[example.__name__] = example  # a dataclass looks for its module
    exec(EXAMPLE, vars(example))
    models = [{"w": torch.randn(70, 11)} for _ in range(3)]
    merged = merge_state_dicts(None, models, example.MidrangeConfig())["w"]
    stacked = torch.stack([model["w"] for model in models])
    torch.testing.assert_close(merged, (stacked.amin(0) + stacked.amax(0)) / 2)
