"""Results that are read again before they are kept."""

import json
import shutil
import warnings

import peft
import pytest
import torch
import transformers as tf
from adapters import tiny
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import hf_modular
from hf_modular.cards import save_card
from hf_modular.checkpoints import CheckpointWriter
from hf_modular.merging import METHODS, MergeReport, merge
from hf_modular.merging.runs import _verify
from hf_modular.merging.sources._adapted import Adapted
from hf_modular.merging.sources._sources import open_source

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*stored apart"),
]
TARGETS = {"llama": ["q_proj", "down_proj"], "gemma": ["q_proj", "embed_tokens"], "vit": ["q_proj"], "t5": ["q", "wi"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Fine-tunes of one model, and others, in folders."""
    folders = {}
    for kind in ("llama", "gemma", "vit", "t5", "bert"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        tiny.model(kind).save_pretrained(folders[kind])
    for i in (1, 2):
        folders[f"llama{i}"] = tmp_path_factory.mktemp(f"llama{i}")
        tiny.move(tiny.model("llama"), i, 0.05).save_pretrained(folders[f"llama{i}"])
    return folders


def adapter(kind, base, folder, config=None, seed=1):
    torch.manual_seed(1)
    config = config or LoraConfig(r=3, target_modules=TARGETS[kind])
    model = tiny.move(get_peft_model(tiny.model(kind), config), seed, 0.2)
    model.peft_config["default"].base_model_name_or_path = str(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def verified(recipe, out, **options):
    return merge(recipe, out, progress=False, verify=True, **options).verification


def one(model, **more):
    return {"merge_method": "passthrough", "models": [{"model": str(model)}], **more}


@pytest.mark.parametrize("method", ["linear", "dare", "ties", "pcb", "karcher"])
def test_a_merge_is_what_it_is_meant_to_be(method, models, tmp_path):
    entries = [{"model": str(models[f"llama{i}"])} for i in (1, 2)]
    base = {} if METHODS[method].base_model == "unused" else {"base_model": str(models["llama"])}
    recipe = {"merge_method": method, "models": entries, "dtype": "bfloat16", "seed": 3, **base}
    found = verified(recipe, tmp_path / "out", max_shard_size="50KB")
    tensors = MergeReport.load(tmp_path / "out").tensors
    assert found == {"tensors_compared": tensors if method == "pcb" else 24, "loads": True}
    assert len([*(tmp_path / "out").glob("*.safetensors")]) > 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["llama", "gemma", "vit", "t5"])
def test_a_model_with_an_adapter_answers_as_before(kind, dtype, models, tmp_path):
    folder = adapter(kind, models[kind], tmp_path / "adapter")
    figures = verified(one(f"{models[kind]}+{folder}", dtype=dtype), tmp_path / "out")["adapter"]
    assert 0 <= figures["largest_difference"] <= figures["tolerance"]
    assert (figures["largest_difference"] > 5e-5) is (dtype != "float32")  # it can see the rounding
    assert abs(figures["kl"]) <= figures["kl_tolerance"]
    assert figures["top1"] > 0.9


def test_the_card_has_the_figures_and_both_parents(models, tmp_path):
    folder = adapter("llama", models["llama"], tmp_path / "adapter")
    recipe = one(f"{models['llama']}+{folder}")
    figures = verified(recipe, tmp_path / "out")["adapter"]
    save_card(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Verified on the disk: 24 tensors were computed again, in memory, and are the same;" in card
    assert f"within {figures['largest_difference']:.2g} of those of the model with the adapter" in card
    assert f"| `{models['llama'].name}` (a local folder, not on the Hub) |" in card
    assert "| `adapter` (a local folder, not on the Hub) |" in card
    assert f"model: path/to/{models['llama'].name}+path/to/adapter" in card
    assert str(tmp_path) not in card


def test_an_adapter_of_a_headless_model_is_asked_without_the_head(models, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(
        tf.LlamaModel.from_pretrained(models["llama"]),
        LoraConfig(task_type="FEATURE_EXTRACTION", target_modules=["o_proj"]),
    )
    tiny.move(model, 1, 0.2).save_pretrained(tmp_path / "adapter")
    found = verified(one(f"{models['llama']}+{tmp_path / 'adapter'}"), tmp_path / "out")
    assert found["adapter"]["largest_difference"] <= found["adapter"]["tolerance"]


def wrong_sign(layers):
    return {name: -tensor for name, tensor in layers.items()}


def test_a_merged_model_that_is_not_the_adapters_is_not_kept(models, tmp_path, monkeypatch):
    merged = Adapted.merged
    monkeypatch.setattr(Adapted, "merged", lambda self, name: wrong_sign(merged(self, name)))
    folder = adapter("llama", models["llama"], tmp_path / "adapter")
    words = r"(?s)not kept:.*must answer as the model with the adapter.* up to [\d.]+ \(tolerance.*KL.*first choice"
    with pytest.raises(ValueError, match=words):
        verified(one(f"{models['llama']}+{folder}"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_lost_in_rounding_is_not_kept(models, tmp_path):
    """Each change is smaller than the last digit of the weight that it is added to."""
    folder = adapter("llama", models["llama"], tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: t * 1e-3 if "lora_B" in name else t for name, t in weights.items()},
        folder / "adapter_model.safetensors",
    )
    reference = f"{models['llama']}+{folder}"
    with pytest.raises(ValueError, match=r"what the adapter does is lost in bfloat16; choose a wider `dtype`"):
        verified(one(reference, dtype="bfloat16"), tmp_path / "out")
    figures = verified(one(reference), tmp_path / "out")["adapter"]
    assert figures["largest_difference"] < 0.1 * figures["adapter_effect"]


def test_a_byte_that_went_wrong_is_found(models, tmp_path, monkeypatch):
    write = CheckpointWriter.write

    def damaged(self, name, data, start=0):
        write(self, name, data + 1e-3 if name.endswith("q_proj.weight") else data, start)

    monkeypatch.setattr(CheckpointWriter, "write", damaged)
    with pytest.raises(ValueError, match=r"(?s)not kept:.*of 24 tensors that were computed again, differing are"):
        verified(one(models["llama"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_name_that_transformers_does_not_know_is_found(models, tmp_path):
    """The config says that there is a head, and the weights have none."""
    shutil.copytree(models["llama"], tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    save_file({**tensors, "extra.weight": torch.ones(3)}, tmp_path / "base" / "model.safetensors")
    found = verified(one(tmp_path / "base"), tmp_path / "out")
    assert found["missing_or_unexpected_as_in_the_reference"] == ["extra.weight"]


def test_a_stack_is_what_it_is_meant_to_be(models, tmp_path):
    ranges = {"llama1": [0, 2], "llama2": [0, 3]}
    slices = [{"sources": [{"model": str(models[name]), "layer_range": ranges[name]}]} for name in ranges]
    recipe = {"merge_method": "passthrough", "slices": slices}
    assert verified(recipe, tmp_path / "out") == {"tensors_compared": 24, "loads": True}


def test_a_layer_that_is_missing_in_a_stack_is_found(models, tmp_path):
    info = {
        "missing_keys": {"model.layers.9.mlp.down_proj.weight"},
        "unexpected_keys": set(),
        "mismatched_keys": set(),
    }
    found = _verify.Verification()
    _verify._check_names(info, open_source(str(models["llama"])), found)
    assert found.failures == [
        "transformers finds model.layers.9.mlp.down_proj.weight missing when it loads the result"
    ]


def test_what_does_not_fit_is_said_and_skipped(models, tmp_path, monkeypatch):
    monkeypatch.setattr(_verify, "free_memory", lambda: 1000)
    folder = adapter("llama", models["llama"], tmp_path / "adapter")
    found = verified(one(f"{models['llama']}+{folder}"), tmp_path / "out")
    assert found["tensors_compared"] == 24
    assert "adapter" not in found
    assert found["skipped"] == ["loading: it takes 0.0 GB in fp32, and there is room for 0.0 GB"]


def test_what_transformers_does_not_have_is_said_and_skipped(models, tmp_path):
    for name, change in (("class", {"architectures": ["Another"]}), ("config", None)):
        shutil.copytree(models["llama"], tmp_path / name)
        path = tmp_path / name / "config.json"
        if change:
            path.write_text(json.dumps(json.loads(path.read_text()) | change))
        else:
            path.unlink()
        [skipped] = verified(one(tmp_path / name), tmp_path / f"{name}-out")["skipped"]
        assert skipped in ("loading: transformers has no class Another", "loading: there is no config.json")


def test_figures_are_those_of_the_formulas():
    one, other = torch.tensor([[[0.0, 2.0], [1.0, 0.0]]]), torch.tensor([[[0.0, 2.0], [0.0, 1.0]]])
    found = _verify.compare([one], [other])
    p, q = one.double().softmax(-1), other.double().softmax(-1)
    assert found["largest_difference"] == 1
    assert found["top1"] == 0.5
    assert found["kl"] == pytest.approx(float((p * (p / q).log()).sum() / 2))


@pytest.mark.parametrize("config", [peft.HRAConfig, hf_modular.HUTConfig, peft.LoHaConfig])
def test_other_types_answer_as_before(config, models, tmp_path):
    folder = adapter("llama", models["llama"], tmp_path / "adapter", config(r=4, target_modules=["q_proj"]))
    figures = verified(one(f"{models['llama']}+{folder}"), tmp_path / "out")["adapter"]
    assert figures["largest_difference"] <= figures["tolerance"]
