"""Adapters from fine-tuned models."""

import shutil

import pytest
import torch
from adapters import tiny
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, PeftModel
from torch import nn
from torch.testing import assert_close

from adapter_merging.zoo import difference
from hf_modular import FLoRAConfig, HUTConfig, SSFConfig, extract_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "wpe"], "bert": ["query", "output.dense"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folders = {}
    for kind in TARGETS:
        folders[kind] = tmp_path_factory.mktemp(kind)
        tiny.model(kind).save_pretrained(folders[kind])
    return folders


def tuned(kind, folder, change, names=None):
    """A fine-tuned model, each weight of the named layers changed."""
    model = tiny.model(kind)
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(tuple(names or TARGETS[kind])):
                change(module, rng)
    model.save_pretrained(folder)
    return model.state_dict()


def low_rank(module, rng):
    out, columns = module.weight.shape
    module.weight += torch.randn(out, 2, generator=rng) @ torch.randn(2, columns, generator=rng) * 0.1


def dense(module, rng):
    module.weight += torch.randn(module.weight.shape, generator=rng) * 0.05
    if getattr(module, "bias", None) is not None:
        module.bias += torch.randn(module.bias.shape, generator=rng) * 0.05


def scaled(module, rng):
    scale = 1 + torch.randn(module.weight.shape[0], generator=rng) * 0.1
    module.weight *= scale.unsqueeze(1)
    if module.bias is not None:
        module.bias *= scale


def back(kind, folder):
    return PeftModel.from_pretrained(tiny.model(kind), folder).merge_and_unload().state_dict()


@pytest.mark.parametrize("kind", TARGETS)
def test_lora_finds_a_change_of_its_rank(kind, bases, tmp_path):
    wanted = tuned(kind, tmp_path / "tuned", low_rank)
    report = extract_adapter(
        bases[kind], tmp_path / "tuned", LoraConfig(r=2, target_modules=TARGETS[kind]), tmp_path / "out"
    )
    assert report.error < 1e-5
    assert report.notes == []
    assert difference(back(kind, tmp_path / "out"), wanted, tiny.model(kind)) < 1e-5


def test_lora_is_the_nearest_of_its_rank(bases, tmp_path):
    wanted = tuned("llama", tmp_path / "tuned", dense)
    config = LoraConfig(
        r=4, lora_alpha=16, use_rslora=True, target_modules=TARGETS["llama"], rank_pattern={"q_proj": 6}
    )
    with pytest.warns(UserWarning, match="relative error of 0"):
        report = extract_adapter(bases["llama"], tmp_path / "tuned", config, tmp_path / "out")
    start = tiny.model("llama").state_dict()
    for layer, facts in report.layers.items():
        delta = (wanted[f"{layer}.weight"] - start[f"{layer}.weight"]).double()
        singular = torch.linalg.svdvals(delta).square()
        assert facts["rank"] == (6 if "q_proj" in layer else 4)
        assert facts["error"] == pytest.approx(
            float((singular[facts["rank"] :].sum() / singular.sum()).sqrt()), rel=1e-4
        )
    found = back("llama", tmp_path / "out")
    assert difference(found, wanted, tiny.model("llama")) == pytest.approx(report.error, rel=1e-4)
    loaded = PeftModel.from_pretrained(tiny.model("llama"), tmp_path / "out").peft_config["default"]
    assert (loaded.r, loaded.lora_alpha, loaded.use_rslora) == (4, 16, True)


@pytest.mark.parametrize("config", [SSFConfig(), HUTConfig(r=1)], ids=["ssf", "hut"])
def test_scalings_are_found(config, bases, tmp_path):
    wanted = tuned("bert", tmp_path / "tuned", scaled)
    config.target_modules = set(TARGETS["bert"])
    report = extract_adapter(bases["bert"], tmp_path / "tuned", config, tmp_path / "out")
    assert report.error < 1e-4
    assert difference(back("bert", tmp_path / "out"), wanted, tiny.model("bert")) < 1e-4


@pytest.mark.parametrize(
    "config",
    [SSFConfig(), HUTConfig(r=3), HUTConfig(r=3, form="low_rank"), FLoRAConfig(r=5), LoraConfig(r=5)],
    ids=["ssf", "hut", "hut-low-rank", "flora", "lora"],
)
def test_the_error_is_that_of_the_loaded_adapter(config, bases, tmp_path):
    wanted = tuned("bert", tmp_path / "tuned", dense)
    config.target_modules = set(TARGETS["bert"])
    report = extract_adapter(bases["bert"], tmp_path / "tuned", config, tmp_path / "out", warn_above=1.1)
    assert 0.1 < report.error < 1.0
    assert difference(back("bert", tmp_path / "out"), wanted, tiny.model("bert")) == pytest.approx(
        report.error, rel=1e-3
    )


def test_what_is_saved_whole_and_what_is_lost(bases, tmp_path):
    names = [*TARGETS["llama"], "lm_head", "input_layernorm"]
    wanted = tuned(
        "llama", tmp_path / "tuned", lambda m, rng: (dense if m.weight.ndim == 1 else low_rank)(m, rng), names
    )
    config = LoraConfig(r=2, target_modules=TARGETS["llama"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    report = extract_adapter(bases["llama"], tmp_path / "tuned", config, tmp_path / "out")
    (note,) = report.notes
    assert note.startswith("not in the adapter, 0.0")
    assert note.count("input_layernorm") == 3
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").merge_and_unload()
    found = model.state_dict()
    assert torch.equal(found["lm_head.weight"], wanted["lm_head.weight"])
    norms = {name: value for name, value in wanted.items() if "layernorm" in name}
    start = tiny.model("llama").state_dict()
    lost = sum(float((value - start[name]).square().sum()) for name, value in norms.items())
    change = sum(float((wanted[n] - start[n]).square().sum()) for n in wanted if "lm_head" not in n)
    assert report.error == pytest.approx((lost / change) ** 0.5, rel=1e-3)


def test_a_head_that_the_base_has_not(bases, tmp_path):
    """BertModel and a classifier on it: names with a prefix, and tensors that only one of them has."""
    import transformers as tf

    torch.manual_seed(1)
    config = tf.BertConfig.from_pretrained(bases["bert"], num_labels=3)
    model = tf.BertForSequenceClassification(config)
    model.bert.load_state_dict(tiny.model("bert").state_dict())
    with torch.no_grad():
        low_rank(model.bert.encoder.layer[0].attention.self.query, torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "tuned")
    lora = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    report = extract_adapter(bases["bert"], tmp_path / "tuned", lora, tmp_path / "out")
    assert report.error < 1e-5
    base = tf.BertForSequenceClassification.from_pretrained(bases["bert"], num_labels=3)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    assert_close(tiny.run(loaded), tiny.run(model.eval()), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_extracted_is_refused(bases, tmp_path):
    tuned("llama", tmp_path / "tuned", low_rank)
    with pytest.raises(ValueError, match=r"are fitted by .*but got IA3Config"):
        extract_adapter(
            bases["llama"],
            tmp_path / "tuned",
            IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
            tmp_path / "out",
        )
    with pytest.raises(ValueError, match=r"Only plain LoRA can be fitted"):
        extract_adapter(
            bases["llama"], tmp_path / "tuned", LoraConfig(use_dora=True, target_modules=["q_proj"]), tmp_path / "out"
        )
    shutil.rmtree(tmp_path / "tuned")
    model = tiny.model("llama")
    model.model.layers[0].self_attn.q_proj = nn.Linear(32, 16, bias=False)
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(
        ValueError, match=r"A layer must keep its shape, but 'model.layers.0.self_attn.q_proj' is \(32, 32\)"
    ):
        extract_adapter(bases["llama"], tmp_path / "tuned", LoraConfig(target_modules=["q_proj"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_adapter_is_written_for_its_base(bases, tmp_path):
    tuned("llama", tmp_path / "tuned", low_rank)
    config = LoraConfig(r=2, target_modules="all-linear", exclude_modules=["v_proj"])
    extract_adapter(str(bases["llama"]), str(tmp_path / "tuned"), config, tmp_path / "out")
    saved = LoraConfig.from_pretrained(tmp_path / "out")
    assert saved.base_model_name_or_path == str(bases["llama"])
    assert "q_proj" in saved.target_modules
    assert config.target_modules == "all-linear"


@pytest.mark.parametrize("config", [FLoRAConfig(ranks=[2, 3, 2, 2], scale=2), LoraConfig(r=3)], ids=["flora", "lora"])
def test_convolutions_too(config, tmp_path):
    """The patches of a vision transformer: a kernel whose change has the ranks along its axes."""
    base = tiny.model("vit")
    base.save_pretrained(tmp_path / "base")
    rng = torch.Generator().manual_seed(5)
    core = torch.randn(3, 2, 2, 2, generator=rng)  # (out, in, *kernel)
    factors = [torch.randn(side, rank, generator=rng) for side, rank in zip((32, 3, 4, 4), core.shape, strict=True)]
    change = torch.einsum("abcd,oa,ib,hc,wd->oihw", core, *factors)
    weight = base.get_submodule("vit.embeddings.patch_embeddings.projection").weight
    with torch.no_grad():
        weight += 0.1 * change
    base.save_pretrained(tmp_path / "tuned")
    config.target_modules = ["projection"]
    report = extract_adapter(tmp_path / "base", tmp_path / "tuned", config, tmp_path / "out")
    assert report.error < 1e-4
    assert difference(back("vit", tmp_path / "out"), base.state_dict(), tiny.model("vit")) < 1e-4
