"""What mergekit makes of a few small tensors: run by mergekit's own environment (`make peers`), it writes
`mergekit.safetensors`.

    .peers/mergekit/bin/python tests/data/make_mergekit_oracles.py [FILE]

Where mergekit draws numbers, what it drew is recorded with the chances, so that the rest can be compared too. Its
sorts are made stable: which of equal elements they put first is else up to the processor.
"""

import json
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from mergekit.merge_methods.api import merge_tensors
from safetensors.torch import save_file

HERE = Path(__file__).parent
SHAPES = {"embed": (19, 12), "up": (14, 12), "norm": (16,), "kernel": (6, 5, 3), "one": (1,)}
bernoulli, argsort, sort = torch.bernoulli, torch.argsort, torch.sort


def topk(x, k, largest=True):
    assert largest
    indices = argsort(x, descending=True, stable=True)[:k]
    return x[indices], indices


torch.argsort, torch.sort, torch.topk = partial(argsort, stable=True), partial(sort, stable=True), topk


def coarse(x):
    return x.round() / 16


def inputs():
    """The base and three models; `coarse` has many equal differences, some of which cancel out."""
    g = torch.Generator().manual_seed(20261120)
    base = {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}
    models = [{name: w + 0.1 * torch.randn(w.shape, generator=g) for name, w in base.items()} for _ in range(3)]
    for name, change in {"coarse": coarse, "tiny": lambda x: 1e-5 * x, "frozen": torch.zeros_like}.items():
        base[name] = (torch.randn(9, 14, generator=g) * 16).round() / 16
        for model in models:
            model[name] = base[name] + change(torch.randn(9, 14, generator=g))
    models[1]["up"] = base["up"].clone()
    return base, models


def merged(case, base, models, record):
    """A case's tensors, one by one."""
    models = models[: case.get("models", 3)]
    tensors = [*([base] if case.get("base", True) else []), *models]
    parameters = dict(case.get("parameters", {}))
    for key, values in {"weight": case.get("weights"), "density": case.get("densities")}.items():
        if values:
            parameters[key] = {f"model {i}": value for i, value in enumerate(values)}
    ids = [*(["base"] if case.get("base", True) else []), *(f"model {i}" for i in range(len(models)))]
    for name in (name for name in base if name not in case.get("without", [])):
        drawn = []
        torch.bernoulli = lambda chances, drawn=drawn: drawn.append((chances, bernoulli(chances))) or drawn[-1][1]
        yield (
            name,
            merge_tensors(
                [model[name] for model in tensors],
                case["merge_method"],
                parameters=parameters,
                ids=ids,
                base_index=0 if case.get("base", True) else None,
            ),
        )
        for i, (chances, mask) in enumerate(drawn):
            record[f"mask/{i}/{name}"] = mask.reshape(base[name].shape)
            if chances.unique().numel() > 1:
                record[f"chances/{i}/{name}"] = chances.reshape(base[name].shape).clone()


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    base, models = inputs()
    out = {f"inputs/base/{name}": tensor for name, tensor in base.items()}
    for i, model in enumerate(models):
        out |= {f"inputs/model {i}/{name}": tensor for name, tensor in model.items()}
    for case_name, case in json.loads((HERE / "mergekit_cases.json").read_text()).items():
        record = {}
        results = dict(merged(case, base, models, record))
        out |= {f"{case_name}/result/{name}": tensor.contiguous() for name, tensor in results.items()}
        out |= {f"{case_name}/{key}": tensor.contiguous() for key, tensor in record.items()}
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "mergekit.safetensors"
    save_file(out, file, metadata={"mergekit": version("mergekit"), "torch": torch.__version__})


if __name__ == "__main__":
    main()
