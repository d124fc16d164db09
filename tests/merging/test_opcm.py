"""OPCM: the authors' numbers, the formula with whole matrices, and models that come one at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hf_modular.checkpoints import Checkpoint, save_checkpoint
from hf_modular.merging import MergeReport, OPCMConfig, merge, merge_state_dicts
from hf_modular.merging.opcm import clean
from hf_modular.merging.runs import _one_by_one as machinery

REFERENCE = load_file(Path(__file__).parents[1] / "data" / "reference.safetensors")


def part(prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in REFERENCE.items() if name.startswith(prefix)}


def test_the_authors_numbers():
    models = [part(f"opcm.model{i}.") for i in range(4)]
    merged = merge_state_dicts(part("opcm.base."), models, OPCMConfig(alpha=0.5))
    torch.testing.assert_close(merged, part("opcm.expected.alpha0.5."), rtol=0, atol=1e-6)


def test_two_models_by_hand():
    one, two = [[1.0, 0], [0, 0.5], [0, 0]], [[0.5, 0.2], [0.1, 0.3], [0.4, -0.2]]
    merged = merge_state_dicts({"w": torch.zeros(3, 2)}, [{"w": torch.tensor(m)} for m in (one, two)], OPCMConfig())
    expected = [[0.770017, 0.154003], [0.077002, 0.385008], [0.308007, -0.154003]]
    torch.testing.assert_close(merged["w"], torch.tensor(expected), rtol=0, atol=1e-6)


def by_full_matrices(delta, total, alpha):
    """The formula with the full decomposition, as it is written."""
    U, S, Vh = torch.linalg.svd(total, full_matrices=True)
    fractions = S.cumsum(0) / S.sum()
    k = int((fractions <= alpha + 1e-12).sum())
    P = U.T @ delta @ Vh.T
    P.diagonal().zero_()
    P[:k, :k] = 0
    return U @ P @ Vh


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 7), st.integers(2, 7), st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]))
def test_the_projection(rows, columns, seed, alpha):
    generator = torch.Generator().manual_seed(seed)
    delta, total = torch.randn(2, rows, columns, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(clean(delta, total, alpha), by_full_matrices(delta, total, alpha))
    torch.testing.assert_close(clean(delta, 7 * total, alpha), clean(delta, total, alpha))  # the scale is irrelevant
    torch.testing.assert_close(clean(delta.T, total.T, alpha).T, clean(delta, total, alpha))
    once = clean(delta, total, alpha)
    torch.testing.assert_close(clean(once, total, alpha), once)  # a projection
    torch.testing.assert_close((total * once).sum() + 1, torch.tensor(1.0, dtype=torch.float64))  # nothing along T


def test_directions_that_the_sum_has_not_are_kept():
    low_rank = torch.outer(torch.tensor([1.0, 2, 0, 0]), torch.tensor([0.0, 1, 1]))
    beyond = torch.outer(torch.tensor([0.0, 0, 1, 3]), torch.tensor([1.0, 0, 0]))
    torch.testing.assert_close(clean(beyond, low_rank, 1.0), beyond)
    torch.testing.assert_close(clean(beyond + low_rank, low_rank, 1.0), beyond)
    assert torch.equal(clean(beyond, torch.zeros(4, 3), 1.0), beyond)


def state(seed, base=None):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed": (12, 6), "layer.weight": (8, 6), "layer.bias": (8,), "conv": (4, 2, 3), "norm": (6,)}
    moved = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return moved if base is None else {name: base[name] + 0.1 * tensor for name, tensor in moved.items()}


BASE = state(0)
MODELS = [state(i, BASE) for i in (1, 2, 3)]


def norm(model):
    return sum(float((model[name] - BASE[name]).double().square().sum()) for name in BASE) ** 0.5


def test_the_result_is_as_far_from_the_base_as_a_model():
    merged = merge_state_dicts(BASE, MODELS, OPCMConfig())
    assert norm(merged) == pytest.approx(sum(map(norm, MODELS)) / 3, rel=1e-6)


def test_embeddings_convolutions_and_vectors_are_added_up():
    merged = merge_state_dicts(BASE, MODELS, OPCMConfig())
    sums = {name: sum(model[name] - BASE[name] for model in MODELS) for name in BASE}
    ratio = (merged["norm"] - BASE["norm"]) / sums["norm"]
    for name in ("embed", "layer.bias", "conv", "norm"):
        torch.testing.assert_close(
            (merged[name] - BASE[name]) / sums[name], ratio[0].expand_as(sums[name]), rtol=1e-4, atol=0
        )
    assert not torch.allclose(
        (merged["layer.weight"] - BASE["layer.weight"]) / ratio[0], sums["layer.weight"], atol=1e-3
    )
    everything = merge_state_dicts(BASE, MODELS, OPCMConfig(skip="embed|layer"))
    torch.testing.assert_close(
        (everything["layer.weight"] - BASE["layer.weight"]) / sums["layer.weight"],
        torch.full((8, 6), 3**-0.5),
        atol=0.1,
        rtol=0,
    )


def test_one_model_comes_back():
    torch.testing.assert_close(merge_state_dicts(BASE, MODELS[:1], OPCMConfig()), MODELS[0])


@pytest.fixture
def saved(tmp_path):
    save_checkpoint(tmp_path / "base", BASE)
    (tmp_path / "base" / "config.json").write_text("{}")
    for i, model in enumerate(MODELS):
        save_checkpoint(tmp_path / f"model{i}", model, max_shard_size=200 * (i + 1))
    return tmp_path


def recipe(folder, models=(0, 1, 2), **more):
    return {
        "merge_method": "opcm",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / f"model{i}")} for i in models],
        "parameters": {"alpha": 0.4},
        **more,
    }


def read(folder):
    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


EXPECTED = merge_state_dicts(BASE, MODELS, OPCMConfig(alpha=0.4))


def merge_quietly(*arguments, **options):
    return merge(*arguments, progress=False, **options)


def test_checkpoints_are_merged_one_after_the_other(saved):
    before = {path.name for path in saved.iterdir()}
    report = merge_quietly(recipe(saved), saved / "out", max_shard_size=300)
    torch.testing.assert_close(read(saved / "out"), EXPECTED)
    assert {path.name for path in saved.iterdir()} == {*before, "out"}
    assert report == MergeReport.load(saved / "out")
    assert report.merge_method == "opcm"
    assert [entry["model"] for entry in report.inputs] == [
        str(saved / name) for name in ("base", "model0", "model1", "model2")
    ]
    assert [step["norm"] for step in report.facts["steps"]] == pytest.approx([norm(model) for model in MODELS])
    assert report.facts["models"] == [entry["model"] for entry in recipe(saved)["models"]]
    assert {"model-00001", "config.json"} <= {path.name[:11] for path in (saved / "out").iterdir()}
    merge_quietly(saved / "out" / "merge_recipe.yaml", saved / "again", workers=1)
    assert all(torch.equal(tensor, read(saved / "again")[name]) for name, tensor in read(saved / "out").items())


def test_a_later_run_adds_a_model(saved):
    kept = {"state": str(saved / "state")}
    first = merge_quietly(recipe(saved, [0, 1], **kept), saved / "two")
    torch.testing.assert_close(read(saved / "two"), merge_state_dicts(BASE, MODELS[:2], OPCMConfig(alpha=0.4)))
    second = merge_quietly(recipe(saved, [2], **kept), saved / "three")
    torch.testing.assert_close(read(saved / "three"), EXPECTED)
    assert second.facts["models"] == [*first.facts["models"], str(saved / "model2")]
    assert json.loads((saved / "state" / "merge_state.json").read_text())["models"] == second.facts["models"]


def test_a_broken_run_goes_on_after_the_last_model(saved, monkeypatch):
    kept = {"state": str(saved / "state")}
    replaced = machinery._replace
    calls = []

    def broken(folder, following, state):
        if len(calls) == 1:
            folder.rename(folder.with_name("state.before"))
            raise OSError("the disk is full")
        calls.append(folder)
        replaced(folder, following, state)

    monkeypatch.setattr(machinery, "_replace", broken)
    with pytest.raises(OSError, match="the disk is full"):
        merge_quietly(recipe(saved, **kept), saved / "out")
    monkeypatch.setattr(machinery, "_replace", replaced)
    with pytest.raises(
        ValueError, match=r"model0 is in .*state already: remove it from the recipe, or go on with `resume`"
    ):
        merge_quietly(recipe(saved, **kept), saved / "out")
    merge_quietly(recipe(saved, **kept), saved / "out", resume=True)
    torch.testing.assert_close(read(saved / "out"), EXPECTED)


def test_the_dtype_of_the_result_and_of_the_arithmetic(saved):
    narrow = [{name: tensor.bfloat16() for name, tensor in model.items()} for model in (BASE, *MODELS)]
    for name, model in zip(("base", "model0", "model1", "model2"), narrow, strict=True):
        save_checkpoint(saved / "narrow" / name, model)
    merge_quietly(recipe(saved / "narrow"), saved / "out")
    found, expected = read(saved / "out"), merge_state_dicts(narrow[0], narrow[1:], OPCMConfig(alpha=0.4))
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    torch.testing.assert_close(found, expected, rtol=0.008, atol=0)
    merge_quietly(recipe(saved / "narrow", out_dtype="float32"), saved / "wide")
    assert {tensor.dtype for tensor in read(saved / "wide").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": {"alpha": 1.5}}, r"`alpha` must be in \[0, 1\], but got alpha=1.5"),
        ({"parameters": {"weight": 0.5}}, "takes no weights"),
        ({"parameters": {"alpha": [0.2, 0.8]}}, "must be alike for all tensors"),
        ({"merge_method": "task_arithmetic", "parameters": {}, "state": "state"}, "keeps no state"),
        ({"state": "base"}, "must hold the state of a merge"),
    ],
)
def test_refuses(saved, change, message):
    if "state" in change:
        change = change | {"state": str(saved / change["state"])}
    with pytest.raises(ValueError, match=message):
        merge_quietly(recipe(saved) | change, saved / "out")
    assert not (saved / "out").exists()


def test_a_state_of_other_merges_is_refused(saved):
    kept = {"state": str(saved / "state")}
    merge_quietly(recipe(saved, [0], **kept), saved / "one")
    with pytest.raises(ValueError, match=r"was made with .*'alpha': 0.4.*, but the recipe has .*'alpha': 0.7"):
        merge_quietly(recipe(saved, [1], **kept) | {"parameters": {"alpha": 0.7}}, saved / "out")
    save_checkpoint(saved / "base", MODELS[2], overwrite=True)
    with pytest.raises(ValueError, match="made with another base than the recipe's"):
        merge_quietly(recipe(saved, [1], **kept), saved / "out")


def test_memory_does_not_grow_with_the_number_of_models(tmp_path):
    """Of a matrix of 16 MB in fp32: the largest resident size of a process that merges two or six models."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, 1_000_000)  # flat, so that the decomposition is cheap
    save_checkpoint(tmp_path / "base", {"w": torch.zeros(shape, dtype=torch.bfloat16)})
    for i in range(6):
        save_checkpoint(tmp_path / f"model{i}", {"w": torch.randn(shape, generator=generator).bfloat16()})
    code = (
        "import json, sys; from hf_modular.merging import merge; "
        "print(merge(json.loads(sys.argv[1]), sys.argv[2], progress=False, hashes=False, workers=1).peak_memory)"
    )
    peaks = []
    for count in (2, 6):
        call = [sys.executable, "-c", code, json.dumps(recipe(tmp_path, range(count))), str(tmp_path / f"out{count}")]
        done = subprocess.run(
            call, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        peaks.append(int(done.stdout))
    assert peaks[1] < peaks[0] * 1.1 + 20e6
