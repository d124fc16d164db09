"""The recipes of examples/recipes, in mergekit's format and with public models' names, run as they are.

Small models stand in for the public ones, in the cache of the Hub. What mergekit makes of the same is in
tests/data/mergekit_recipes.safetensors; where `make peers` has installed mergekit, it is run again.
"""

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from hf_modular.merging import MergeRecipe, MergeReport, merge

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests/data"
PEER = ROOT / ".peers/mergekit/bin/python"
RECIPES = sorted((ROOT / "examples/recipes").glob("*.yml"))
ORACLES = load_file(DATA / "mergekit_recipes.safetensors")
COMMIT = "0123456789abcdef" * 2 + "01234567"

sys.path.insert(0, str(DATA))
import tiny_mistrals as tiny  # noqa: E402  # found only now
import tiny_modular as modular  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def hub_cache(tmp_path_factory):
    """The cache of the Hub with small models under the names of large ones, and no Hub."""
    cache = tmp_path_factory.mktemp("hub")
    for name in (*tiny.NAMES, *modular.NAMES):
        folder = cache / f"models--{name.replace('/', '--')}"
        (modular if name in modular.NAMES else tiny).write(name, folder / "snapshots" / COMMIT)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(COMMIT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield cache


@pytest.fixture(scope="module", params=RECIPES, ids=lambda path: path.stem)
def merged(request, tmp_path_factory):
    """A recipe and its result."""
    folder = tmp_path_factory.mktemp(request.param.stem) / "out"
    merge(request.param, folder, progress=False)
    return request.param, folder


def test_the_result_loads(merged):
    path, folder = merged
    recipe, tokenizer = MergeRecipe.load(path), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("abcda", return_tensors="pt")["input_ids"]
    if recipe.modules:
        model = AutoModelForSeq2SeqLM.from_pretrained(folder)
        assert torch.isfinite(model(input_ids=ids, decoder_input_ids=ids).logits).all()
        assert (len(model.encoder.block), len(model.decoder.block)) == (16, 12)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.isfinite(model(ids).logits).all()
        assert len(model.model.layers) == sum(part.layers or tiny.LAYERS for part in recipe.sections)
    assert str(model.dtype) == f"torch.{recipe.result_dtype}"
    assert model.config.vocab_size == len(tokenizer)


@pytest.mark.parametrize(
    "merged", [path for path in RECIPES if path.stem in ORACLES], indirect=True, ids=lambda p: p.stem
)
def test_the_numbers_are_mergekits(merged):
    path, folder = merged
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    found = tiny.flat(load_file(folder / "model.safetensors"), vocabulary)
    torch.testing.assert_close(found, ORACLES[path.stem], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("title", modular.CASES)
def test_modules_are_those_of_mergekit(title, tmp_path):
    merge(modular.recipe(modular.CASES[title]), tmp_path / "out", progress=False, verify=True)
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    found = tiny.flat(load_file(tmp_path / "out" / "model.safetensors"), vocabulary)
    torch.testing.assert_close(found, ORACLES[title], rtol=1e-6, atol=1e-6)


def test_commits_are_noted(merged):
    path, folder = merged
    report, recipe = MergeReport.load(folder), MergeRecipe.load(folder / "merge_recipe.yaml")
    assert {entry["model"] for entry in report.inputs} == {
        f"{name}@{COMMIT}" for name in MergeRecipe.load(path).references
    }
    assert all(reference.endswith(f"@{COMMIT}") for reference in recipe.references)


def test_all_recipes_that_draw_no_numbers_are_compared():
    assert {path.stem for path in RECIPES} - ORACLES.keys() == {"dare-ties"}


def test_a_chat_template_by_its_name(tmp_path):
    merge(ROOT / "examples/recipes/union-tokenizer.yml", tmp_path / "out", progress=False)
    out = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = out.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert text == "<|im_start|>user\nab<|im_end|>\n"
    assert out.convert_ids_to_tokens(out("<|im_start|>ab")["input_ids"]) == ["<|im_start|>", "ab"]
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == len(tiny.WORDS) + 3


@pytest.mark.skipif(not PEER.exists(), reason="mergekit is not installed: `make peers` does it")
def test_mergekit_says_the_same_again(tmp_path):
    subprocess.run(
        [PEER, DATA / "make_mergekit_recipes.py", tmp_path / "new.safetensors"],
        check=True,
        cwd=ROOT,
        capture_output=True,
    )
    new = load_file(tmp_path / "new.safetensors")
    assert new.keys() == ORACLES.keys()
    for name, tensor in new.items():
        torch.testing.assert_close(tensor, ORACLES[name], rtol=1e-6, atol=1e-6)
