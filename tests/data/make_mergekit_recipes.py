"""What mergekit makes of examples/recipes with small models: run by mergekit's own environment (`make peers`).

.peers/mergekit/bin/python tests/data/make_mergekit_recipes.py [FILE]
"""

import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import tiny_mistrals as tiny
import tiny_modular as modular
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from safetensors.torch import load_file, save_file

RANDOM = {"dare-ties"}  # which draw numbers


def local(content, folder):
    """A recipe with folders in the place of repositories."""
    if isinstance(content, dict):
        return {key: local(value, folder) for key, value in content.items()}
    if isinstance(content, list):
        return [local(part, folder) for part in content]
    return str(folder / content) if content in (*tiny.NAMES, *modular.NAMES) else content


def main():
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in tiny.NAMES:
            tiny.write(model, folder / model)
        for model in modular.NAMES:
            modular.write(model, folder / model)
        recipes = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(tiny.RECIPES.glob("*.yml"))}
        recipes |= {title: modular.recipe(modules) for title, modules in modular.CASES.items()}
        for title in recipes.keys() - RANDOM:
            recipe = local(recipes[title], folder)
            run_merge(MergeConfiguration.model_validate(recipe), str(folder / title), MergeOptions(quiet=True))
            results[title] = result(folder / title)
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "mergekit_recipes.safetensors"
    save_file(results, file, metadata={"mergekit": version("mergekit")})


def result(folder):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    data = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"] | {token["content"]: token["id"] for token in data["added_tokens"]}
    return tiny.flat(tensors, vocabulary)


if __name__ == "__main__":
    main()
