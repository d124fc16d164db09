"""The demo: train adapters on real handwritten digits, merge the fine-tuned models, and compare them all.

`run` does it; `digits` has the data, `training` the base model and the fine-tuning, `merging` the merges, `report` the
table and what it says, `chart` the picture, `writing` the cards and the results.
"""

from importlib.util import find_spec

if missing := [name for name in ("matplotlib", "sklearn") if find_spec(name) is None]:
    raise ModuleNotFoundError(f"the demo needs {' and '.join(missing)}: pip install 'hf_modular[demo]'")
