"""The demo: train adapters on real handwritten digits, merge the fine-tuned models, and compare them all.

`run` does it; `digits` has the data, `training` the base model and the fine-tuning, `merging` the merges, `report` the
table and what it says, `chart` the picture, `writing` the cards and the results.
"""

import logging
from collections.abc import Callable
from importlib.util import find_spec

if missing := [name for name in ("matplotlib", "sklearn") if find_spec(name) is None]:
    raise ModuleNotFoundError(f"the demo needs {' and '.join(missing)}: pip install 'hf_modular[demo]'")

# What bitsandbytes and torchao, which PEFT imports where they are installed, say of kernels that nothing here uses.
_NOISE = {
    "bitsandbytes.backends.cpu.ops": "gemm_4bit_forward",
    "torchao": "Failed to load",
    "torch.utils._pytree": "is an Enum subclass",
}


def _without(words: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: words not in str(record.msg)


for _logger, _words in _NOISE.items():
    logging.getLogger(_logger).addFilter(_without(_words))
