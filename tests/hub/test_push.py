"""Publishing, end to end: the real client over HTTP, and what comes back."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, inputs, logits, snippet
from huggingface_hub import EvalResult, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from server import Blob, Hub

from hf_modular import HUTConfig, SSFConfig, push_to_hub

REPO = "tester/model"
TEMPLATE = "# Model Card for Model ID"


@dataclass
class Case:
    family: str
    config: Any
    tag: str
    pipeline_tag: str

    @property
    def id(self) -> str:
        return f"{self.family}-{self.tag}"


CASES = [
    Case("llama", LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"), "lora", "text-generation"),
    Case("llama", HUTConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"), "hut", "text-generation"),
    Case("bert", SSFConfig(target_modules=["query"], task_type="SEQ_CLS"), "ssf", "text-classification"),
    Case("vit", LoraConfig(r=3, target_modules=["q_proj"]), "lora", "image-classification"),
    Case(
        "vit", HUTConfig(r=3, target_modules=["v_proj"], modules_to_save=["classifier"]), "hut", "image-classification"
    ),
]


@pytest.fixture
def adapter(bases: dict[str, Path], tmp_path: Path) -> Callable[..., tuple[Path, torch.Tensor]]:
    """Save an adapter with random parameters on a base model; gives its folder and the logits of the two."""

    def make(case: Case, base: str | Path) -> tuple[Path, torch.Tensor]:
        torch.manual_seed(1)
        model = get_peft_model(CONFIGS[case.family][0].from_pretrained(base), deepcopy(case.config))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) / 3)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", logits(model, case.family)

    return make


@pytest.fixture
def lora(bases: dict[str, Path], adapter: Callable[..., Any], publish: Callable[..., str]) -> Path:
    """A LoRA adapter for a base that is on the Hub as tester/base."""
    return adapter(CASES[0], publish(bases["llama"], "tester/base"))[0]


def card_of(hub: Hub, repo_id: str = REPO) -> ModelCard:
    return ModelCard(hub.repos[repo_id].files["README.md"].data.decode())


# ---- there and back


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_an_adapter_comes_back_as_it_was(case, hub, publish, bases, adapter):
    base = publish(bases[case.family], "tester/base")
    folder, expected = adapter(case, base)
    commit = push_to_hub(folder, REPO)
    repo = hub.repos[REPO]
    assert commit.oid == repo.at("main").sha
    assert [c.title for c in repo.log()] == ["Upload adapter with hf_modular", "initial commit"]
    assert hub.count("POST", f"/{REPO}/commit/") == 1
    data = ModelCard.load(REPO).data
    assert (data.base_model, data.base_model_relation, data.library_name) == (base, "adapter", "peft")
    assert (data.license, data.pipeline_tag) == ("apache-2.0", case.pipeline_tag)
    assert {"hf-modular", case.tag} <= set(data.tags)
    reloaded = PeftModel.from_pretrained(CONFIGS[case.family][0].from_pretrained(base), REPO)
    assert torch.equal(logits(reloaded, case.family), expected)
    names: dict[str, Any] = {}
    exec(snippet(card_of(hub).text), names)
    assert torch.equal(logits(names["model"], case.family), expected)


def test_a_fresh_process_needs_only_the_snippet(hub, publish, bases, adapter):
    folder, expected = adapter(CASES[1], publish(bases["llama"], "tester/base"))
    push_to_hub(folder, REPO)
    code = snippet(card_of(hub).text) + (
        "import torch\n"
        f"ids = torch.tensor({inputs('llama')['input_ids'].tolist()})\n"
        "print(model(input_ids=ids).logits.double().sum().item())\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert float(ran.stdout.split()[-1]) == pytest.approx(expected.double().sum().item(), rel=1e-5)


def test_a_checkpoint_comes_back_and_its_shards_are_listed(hub, bases, tmp_path):
    model = CONFIGS["llama"][0].from_pretrained(bases["llama"])
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    push_to_hub(tmp_path / "model", REPO, license="mit")
    assert len([name for name in hub.repos[REPO].files if name.endswith(".safetensors")]) > 1
    names: dict[str, Any] = {}
    exec(snippet(card_of(hub).text), names)
    assert torch.equal(logits(names["model"], "llama"), logits(model, "llama"))
    assert card_of(hub).data.license == "mit"


def test_a_large_file_goes_in_parts(hub, lora):
    hub.part_size = 500
    push_to_hub(lora, REPO)
    assert hub.count("PUT", "/parts/") > 2
    assert hub.repos[REPO].files["adapter_model.safetensors"].data == (lora / "adapter_model.safetensors").read_bytes()


def test_the_namespace_is_the_users_own_by_default(hub, lora):
    push_to_hub(lora, "mine")
    assert "tester/mine" in hub.repos
    assert '"tester/mine"' in card_of(hub, "tester/mine").text


def test_pushing_again_commits_nothing_new(hub, lora):
    first = push_to_hub(lora, REPO)
    assert push_to_hub(lora, REPO).oid == first.oid
    assert hub.count("POST", "/commit/") == 1


def test_a_branch_is_made_and_the_snippet_names_it(hub, lora):
    push_to_hub(lora, REPO)
    main = hub.repos[REPO].heads["main"]
    (lora / "notes.txt").write_text("more")
    push_to_hub(lora, REPO, revision="dev/second")
    assert hub.repos[REPO].heads["main"] == main
    files = hub.repos[REPO].at("dev/second").files
    assert 'from_pretrained(base, "tester/model", revision="dev/second")' in files["README.md"].data.decode()
    push_to_hub(lora, REPO, revision="dev/second")


def test_a_branch_of_a_new_repository(hub, lora):
    push_to_hub(lora, REPO, revision="dev")
    assert set(hub.repos[REPO].files) == {".gitattributes"}
    assert "adapter_config.json" in hub.repos[REPO].at("dev").files


def test_what_an_earlier_upload_left_is_removed(hub, bases, tmp_path):
    model = CONFIGS["llama"][0].from_pretrained(bases["llama"])
    hub.add(REPO, {name: Blob(b"old") for name in ("pytorch_model.bin", "adapter_config.json", "merge_config.json")})
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "whole")
    push_to_hub(tmp_path / "sharded", REPO)
    push_to_hub(tmp_path / "whole", REPO)
    weights = [name for name in hub.repos[REPO].files if "model" in name]
    assert weights == ["model.safetensors"]
    assert "adapter_config.json" not in hub.repos[REPO].files
    assert "merge_config.json" in hub.repos[REPO].files  # somebody's settings, no part of an upload


def test_what_is_no_part_of_the_model_stays_behind_and_is_named(hub, lora, caplog):
    left_out = ["training_args.bin", "optimizer.pt", "rng_state.pth", "trainer_state.json", ".env", "model.py"]
    for name in (*left_out, "checkpoint-5/model.safetensors", ".git/config", "other/adapter_model.safetensors"):
        (lora / name).parent.mkdir(exist_ok=True)
        (lora / name).write_text("x")
    (lora / "other" / "adapter_config.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        push_to_hub(lora, REPO)
    assert set(hub.repos[REPO].files) == {
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    for name in (*left_out, "checkpoint-5", ".git", "other/adapter_config.json"):
        assert f"  {name}: " in caplog.text


# ---- what may be seen


def test_a_private_repository_is_private(hub, lora):
    push_to_hub(lora, REPO, private=True)
    assert hub.repos[REPO].private
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download(REPO, "README.md", token="hf_other")
    assert hf_hub_download(REPO, "README.md")
    push_to_hub(lora, REPO)  # stays private
    assert hub.repos[REPO].private


def test_private_is_not_asked_of_a_public_repository(hub, lora):
    push_to_hub(lora, REPO)
    with pytest.raises(ValueError, match="is public already, and private=True does not hide it"):
        push_to_hub(lora, REPO, private=True)


def test_no_token_and_no_path_is_told(hub, lora, caplog, tmp_path):
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "b")}))
    with caplog.at_level(logging.DEBUG):
        push_to_hub(lora, REPO, token="hf_test")
    content = b"".join(blob.data for blob in hub.repos[REPO].files.values())
    assert b"hf_test" not in content
    assert str(tmp_path).encode() not in content
    assert "hf_test" not in caplog.text
    assert json.loads(hub.repos[REPO].files["adapter_config.json"].data)["base_model_name_or_path"] is None


# ---- what can go wrong: nothing, or all of it


def assert_nothing_new(hub: Hub) -> None:
    assert REPO not in hub.repos or set(hub.repos[REPO].files) == {".gitattributes"}


@pytest.mark.parametrize("endpoint", [("PUT", "/lfs/"), ("POST", "/preupload/"), ("POST", "/objects/batch")])
@pytest.mark.parametrize("trouble", [500, 503, "drop"])
def test_a_passing_fault_is_overcome(endpoint, trouble, hub, lora):
    hub.fail(*endpoint, trouble)
    push_to_hub(lora, REPO)
    assert hub.count(*endpoint) == 2
    assert hub.count("POST", "/commit/") == 1
    assert hub.repos[REPO].files["adapter_model.safetensors"].data == (lora / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("method", "path", "trouble", "error"),
    [
        ("PUT", "/lfs/", "drop", ConnectionError),
        ("PUT", "/lfs/", 500, ConnectionError),
        ("PUT", "/lfs/", "corrupt", ConnectionError),
        ("POST", "/verify", 404, ConnectionError),
        ("POST", "/commit/", 500, HfHubHTTPError),
        ("POST", "/commit/", "drop", ConnectionError),
        ("GET", "/api/models/", "drop", ConnectionError),
        ("POST", "/api/repos/create", "drop", ConnectionError),
    ],
)
def test_a_lasting_fault_leaves_the_repository_as_it_was(method, path, trouble, error, hub, lora):
    hub.fail(method, path, trouble, times=100)
    with pytest.raises(error):
        push_to_hub(lora, REPO)
    assert_nothing_new(hub)
    hub.faults.clear()
    push_to_hub(lora, REPO)
    assert "adapter_config.json" in hub.repos[REPO].files


def test_a_commit_in_between_is_not_overwritten(hub, lora, monkeypatch):
    push_to_hub(lora, REPO)
    before = HfApi.preupload_lfs_files

    def meanwhile(self: HfApi, *args: Any, **kwargs: Any) -> None:
        before(self, *args, **kwargs)
        hub.repos[REPO].commit("main", {"theirs.txt": Blob(b"theirs")}, "theirs")

    monkeypatch.setattr(HfApi, "preupload_lfs_files", meanwhile)
    (lora / "notes.txt").write_text("ours")
    with pytest.raises(HfHubHTTPError, match="Somebody committed to the repository during this upload"):
        push_to_hub(lora, REPO)
    assert hub.repos[REPO].files == {"theirs.txt": Blob(b"theirs")}


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        ("hf_wrong", REPO, "The Hub does not know this token"),
        ("hf_wrong", "mine", "The Hub does not know this token"),
        ("hf_other", REPO, "needs write access to the namespace"),
    ],
)
def test_a_token_that_may_not(token, repo_id, message, hub, lora):
    with pytest.raises(HfHubHTTPError, match=message) as raised:
        push_to_hub(lora, repo_id, token=token)
    assert token not in str(raised.value)
    assert_nothing_new(hub)


@pytest.mark.parametrize("harm", ["rot", "ignore"])
def test_what_the_hub_holds_is_compared_with_what_was_sent(harm, hub, lora, monkeypatch):
    if harm == "ignore":
        hub.gitignored.add("adapter_config.json")
        wrong = "adapter_config.json"
    else:
        monkeypatch.setattr(hub, "apply", rotten(hub))
        wrong = "adapter_model.safetensors"
    with pytest.raises(ValueError, match=f"must hold at .* what was sent, but {wrong} is missing or differs"):
        push_to_hub(lora, REPO)


def rotten(hub: Hub) -> Callable[..., None]:
    """A Hub that damages large files after it has checked them."""
    sound = hub.apply

    def apply(files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        sound(files, key, value)
        if key == "lfsFile":
            files[value["path"]] = Blob(files[value["path"]].data[:-1] + b"?", lfs=True)

    return apply


# ---- the card


def test_peft_leaves_no_base_model_and_we_do(hub, publish, bases, adapter):
    """What `PeftModel.push_to_hub` makes of a card, so that this test says when it is no longer needed."""
    base = publish(bases["llama"], "tester/base")
    folder, _ = adapter(CASES[0], base)
    model = PeftModel.from_pretrained(CONFIGS["llama"][0].from_pretrained(base), folder)
    model.push_to_hub(REPO)
    assert card_of(hub).data.base_model is None
    push_to_hub(folder, REPO)
    assert card_of(hub).data.base_model == base


def test_a_card_that_somebody_wrote_on_the_hub_is_kept(hub, lora):
    push_to_hub(lora, REPO)
    theirs = "---\nlanguage: de\nlicense: mit\ntags:\n- verse\n---\n\n# Ours\n\nWritten by hand.\n"
    files = hub.repos[REPO].files | {"README.md": Blob(theirs.encode())}
    hub.repos[REPO].commit("main", files, "edited on the web")
    push_to_hub(lora, REPO)
    card = card_of(hub)
    assert card.text == "\n# Ours\n\nWritten by hand.\n"
    assert (card.data.language, card.data.license, card.data.base_model) == ("de", "mit", "tester/base")
    assert card.data.tags == ["verse", "hf-modular", "lora", "base_model:adapter:tester/base"]


def test_results_are_in_the_card_and_its_metadata(hub, lora):
    result = EvalResult("text-generation", "tester/verse", "Verse", "perplexity", 12.5, dataset_split="test")
    push_to_hub(lora, REPO, metrics=[result], datasets=["tester/verse"], limits="For verse only.")
    card = card_of(hub)
    assert card.data.eval_results == [result]
    assert "| Verse | test | perplexity | 12.5 |" in card.text
    assert "## Intended use and limits\n\nFor verse only.\n" in card.text
    assert "[tester/verse](https://huggingface.co/datasets/tester/verse)" in card.text


def test_a_base_that_is_not_there_is_left_out(hub, bases, adapter):
    folder, expected = adapter(CASES[0], bases["llama"])
    config = json.loads((folder / "adapter_config.json").read_text())
    for named in (str(bases["llama"]), "output/base", "nobody/has-this"):
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": named}))
        push_to_hub(folder, REPO)
        card = card_of(hub)
        assert "base_model" not in card.data.to_dict()
        assert "base_model:adapter" not in str(card.data.tags)
        label = named.split("/")[-1] if named.startswith("/") else named
        assert f"`{label}`: " in card.text
        names: dict[str, Any] = {}
        exec(snippet(card.text).replace(f"path/to/{label}", str(bases["llama"])), names)
        assert torch.equal(logits(names["model"], "llama"), expected)


def test_a_copy_of_a_model_on_the_hub_is_known_by_its_weights(hub, publish, bases, adapter, tmp_path):
    base = publish(bases["llama"], "tester/base")
    copy = tmp_path / "copy"
    copy.mkdir()
    config = json.loads((bases["llama"] / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"_name_or_path": base}))
    weights = load_file(bases["llama"] / "model.safetensors")
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    folder, _ = adapter(CASES[0], copy)
    push_to_hub(folder, REPO)
    assert card_of(hub).data.base_model == base
    pushed = PeftConfig.from_pretrained(REPO)
    assert (pushed.base_model_name_or_path, pushed.revision) == (base, hub.repos[base].at("main").sha)
    save_file(weights | {"lm_head.weight": weights["lm_head.weight"] + 1}, copy / "model.safetensors")
    push_to_hub(folder, REPO)
    assert card_of(hub).data.base_model is None
    assert f"names `{base}`, but its weights are not those" in card_of(hub).text


def test_a_base_from_the_cache_is_known_with_its_commit(hub, publish, bases, adapter):
    base = publish(bases["llama"], "tester/base")
    snapshot = Path(hf_hub_download(base, "config.json")).parent
    hf_hub_download(base, "model.safetensors")
    folder, _ = adapter(CASES[0], snapshot)
    push_to_hub(folder, REPO)
    assert card_of(hub).data.base_model == base
    assert f'from_pretrained("{base}", revision="{snapshot.name}")' in card_of(hub).text
