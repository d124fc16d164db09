"""Safetensors folders: what the library writes is read, what we write it reads, and damage is named."""

import errno
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_modular.checkpoints import (
    INDEX,
    STAGING,
    WEIGHTS,
    Checkpoint,
    CheckpointWriter,
    TensorInfo,
    read_header,
    save_checkpoint,
)

TENSORS = {
    "embed": torch.randn(7, 5),
    "half": torch.randn(3, 4, 2).half(),
    "brain": torch.randn(11).bfloat16(),
    "double": torch.randn(2, 2, dtype=torch.float64),
    "scalar": torch.tensor(3.5),
    "mask": torch.tensor([True, False, True]),
    "ids": torch.arange(5),
    "empty": torch.zeros(0, 4),
    "eight": torch.randn(6).to(torch.float8_e4m3fn),
}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name


def read(folder):
    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def test_reads_what_safetensors_writes(tmp_path):
    save_file(TENSORS, tmp_path / WEIGHTS)
    same(read(tmp_path), TENSORS)
    same(read(tmp_path / WEIGHTS), TENSORS)


@pytest.mark.parametrize("size", ["5GB", 100, 1])
def test_safetensors_reads_what_we_write(tmp_path, size):
    save_checkpoint(tmp_path / "new", TENSORS, max_shard_size=size)
    files = sorted((tmp_path / "new").glob("*.safetensors"))
    same({k: v for file in files for k, v in load_file(file).items()}, TENSORS)
    same(read(tmp_path / "new"), TENSORS)
    assert (size == "5GB") == ([file.name for file in files] == [WEIGHTS])
    assert not (tmp_path / "new" / STAGING).exists()
    with safe_open(files[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_index_is_as_transformers_writes_it(tmp_path):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=40, **sizes))
    model.save_pretrained(tmp_path / "theirs", max_shard_size="5KB")
    theirs = json.loads((tmp_path / "theirs" / INDEX).read_text())
    tensors = {name: model.state_dict()[name] for name in theirs["weight_map"]}
    save_checkpoint(tmp_path / "ours", tensors, max_shard_size="5KB")
    ours = json.loads((tmp_path / "ours" / INDEX).read_text())
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    (tmp_path / "theirs" / "config.json").rename(tmp_path / "ours" / "config.json")
    same(BertModel.from_pretrained(tmp_path / "ours").state_dict(), model.state_dict())


def test_reads_rows_and_runs(tmp_path):
    save_file(TENSORS, tmp_path / WEIGHTS)
    with Checkpoint(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.read_rows("embed", 2, 5), TENSORS["embed"][2:5])
        assert checkpoint.read_rows("embed", 7, 7).shape == (0, 5)
        out = torch.empty(6, dtype=torch.float16)
        checkpoint.read_into("half", out, start=9)
        assert torch.equal(out, TENSORS["half"].view(-1)[9:15])
        with pytest.raises(ValueError, match="rows 0 to 7"):
            checkpoint.read_rows("embed", 5, 8)
        with pytest.raises(ValueError, match="24 elements"):
            checkpoint.read_into("half", out, start=20)
        with pytest.raises(ValueError, match="24 elements"):
            checkpoint.read_into("half", torch.empty(2, 6, dtype=torch.float16).T)


def test_tensors_are_written_in_any_order_and_in_pieces(tmp_path):
    a, b = torch.arange(10.0), torch.arange(6).view(2, 3)
    plan = {"a": TensorInfo(a.dtype, (2, 5)), "b": TensorInfo(b.dtype, (2, 3))}
    with CheckpointWriter(tmp_path, plan) as writer:
        writer.write("b", b)
        writer.write("a", a[7:], start=7)
        writer.write("a", a[:7])
        with pytest.raises(ValueError, match="a was planned as 10 elements"):
            writer.write("a", a, start=1)
        writer.commit()
    same(read(tmp_path), {"a": a.view(2, 5), "b": b})


def test_files_are_the_same_bytes_every_time(tmp_path):
    for name in ("one", "two"):
        save_checkpoint(tmp_path / name, TENSORS)
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()


# --- what breaks leaves nothing -------------------------------------------------------------------------------------


def test_a_broken_run_leaves_nothing(tmp_path):
    plan = {"a": TensorInfo(torch.float32, (3,))}

    def broken(folder):
        with CheckpointWriter(folder, plan) as writer:
            assert (folder / STAGING / WEIGHTS).stat().st_size > 12
            writer.write("a", torch.ones(3))
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        broken(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with pytest.raises(RuntimeError, match="broken"):
        broken(tmp_path / "old")
    assert list((tmp_path / "old").iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor, data, place):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with CheckpointWriter(tmp_path / "new", {"a": TensorInfo(torch.float32, (3,))}) as writer:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="the disk is full"):
            writer.write("a", torch.ones(3))
    assert not (tmp_path / "new").exists()


def test_what_a_killed_run_left_is_swept_up(tmp_path):
    (tmp_path / STAGING).mkdir()
    (tmp_path / STAGING / WEIGHTS).write_bytes(b"half a file")
    (tmp_path / STAGING / "lock").touch()
    save_checkpoint(tmp_path, TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]


def test_an_occupied_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match=r"absent or empty, but .* holds \['notes\.txt'\]"):
        save_checkpoint(tmp_path, TENSORS)
    with pytest.raises(ValueError, match=r"notes\.txt is a file"):
        save_checkpoint(tmp_path / "notes.txt", TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_overwriting_replaces_weights_and_keeps_other_files(tmp_path):
    save_checkpoint(tmp_path, TENSORS, max_shard_size=100)
    (tmp_path / "notes.txt").write_text("keep me")
    save_checkpoint(tmp_path, {"a": torch.ones(3)}, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [WEIGHTS, "notes.txt"]
    same(read(tmp_path), {"a": torch.ones(3)})


def test_two_writers_of_one_folder_are_refused(tmp_path):
    plan = {"a": TensorInfo(torch.float32, (3,))}
    with CheckpointWriter(tmp_path, plan) as first:
        with pytest.raises(ValueError, match="another merge is writing"), CheckpointWriter(tmp_path, plan):
            pass
        first.write("a", torch.ones(3))
        first.commit()
    same(read(tmp_path), {"a": torch.ones(3)})


# --- damage ----------------------------------------------------------------------------------------------------------


def raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


DAMAGED = {
    "empty file": (b"", "cut short"),
    "no header": (b"\x10\0\0\0\0\0\0\0{}", "cut short"),
    "header length lies": (struct.pack("<Q", 2**63) + b"{}", "cut short"),
    "not JSON": (raw(b"{nonsense"), "valid JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "valid JSON"),
    "nested": (raw(b"[" * 200_000), "valid JSON"),
    "not an object": (raw([1, 2]), "JSON object"),
    "pickle": (b"PK\x03\x04" + bytes(100), "cut short"),
    "truncated": (raw({"a": entry()}, bytes(7)), "cut short or damaged"),
    "too long": (raw({"a": entry()}, bytes(9)), "cut short or damaged"),
    "size lies": (raw({"a": entry(shape=(3,))}, bytes(8)), "of 12 bytes must not have the offsets"),
    "overlap": (raw({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "b must begin at byte"),
    "gap": (raw({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "b must begin at byte"),
    "backwards": (raw({"a": entry(offsets=(8, 0))}, bytes(8)), "offsets"),
    "negative": (raw({"a": entry(shape=(-1, -2), offsets=(0, 8))}, bytes(8)), "whole numbers"),
    "fraction": (raw({"a": entry(shape=(2.0,))}, bytes(8)), "whole numbers"),
    "truth as a size": (raw({"a": entry(shape=(2, True))}, bytes(8)), "whole numbers"),
    "absurd shape": (raw({"a": entry(shape=(2**62,) * 5000)}, bytes(8)), "whole numbers"),
    "huge shape": (raw({"a": entry(shape=(2**62, 2**62))}, bytes(8)), "offsets"),
    "unknown dtype": (raw({"a": entry("F4")}, bytes(8)), "dtype F4, but known are F64"),
    "dtype is no text": (raw({"a": entry([1])}, bytes(8)), "dtype"),
    "key too many": (raw({"a": entry(code="x")}, bytes(8)), "must have dtype, shape and data_offsets"),
    "key missing": (raw({"a": {"dtype": "F32"}}), "must have dtype, shape and data_offsets"),
    "entry is no object": (raw({"a": 3}), "must have dtype, shape and data_offsets"),
    "a name twice": (raw(b'{"a":1,"a":2}'), "'a' occurs twice"),
    "no tensors": (raw({"__metadata__": {"format": "pt"}}), "at least one tensor"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused(tmp_path, damage):
    content, message = DAMAGED[damage]
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        Checkpoint(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.timeout(20)
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_mutation_of_a_header_gets_past_our_errors(tmp_path, data):
    """What is read after any change of bytes is what the safetensors library reads, or it is refused."""
    file = tmp_path / WEIGHTS
    good = bytearray(raw({"a": entry(), "b": entry("BF16", (2, 2), (8, 16))}, bytes(16)))
    for _ in range(data.draw(st.integers(1, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(good[: data.draw(st.integers(0, len(good)))] if data.draw(st.booleans()) else good)
    try:
        header = read_header(file)
    except ValueError:
        return
    with safe_open(file, "pt") as reference:
        assert {name: list(tensor.shape) for name, tensor in header.items()} == {
            name: reference.get_slice(name).get_shape()
            for name in reference.keys()  # noqa: SIM118
        }


def test_a_file_that_shrinks_is_noticed(tmp_path):
    save_file({"a": torch.ones(100)}, tmp_path / WEIGHTS)
    with Checkpoint(tmp_path) as checkpoint:
        os.truncate(tmp_path / WEIGHTS, 200)
        with pytest.raises(ValueError, match="changed during the merge"):
            checkpoint.read("a")


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, {"a": torch.ones(3), "b": torch.ones(4)}, max_shard_size=12)
    return folder


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("../outside.safetensors", ValueError, "inside its folder"),
        ("/etc/outside.safetensors", ValueError, "inside its folder"),
        ("sub/../../outside.safetensors", ValueError, "inside its folder"),
        ("..\\outside.safetensors", ValueError, "inside its folder"),
        ("weights.bin", ValueError, "names safetensors files inside its folder|must name safetensors"),
        ("missing.safetensors", FileNotFoundError, "no such file"),
        ("link.safetensors", ValueError, "must not be a link out of its folder"),
    ],
)
def test_an_index_cannot_lead_elsewhere(sharded, name, error, message):
    save_file({"b": torch.ones(4)}, sharded.parent / "outside.safetensors")
    (sharded / "link.safetensors").symlink_to(sharded.parent / "outside.safetensors")
    edit_index(sharded, lambda weight_map: weight_map.update(b=name))
    with pytest.raises(error, match=message):
        Checkpoint(sharded)


def test_an_index_must_say_what_the_files_hold(sharded):
    edit_index(sharded, lambda weight_map: weight_map.update(c=weight_map["a"]))
    with pytest.raises(ValueError, match=r"says that c is in .* but it is in no file"):
        Checkpoint(sharded)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "x", "a": "y"}}']
)
def test_a_broken_index_is_refused(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(ValueError, match=INDEX):
        Checkpoint(sharded)


def test_a_tensor_in_two_files_is_refused(sharded):
    second = sharded / "model-00002-of-00002.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(4)}, second)
    with pytest.raises(ValueError, match="b is in two files"):
        Checkpoint(sharded)


def test_links_of_the_hub_cache_are_followed(tmp_path):
    blob = tmp_path / "models--me--model" / "blobs" / "abc"
    snapshot = tmp_path / "models--me--model" / "snapshots" / "123"
    for folder in (blob.parent, snapshot):
        folder.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, blob)
    (snapshot / WEIGHTS).symlink_to(Path("../../blobs/abc"))
    same(read(snapshot), {"a": torch.ones(2)})


def test_a_pickle_or_nothing_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has neither"):
        Checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        Checkpoint(tmp_path / "nowhere")
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(ValueError, match=r"only safetensors are read.*pytorch_model\.bin"):
            Checkpoint(path)


def test_both_kinds_of_weights_are_refused(sharded):
    save_file({"a": torch.ones(1)}, sharded / WEIGHTS)
    with pytest.raises(ValueError, match="holds both"):
        Checkpoint(sharded)


@pytest.mark.timeout(20)
def test_a_pipe_is_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / WEIGHTS)
    with pytest.raises(FileNotFoundError, match="no regular file"):
        Checkpoint(tmp_path)
