"""The merge method of CONTRIBUTING.md is one, and keeps the contract."""

import re
import sys
from pathlib import Path
from types import ModuleType

from hf_modular.testing import MergeCase, MergeContract

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLE = next(code for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "MidrangeConfig" in code)

module = ModuleType("midrange_of_contributing")
sys.modules[module.__name__] = module  # a dataclass looks for its module
exec(compile(EXAMPLE, "CONTRIBUTING.md", "exec"), module.__dict__)


class TestMidrange(MergeContract):
    cases = (
        MergeCase(
            module.MidrangeConfig(),
            symmetric=True,
            formula=lambda base, models, weights: (models.amin(0) + models.amax(0)) / 2,
        ),
    )
