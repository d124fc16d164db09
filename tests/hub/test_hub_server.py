"""The Hub of the tests refuses what the real one refuses; without that the other tests would prove little."""

import hashlib
import json

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from safetensors.torch import save
from server import Hub
from torch import ones

REPO = "tester/model"
AUTH = {"Authorization": "Bearer hf_test"}


def commit(hub: Hub, *operations: dict, parent: str | None = None) -> httpx2.Response:
    header = {"summary": "by hand", "description": ""} | ({"parentCommit": parent} if parent else {})
    lines = [{"key": "header", "value": header}, *operations]
    body = "\n".join(map(json.dumps, lines))
    return httpx2.post(f"{hub.url}/api/models/{REPO}/commit/main", content=body.encode(), headers=AUTH)


def test_an_object_is_hashed_when_it_arrives(hub):
    oid = hashlib.sha256(b"right").hexdigest()
    assert httpx2.put(f"{hub.url}/lfs/{oid}", content=b"wrong").status_code == 400
    assert not hub.objects
    assert httpx2.put(f"{hub.url}/lfs/{oid}", content=b"right").status_code == 200


def test_a_commit_that_names_an_absent_object_is_refused(hub):
    repo = hub.add(REPO, {})
    head = repo.heads["main"]
    absent = {"key": "lfsFile", "value": {"path": "m.safetensors", "algo": "sha256", "oid": "0" * 64, "size": 3}}
    present = {"key": "file", "value": {"path": "a.txt", "content": "YQ==", "encoding": "base64"}}
    assert commit(hub, present, absent).status_code == 400
    assert repo.heads["main"] == head
    assert commit(hub, present, parent="f" * 40).status_code == 412
    assert commit(hub, present, parent=head).status_code == 200
    assert repo.files["a.txt"].data == b"a"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("base_model: /tmp/base", '"base_model" with value "/tmp/base" is not valid'),
        ("base_model: [a/b, ../c]", '"base_model" with value "../c" is not valid'),
        ("license: [mit]", '"license" must be a string'),
        ("tags: [1]", '"tags" must hold strings'),
    ],
)
def test_card_metadata_are_validated(metadata, message, hub):
    hub.add(REPO, {})
    card = CommitOperationAdd("README.md", f"---\n{metadata}\n---\n".encode())
    with pytest.raises(ValueError, match=message):
        HfApi().create_commit(REPO, [card], commit_message="card")


def test_who_may_do_what(hub):
    hub.add(REPO, {}, private=True)
    hub.add("tester/open", {})
    api = HfApi(token="hf_other")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(REPO)
    assert api.model_info("tester/open").id == "tester/open"
    for token, status in (("hf_other", 403), ("hf_wrong", 401), (False, 401)):
        with pytest.raises(HfHubHTTPError) as raised:
            HfApi(token=token).create_repo("tester/new")
        assert raised.value.response.status_code == status


def test_the_client_reads_what_it_wrote(hub, tmp_path):
    api = HfApi()
    api.create_repo(REPO)
    tensors = save({"a": ones(3, 5)}, {"format": "pt"})
    files = [CommitOperationAdd("sub/m.safetensors", tensors), CommitOperationAdd("notes.txt", b"text")]
    api.create_commit(REPO, files, commit_message="two files")
    assert sorted(api.list_repo_files(REPO)) == [".gitattributes", "notes.txt", "sub/m.safetensors"]
    assert [c.title for c in api.list_repo_commits(REPO)] == ["two files", "initial commit"]
    snapshot_download(REPO, local_dir=tmp_path)
    assert (tmp_path / "sub/m.safetensors").read_bytes() == tensors
    assert not api.verify_repo_checksums(REPO, local_dir=tmp_path).mismatches
    assert api.parse_safetensors_file_metadata(REPO, "sub/m.safetensors").parameter_count == {"F32": 15}
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)
