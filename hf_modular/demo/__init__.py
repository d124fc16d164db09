"""The demo: train adapters on real handwritten digits, merge the fine-tuned models, and compare them all.

`run` does it; `digits` has the data, `training` the base model and the fine-tuning, `merging` the merges, `report` the
table and what it says, `chart` the picture, `writing` the cards and the results.
"""

import logging
from importlib.util import find_spec

if missing := [name for name in ("matplotlib", "sklearn") if find_spec(name) is None]:
    raise ModuleNotFoundError(f"the demo needs {' and '.join(missing)}: pip install 'hf_modular[demo]'")

# Of bitsandbytes, which PEFT imports where it is installed: that a kernel is missing which nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))
