"""The command line: what it prints and how it ends."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_modular import cli
from hf_modular.checkpoints import CheckpointWriter


@pytest.fixture
def models(tmp_path):
    for i, name in enumerate(("base", "one", "two")):
        (tmp_path / name).mkdir()
        generator = torch.Generator().manual_seed(i)
        save_file({"w": torch.randn(3, 5, generator=generator)}, tmp_path / name / "model.safetensors")
    recipe = {
        "merge_method": "dare",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / name)} for name in ("one", "two")],
        "parameters": {"drop": 0.5},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    return tmp_path


def run(capsys, monkeypatch, *arguments):
    """Exit code, output and errors of `hf-modular ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["hf-modular", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    return (code, *capsys.readouterr())


def test_merge(models, capsys, monkeypatch):
    code, out, err = run(
        capsys, monkeypatch, "merge", models / "recipe.yaml", models / "out", "--seed", 3, "--workers", 1
    )
    assert (code, err) == (0, "")
    assert "Merged 2 models by dare" in out
    report = json.loads((models / "out" / "merge_report.json").read_text())
    assert report["seed"] == 3
    assert load_file(models / "out" / "model.safetensors")["w"].shape == (3, 5)


def test_a_merge_that_is_interrupted_says_how_to_go_on(models, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", interrupted)
        code, _, err = run(capsys, patch, "merge", models / "recipe.yaml", models / "out", "-q")
    assert code == 130
    assert "--resume" in err
    assert run(capsys, monkeypatch, "merge", models / "recipe.yaml", models / "out", "-q", "--resume") == (0, "", "")


def test_merge_prints_its_report_as_json_or_nothing(models, capsys, monkeypatch):
    recipe = models / "recipe.yaml"
    _, out, _ = run(capsys, monkeypatch, "merge", recipe, models / "out", "--json", "--no-hashes")
    assert json.loads(out) == json.loads((models / "out" / "merge_report.json").read_text())
    assert json.loads(out)["outputs"]["model.safetensors"].keys() == {"bytes"}
    assert run(capsys, monkeypatch, "merge", recipe, models / "out", "--overwrite", "-q") == (0, "", "")


def test_merge_says_what_it_would_do(models, capsys, monkeypatch):
    before = sorted(models.iterdir())
    code, out, err = run(capsys, monkeypatch, "merge", models / "recipe.yaml", models / "out", "--dry-run")
    assert (code, err) == (0, "")
    assert "Would merge 3 models by dare: 1 tensors, 15 parameters, 1 files" in out
    _, out, _ = run(capsys, monkeypatch, "merge", models / "recipe.yaml", models / "out", "--dry-run", "--json")
    assert json.loads(out)["bytes_written"] == 60
    assert sorted(models.iterdir()) == before


def test_merge_reads_its_result_again_unless_told_not_to(models, capsys, monkeypatch):
    _, out, _ = run(capsys, monkeypatch, "merge", models / "recipe.yaml", models / "out")
    assert "verified: 1 tensors computed again, not loading: there is no config.json" in out
    arguments = ("merge", models / "recipe.yaml", models / "out", "--overwrite", "--no-verify")
    assert "verified" not in run(capsys, monkeypatch, *arguments)[1]


def test_a_result_that_is_wrong_is_exit_code_1(models, capsys, monkeypatch):
    write = CheckpointWriter.write
    monkeypatch.setattr(CheckpointWriter, "write", lambda self, name, data, start=0: write(self, name, -data, start))
    code, out, err = run(capsys, monkeypatch, "merge", models / "recipe.yaml", models / "out")
    assert (code, out) == (1, "")
    assert "of 1 tensors that were computed again, differing are w" in err
    assert not (models / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "{}/none.yaml", "{}/out"], "there is no recipe"),
        (["merge", "{}/recipe.yaml", "{}/one"], "absent or empty"),
        (["merge", "{}/recipe.yaml", "{}/out", "--device", "cudda"], "`device` must be"),
        (["merge", "{}/recipe.yaml", "{}/out", "--max-shard-size", "5XB"], "XB"),
        (["merge", "{}/recipe.yaml", "{}/out", "--workers", "0"], "workers"),
        (["merge", "{}/recipe.yaml"], "output"),
        (["methods", "--family", "merging"], "must be one of"),
        (["mrege"], "mrege"),
    ],
)
def test_what_is_wrong_is_one_message_and_exit_code_2(models, capsys, monkeypatch, arguments, message):
    before = sorted(models.iterdir())
    code, out, err = run(capsys, monkeypatch, *(argument.format(models) for argument in arguments))
    assert code == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert sorted(models.iterdir()) == before


def test_methods(capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "methods", "--family", "merge")
    assert code == 0
    assert "dare (dare_linear" in out
    assert "scale=1.0: λ" in out
    assert "drop=0.9: p, the share of each task vector that is dropped. In [0, 1). Each model may have its own." in out


def test_methods_as_json_have_adapters_too(capsys, monkeypatch):
    _, out, _ = run(capsys, monkeypatch, "methods", "--json")
    found = {method["name"]: method for method in json.loads(out)}
    assert found["hut"]["family"] == "adapter"
    assert {key: value for key, value in found["task_arithmetic"]["settings"][0].items() if key != "help"} == {
        "name": "scale",
        "default": 1.0,
        "law": None,
        "per_model": False,
    }


def test_help_is_quick_to_come():
    """Neither torch nor transformers is imported before a command runs."""
    code = (
        "import sys; import hf_modular.cli, hf_modular.merging; "
        "sys.exit(str([m for m in ('torch', 'transformers', 'peft', 'pydantic') if m in sys.modules] or ''))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True).stderr.strip() == ""
    )


def test_inspect(models, capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "inspect", models / "one")
    assert code == 1  # there is no config
    assert "model of 1 tensors, 15 parameters (15 in float32)" in out
    assert "problem: there is no config.json" in out
    assert json.loads(run(capsys, monkeypatch, "inspect", models / "one", "--json")[1])["parameters"] == 15
    assert run(capsys, monkeypatch, "inspect", models / "nothing")[0] == 2
