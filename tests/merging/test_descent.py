"""Models that do not descend from the base are noticed, with the figures."""

import warnings

import pytest
import torch
from safetensors.torch import save_file

from hf_modular.merging import MergeReport, merge


@pytest.fixture
def folders(tmp_path):
    g = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.w": torch.randn(40, 50, generator=g) for i in range(20)} | {"norm": torch.ones(50)}
    near = {name: w + 0.03 * torch.randn(w.shape, generator=g) for name, w in base.items()}
    far = {name: 2 * torch.randn(w.shape, generator=g) for name, w in base.items()}
    for name, tensors in {"base": base, "near": near, "far": far}.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    return {name: str(tmp_path / name) for name in ("base", "near", "far")}


def run(folders, tmp_path, method="task_arithmetic", base="base", models=("near", "far")):
    entries = [{"model": folders[name]} for name in models]
    recipe = {"merge_method": method, "models": entries} | ({"base_model": folders[base]} if base else {})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merge(recipe, tmp_path / "out")
    return MergeReport.load(tmp_path / "out"), [str(warning.message) for warning in caught]


def test_a_stranger_is_named_with_its_distance(folders, tmp_path):
    report, said = run(folders, tmp_path)
    apart = report.distances[folders["base"]]
    assert apart[folders["near"]] == pytest.approx(0.03, rel=0.05)
    assert apart[folders["far"]] == pytest.approx(5**0.5, rel=0.05)
    figure = f"{apart[folders['far']]:.2f}"
    assert said == [
        f"the difference between {folders['far']} and {folders['base']} is {figure} times as large as "
        f"{folders['base']} itself, on a sample: only models that were fine-tuned from one base merge well"
    ]


def test_without_a_base_the_first_model_serves(folders, tmp_path):
    report, said = run(folders, tmp_path, "linear", None, ("near", "far", "base"))
    assert report.distances[folders["near"]].keys() == {folders["far"], folders["base"]}
    assert len(said) == 1


def test_one_model_is_no_stranger(folders, tmp_path):
    report, said = run(folders, tmp_path, "passthrough", None, ("far",))
    assert report.distances == {folders["far"]: {}}
    assert said == []


def test_zeros_have_no_distance(folders, tmp_path):
    save_file({"w": torch.zeros(3, 3)}, tmp_path / "base" / "model.safetensors")
    save_file({"w": torch.ones(3, 3)}, tmp_path / "near" / "model.safetensors")
    report, said = run(folders, tmp_path, models=("near",))
    assert report.distances == {folders["base"]: {}}
    assert said == []
