"""RMM of full fine-tunes: each reduced by the SVD, its norms and its head kept."""

import pytest
import torch
from adapters import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close

from adapter_merging.zoo import difference
from hf_modular import merge_adapter_files

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]

MATRICES = ("query", "dense", "q_proj", "down_proj", "c_attn", "c_fc")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folders = {}
    for kind in ("llama", "gpt2", "bert"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        tiny.model(kind).save_pretrained(folders[kind])
    folders["headless"] = tmp_path_factory.mktemp("headless")
    tiny.model("classifier").bert.save_pretrained(folders["headless"])
    return folders


def tuned(kind, folder, seed, parts=(), size=None):
    """A model with rank 2 added to its matrices, and what else is named changed at random."""
    rng = torch.Generator().manual_seed(seed)
    model = tiny.model(kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            layer, _, part = name.rpartition(".")
            if layer.endswith(MATRICES) and part == "weight":
                out, columns = parameter.shape
                parameter += torch.randn(out, 2, generator=rng) @ torch.randn(2, columns, generator=rng) * 0.1
            elif layer.endswith(parts) or part in parts:
                parameter += torch.randn(parameter.shape, generator=rng) * 0.1
        if size is not None:
            model.classifier = torch.nn.Linear(32, size)
            model.config.num_labels = size
    model.save_pretrained(folder)
    return model.eval()


def merged(kind, base, models, folder, *, p=1, rank=2):
    report = merge_adapter_files(
        {
            "merge_method": "rmm",
            "base_model": str(base),
            "models": [{"model": str(model)} for model in models],
            "parameters": {"p": p, "rank": rank},
            "warn_above": 10,
        },
        folder,
    )
    return PeftModel.from_pretrained(tiny.model(kind), folder).eval(), report


@pytest.mark.parametrize(
    ("kind", "norms"), [("llama", ("norm",)), ("gpt2", ("ln_1", "ln_2")), ("bert", ("LayerNorm",))]
)
def test_models_are_had_back_if_their_changes_have_the_rank(kind, norms, bases, tmp_path):
    models = [tuned(kind, tmp_path / str(seed), seed, norms) for seed in (1, 2)]
    loaded, report = merged(kind, bases[kind], [tmp_path / "1", tmp_path / "2"], tmp_path / "rmm")
    assert report.error < 1e-5
    assert [note.split(":")[0] for note in report.notes] == ["kept whole for each task"]
    for task, model in zip("12", models, strict=True):
        loaded.set_task(task)
        assert_close(tiny.run(loaded.base_model.model), tiny.run(model), rtol=1e-3, atol=1e-4)


def test_heads_of_a_size_of_their_own_are_kept(bases, tmp_path):
    """The base has no head at all."""
    models = [tuned("classifier", tmp_path / str(seed), seed, size=size) for seed, size in ((1, 2), (2, 5))]
    loaded, report = merged("classifier", bases["headless"], [tmp_path / "1", tmp_path / "2"], tmp_path / "rmm")
    assert report.notes == ["kept whole for each task: classifier"]
    for task, model in zip("12", models, strict=True):
        loaded.set_task(task)
        assert_close(tiny.run(loaded.base_model.model), tiny.run(model), rtol=1e-3, atol=1e-4)


def test_what_is_lost_counts_and_is_named(bases, tmp_path):
    models = [tuned("bert", tmp_path / str(seed), seed, ("word_embeddings", "bias")) for seed in (1, 2)]
    loaded, report = merged("bert", bases["bert"], [tmp_path / "1", tmp_path / "2"], tmp_path / "rmm", rank=1)
    for task, model in zip("12", models, strict=True):
        loaded.set_task(task)
        whole = PeftModel.from_pretrained(tiny.model("bert"), tmp_path / "rmm")
        whole.set_task(task)
        found = difference(*(without_norms(each) for each in (whole.merge_and_unload(), model)), tiny.model("bert"))
        assert report.tasks[task] == pytest.approx(found, rel=1e-3)
    notes = [note for note in report.notes if "not in the adapter" in note]
    assert [note[:2] for note in notes] == ["1:", "2:"]
    assert all("embeddings.word_embeddings.weight" in note for note in notes)


def without_norms(model):
    """What of a model is not kept whole."""
    return {name: tensor for name, tensor in model.state_dict().items() if "LayerNorm" not in name}


def test_adapters_and_models_are_held_together(bases, tmp_path):
    model = tuned("llama", tmp_path / "full", 1)
    torch.manual_seed(2)
    adapter = tiny.move(get_peft_model(tiny.model("llama"), LoraConfig(r=2, target_modules=["q_proj"])), 2, 0.2).eval()
    adapter.save_pretrained(tmp_path / "lora")
    loaded, report = merged("llama", bases["llama"], [tmp_path / "lora", tmp_path / "full"], tmp_path / "rmm")
    assert report.error < 1e-5
    for task, wanted in {"lora": adapter.base_model.model, "full": model}.items():
        loaded.set_task(task)
        assert_close(tiny.run(loaded.base_model.model), tiny.run(wanted), rtol=1e-3, atol=1e-4)


def test_a_base_and_a_rank_must_be_stated(bases, tmp_path):
    tuned("llama", tmp_path / "1", 1)
    tuned("llama", tmp_path / "2", 2)
    models = [tmp_path / "1", tmp_path / "2"]
    recipe = {"merge_method": "rmm", "models": [{"model": str(model)} for model in models]}
    with pytest.raises(ValueError, match=r"are no adapters. If they are fine-tuned models, state the `base_model`"):
        merge_adapter_files(recipe, tmp_path / "out")
    with pytest.raises(ValueError, match=r"has no low rank of its own: state the `rank`"):
        merged("llama", bases["llama"], models, tmp_path / "out", rank=None)
    with pytest.raises(ValueError, match="there is nothing to reduce"):
        merged("llama", bases["llama"], [bases["llama"], models[0]], tmp_path / "out")
    assert not (tmp_path / "out").exists()
