"""`hf-modular merge-adapters`: what it prints and how it ends."""

import json
import sys

import pytest
from peft import PeftModel

from adapter_merging.zoo import adapted, lora, zoo
from hf_modular import cli

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
]


@pytest.fixture
def folder(tmp_path):
    model = adapted(*(lora(target_modules=["fc", "gpt"]) for _ in range(3)))
    for name in model.peft_config:
        model.save_pretrained(tmp_path, selected_adapters=[name])
    models = [{"model": str(tmp_path / name)} for name in model.peft_config]
    for method, more in {"rmm": {"p": 2}, "dare": {"drop": 0.5}, "linear": {"density": 0.5}}.items():
        recipe = {"merge_method": method, "models": models, "parameters": more}
        recipe |= {"rank": 2} if method == "dare" else {}
        (tmp_path / f"{method}.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    return tmp_path


def run(capsys, monkeypatch, *arguments):
    """Exit code, output and errors of `hf-modular merge-adapters ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["hf-modular", "merge-adapters", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    return (code, *capsys.readouterr())


def test_rmm(folder, capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch, folder / "rmm.yaml", folder / "out")
    assert (code, err) == (0, "")
    first, *_, last = out.splitlines()
    assert first.startswith("first: relative error ")
    assert last.startswith("Merged 3 adapters by rmm into HFM_RMM, 2 layers, 1.5 of their numbers, relative error ")
    assert last.endswith(f": {folder / 'out'}")
    assert PeftModel.from_pretrained(zoo(), folder / "out").tasks == ["first", "second", "third"]


def test_the_report_is_printed_as_json_or_nothing(folder, capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch, folder / "dare.yaml", folder / "out", "--json", "--seed", 3)
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads((folder / "out" / "merge_report.json").read_text())
    assert json.loads(out)["settings"]["seed"] == 3
    assert json.loads(out)["error"] > 0.1  # which warns in Python, and is in the report here
    assert run(capsys, monkeypatch, folder / "dare.yaml", folder / "out", "--overwrite", "-q") == (0, "", "")


@pytest.mark.parametrize(
    ("recipe", "output", "message"),
    [
        ("none.yaml", "out", "there is no recipe"),
        ("rmm.yaml", "first", "absent or empty"),
        ("linear.yaml", "out", "has no setting 'density'"),
    ],
)
def test_what_is_wrong_is_one_message_and_exit_code_2(recipe, output, message, folder, capsys, monkeypatch):
    before = sorted(folder.iterdir())
    code, out, err = run(capsys, monkeypatch, folder / recipe, folder / output)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert sorted(folder.iterdir()) == before
