"""The recipe names and settings of mergekit give what mergekit gives, in fp32 to 1e-6.

Its numbers are in tests/data/mergekit.safetensors, made by the script beside it; where `make peers` has installed
mergekit, the script is run again.
"""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from chunks import merged
from safetensors.torch import load_file

from hf_modular.merging import MergeRecipe
from hf_modular.merging._method import Stack

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests/data"
PEER = ROOT / ".peers/mergekit/bin/python"
CASES = json.loads((DATA / "mergekit_cases.json").read_text())
ORACLES = load_file(DATA / "mergekit.safetensors")


def part(prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in ORACLES.items() if name.startswith(prefix)}


class Drawn(Stack):
    """A stack whose random numbers are those that mergekit drew."""

    def bernoulli(self, model, p):
        return self._mask(model)

    def uniform(self, model):
        return torch.where(self._mask(model) > 0, 0.0, 1 - 2**-24)

    def _mask(self, model):
        drawn = self.companions[f"mask/{model}/{self.name}"].flatten()
        return drawn[self.offset : self.offset + self.base.numel()].view(self.base.shape)


def recipe_of(case):
    weights = case.get("weights", [1.0] * 3)[: case.get("models", 3)]
    densities = case.get("densities", [None] * 3)
    entries = [
        {"model": f"model {i}", "parameters": {"weight": w} | ({"density": d} if d is not None else {})}
        for i, (w, d) in enumerate(zip(weights, densities, strict=False))
    ]
    base = {"base_model": "base"} if case.get("base", True) else {}
    parameters = case.get("parameters", {})
    return MergeRecipe.load({"merge_method": case["merge_method"], "models": entries, "parameters": parameters} | base)


def stack_of(name, resolved, case, drawn):
    models = torch.stack([ORACLES[f"inputs/model {i}/{name}"] for i in range(case.get("models", 3))])
    base = ORACLES[f"inputs/base/{name}"] if case.get("base", True) else models[0]
    weights = torch.tensor(resolved.weights)
    return Drawn(name, base, models, weights, case.get("base", True), settings=resolved.each, companions=drawn)


@pytest.mark.parametrize("title", CASES)
def test_the_same_numbers(title):
    case, expected, drawn = CASES[title], part(f"{title}/result/"), part(f"{title}/")
    recipe = recipe_of(case)
    assert len(expected) >= 6
    for name, tensor in expected.items():
        resolved = recipe.settings.at(name, 0.0)
        stack = stack_of(name, resolved, case, drawn)
        found = merged(resolved.method, stack, size=50)
        torch.testing.assert_close(found, tensor, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.skipif(not PEER.exists(), reason="mergekit is not installed: `make peers` does it")
def test_the_numbers_are_mergekits(tmp_path):
    subprocess.run([PEER, DATA / "make_mergekit_oracles.py", tmp_path / "new.safetensors"], check=True, cwd=ROOT)
    new = load_file(tmp_path / "new.safetensors")
    assert new.keys() == ORACLES.keys()
    for name, tensor in new.items():
        torch.testing.assert_close(tensor, ORACLES[name], rtol=1e-6, atol=1e-6)
