"""What is not published: each folder is refused before anything is sent."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS
from safetensors.torch import load_file, save_file
from server import Hub

from hf_modular import push_to_hub

REPO = "tester/model"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKEN = "hf_" + "aB3" * 11


@pytest.fixture
def sharded(bases: dict[str, Path], tmp_path: Path) -> Path:
    CONFIGS["llama"][0].from_pretrained(bases["llama"]).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def change_weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(first_shard(folder))
        name = min(tensors)
        save_file(tensors | {name: change(tensors[name])}, first_shard(folder), {"format": "pt"})

    return damage


def change_index(change: Callable[[dict[str, str]], dict[str, str]]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        (folder / INDEX).write_text(json.dumps({"weight_map": change(index["weight_map"])}))

    return damage


def write(name: str, content: str = "x") -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def link(name: str, target: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder.parent / "outside").write_text("secret")
        (folder / name).symlink_to(folder.parent / target)

    return damage


def cut(folder: Path) -> None:
    first_shard(folder).write_bytes(first_shard(folder).read_bytes()[:-7])


def nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0] = float("nan")
    return tensor


DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "must hold an adapter .* or a model"),
    "broken config": (write("config.json", "{"), ValueError, "config.json must be JSON"),
    "config is a list": (write("config.json", "[]"), ValueError, "must hold a JSON object, but holds a list"),
    "pickled weights": (
        write("pytorch_model.bin"),
        ValueError,
        "Only safetensors are published, but .*pytorch_model.bin",
    ),
    "pickled adapter": (
        write("adapter_model.bin"),
        ValueError,
        "Only safetensors are published, but .*adapter_model.bin",
    ),
    "also an adapter": (write("adapter_config.json", "{}"), ValueError, "holds an adapter and a whole model"),
    "two models": (
        lambda f: save_file({"a": torch.ones(1)}, f / WEIGHTS),
        ValueError,
        "holds both .* and .*index.json",
    ),
    "NaN": (change_weights(nan), ValueError, "must be finite to be published"),
    "infinity": (change_weights(lambda t: t / 0), ValueError, "must be finite to be published"),
    "NaN in eight bits": (
        change_weights(lambda t: nan(t).to(torch.float8_e4m3fn)),
        ValueError,
        "must be finite to be published",
    ),
    "empty tensor": (change_weights(lambda t: t[:0].clone()), ValueError, "must not be empty, but .* has no elements"),
    "cut short": (cut, ValueError, "cut short or damaged"),
    "no safetensors": (lambda f: first_shard(f).write_bytes(b"PK\3\4" * 99), ValueError, "no safetensors file"),
    "shard missing": (lambda f: first_shard(f).unlink(), FileNotFoundError, "there is no such file"),
    "index names more": (
        change_index(lambda m: m | {"more": min(m.values())}),
        ValueError,
        "says that more is in .*, but it is in no file",
    ),
    "index leaves the folder": (
        change_index(lambda m: m | {min(m): "../model.safetensors"}),
        ValueError,
        "must name safetensors files inside its folder",
    ),
    "link out": (link("notes.txt", "outside"), ValueError, "is a link that leaves the folder"),
    "token": (write("notes.md", f"a\ntoken: {TOKEN}\n"), ValueError, "notes.md, line 2, holds what looks like an acc"),
    "code": (
        write("config.json", json.dumps({"auto_map": {"AutoModel": "modeling.Mine"}})),
        ValueError,
        "Code is not published",
    ),
    "broken card": (write("README.md", "---\na: [\n---\n"), ValueError, "README.md must be YAML"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_is_refused(damage: str, hub: Hub, sharded: Path) -> None:
    harm, error, message = DAMAGES[damage]
    harm(sharded)
    with pytest.raises(error, match=message) as raised:
        push_to_hub(sharded, REPO)
    assert TOKEN not in str(raised.value)
    assert not hub.repos
    assert not any(call.method in ("PUT", "POST") for call in hub.calls)


def test_the_same_folder_unharmed_is_published(hub: Hub, sharded: Path) -> None:
    push_to_hub(sharded, REPO)
    assert hub.repos[REPO].files["config.json"].data == (sharded / "config.json").read_bytes()


def test_no_folder(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        push_to_hub(tmp_path / "nothing", REPO)


def test_links_and_folders_inside_are_followed_or_left_out(hub: Hub, sharded: Path) -> None:
    (sharded / "images").mkdir()
    (sharded / "images" / "chart.png").write_bytes(b"png")
    (sharded / "LICENSE").symlink_to("images/chart.png")
    (sharded / "elsewhere").symlink_to("/")
    push_to_hub(sharded, REPO)
    files = hub.repos[REPO].files
    assert files["images/chart.png"].data == files["LICENSE"].data == b"png"
    assert not any(name.startswith("elsewhere") for name in files)


@pytest.mark.parametrize(
    ("facts", "error", "message"),
    [
        ({"metric": []}, TypeError, r"A card has no \['metric'\]"),
        ({"limits": "## Mine"}, ValueError, "its headings must begin with ###"),
        ({"base_model": "/home/me/base"}, ValueError, "must be the id of a Hub repository, but got '/home/me/base'"),
    ],
)
def test_facts_that_are_refused(facts: dict, error: type, message: str, hub: Hub, sharded: Path) -> None:
    with pytest.raises(error, match=message):
        push_to_hub(sharded, REPO, **facts)
    assert not hub.repos
