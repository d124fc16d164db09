"""`hf-modular push` and `hf-modular card`."""

import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from server import Hub

from hf_modular import cli


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["hf-modular", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_push(hub: Hub, bases: dict[str, Path], monkeypatch, capsys):
    options = ("--private", "--revision", "dev", "--license", "mit")
    assert run(monkeypatch, "push", bases["llama"], "model", *options) == 0
    repo = hub.repos["tester/model"]
    assert capsys.readouterr().out == f"{hub.url}/tester/model/commit/{repo.heads['dev']}\n"
    assert repo.private
    card = ModelCard(repo.at("dev").files["README.md"].data.decode())
    assert card.data.license == "mit"


def test_a_refusal_is_one_message(hub: Hub, bases: dict[str, Path], monkeypatch, capsys):
    assert run(monkeypatch, "push", bases["llama"], "stranger/model") == 2
    error = capsys.readouterr().err
    assert "needs write access to the namespace" in error
    assert "Traceback" not in error


def test_card(bases: dict[str, Path], tmp_path: Path, monkeypatch, capsys):
    for path in bases["llama"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert run(monkeypatch, "card", tmp_path, "--license", "mit") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'README.md'}\n"
    assert ModelCard.load(tmp_path / "README.md").data.license == "mit"
