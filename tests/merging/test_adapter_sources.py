"""A model with an adapter as a source: the tensors that PEFT's own merging gives, without the model in memory."""

import json
import warnings

import peft
import pytest
import torch
import transformers as tf
from adapters import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import hf_modular
from hf_modular.adapters import RMMAdapterConfig
from hf_modular.merging import merge
from hf_modular.merging.sources._sources import open_source

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*Please unload it first:UserWarning"),
]

TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "bert": ["query", "output.dense"],
    "gpt2": ["c_attn", "c_fc"],
    "t5": ["q", "wi"],
    "vit": ["q_proj", "fc1"],
}
EMBEDDING = {"llama": "embed_tokens", "bert": "word_embeddings", "gpt2": "wte", "vit": "projection"}
NORM = {"llama": "input_layernorm", "bert": "LayerNorm", "gpt2": "ln_1", "t5": "layer_norm", "vit": "layernorm_before"}


def lora(**settings):
    return lambda kind: LoraConfig(**{"r": 3, "target_modules": TARGETS[kind], **settings})


def of(config, **settings):
    """A config for the usual targets."""
    return lambda kind: config(target_modules=TARGETS[kind], **settings)


# Each type and setting that can be merged. A config class that this PEFT does not have is left out.
TYPES = {
    "lora": lora(),
    "rslora": lora(use_rslora=True),
    "patterns": lambda k: LoraConfig(
        target_modules=TARGETS[k], rank_pattern={TARGETS[k][0]: 2}, alpha_pattern={TARGETS[k][1]: 5}
    ),
    "dora": lora(use_dora=True),
    "bias_all": lora(bias="all"),
    "bias_lora": lora(bias="lora_only"),
    "modules_to_save": lambda k: LoraConfig(target_modules=TARGETS[k], modules_to_save=[NORM[k]]),
    "pissa": lora(init_lora_weights="pissa"),
    "olora": lora(init_lora_weights="olora"),
    "mica": lora(init_lora_weights="mica"),
    "kasa": lora(kasa_config=peft.KasaConfig()),
    "bdlora": lambda k: LoraConfig(
        r=4,
        target_modules=TARGETS[k],
        use_bdlora=peft.BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["down_proj"], nblocks=2),
    ),
    "monteclora": lora(monteclora_config=peft.MontecloraConfig()),
    "velora": lora(velora_config=peft.VeloraConfig()),
    "adalora": of(peft.AdaLoraConfig, init_r=3, total_step=10),
    "adamss": of(peft.AdamssConfig, r=4),
    "boft": of(peft.BOFTConfig, boft_block_size=4),
    "c3a": of(peft.C3AConfig, block_size=8),
    "deft": of(peft.DeftConfig, r=4),
    "delora": of(peft.DeloraConfig, r=4),
    "fourierft": of(peft.FourierFTConfig, n_frequency=20),
    "glora": of(peft.GloraConfig, r=4),
    "gralora": of(peft.GraloraConfig, r=4),
    "hira": of(peft.HiraConfig, r=4),
    "hra": of(peft.HRAConfig, r=4),
    "ia3": lambda k: peft.IA3Config(target_modules=TARGETS[k], feedforward_modules=TARGETS[k][1:]),
    "ln_tuning": lambda k: peft.LNTuningConfig(target_modules=[NORM[k]]),
    "loha": of(peft.LoHaConfig, r=3),
    "lokr": of(peft.LoKrConfig, r=3),
    "miss": of(peft.MissConfig, r=4),
    "miss_bat": of(peft.MissConfig, r=4, init_weights="bat"),
    "oft": of(peft.OFTConfig, oft_block_size=4),
    "osf": of(peft.OSFConfig),
    "peanut": of(peft.PeanutConfig, r=4),
    "psoft": of(peft.PsoftConfig, r=4),
    "pvera": lambda k: peft.PveraConfig(r=4, target_modules=TARGETS[k][:1]),
    "randlora": of(peft.RandLoraConfig, r=4),
    "road": of(peft.RoadConfig, group_size=4),
    "shira": of(peft.ShiraConfig, r=4),
    "supertuning": of(peft.SupertuningConfig),
    "tinylora": of(peft.TinyLoraConfig),
    "unilora": of(peft.UniLoraConfig, r=4, theta_d_length=64),
    "vblora": of(peft.VBLoRAConfig, r=4, vector_length=8, num_vectors=8, topk=2),
    "vera": lambda k: peft.VeraConfig(r=4, target_modules=TARGETS[k][:1]),
    "vera_without_projection": lambda k: peft.VeraConfig(r=4, target_modules=TARGETS[k][:1], save_projection=False),
    "waveft": of(peft.WaveFTConfig, n_frequency=20),
    "flora": of(hf_modular.FLoRAConfig, r=3),
    "hut": of(hf_modular.HUTConfig, r=3),
    "mos": of(hf_modular.MoSConfig, shards=2),
    "rmm": of(RMMAdapterConfig, tasks=["a", "b"]),
    "ssf": of(hf_modular.SSFConfig),
}
EMBEDDINGS = {
    "lora_embedding": lambda k: LoraConfig(r=3, target_modules=[*TARGETS[k], EMBEDDING[k]]),
    "tokens": lambda k: LoraConfig(target_modules=TARGETS[k], trainable_token_indices={EMBEDDING[k]: [1, 4, 7]}),
    "trainable_tokens": lambda k: peft.TrainableTokensConfig(target_modules=[EMBEDDING[k]], token_indices=[1, 3]),
}
CASES = [
    *(("llama", name) for name in [*TYPES, *EMBEDDINGS]),
    *(("bert", name) for name in ("dora", "ia3", "loha", "hut", "ssf", "bias_all", "beft", "lora_bias", *EMBEDDINGS)),
    *(("gpt2", name) for name in ("lora", "dora", "ia3", "vera", "flora", "bias_all", "lora_bias", "tokens")),
    *(("t5", name) for name in ("lora", "modules_to_save", "hra", "mos", "ln_tuning")),
    *(("vit", name) for name in ("lora", "dora", "rmm", "lora_embedding", "conv_loha", "conv_oft")),
]
MORE = {
    "beft": of(peft.BeftConfig),
    "lora_bias": lora(lora_bias=True),
    "conv_loha": lambda k: peft.LoHaConfig(r=3, target_modules=[EMBEDDING[k]]),
    "conv_oft": lambda k: peft.OFTConfig(oft_block_size=4, target_modules=[EMBEDDING[k]]),
}
ALL = TYPES | EMBEDDINGS | MORE


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Tiny models of transformers in folders."""
    folders = {}
    for kind in (*TARGETS, "gemma", "classifier"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        tiny.model(kind).save_pretrained(folders[kind])
    return folders


def adapter(kind, config, folder, base):
    """An adapter in a folder, far from where it starts."""
    torch.manual_seed(1)
    model = tiny.move(get_peft_model(tiny.model(kind), config), 1, 0.2).eval()
    model.peft_config["default"].base_model_name_or_path = str(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def with_peft(kind, folder, saved):
    """What PEFT makes of the model and the adapter, as a checkpoint."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PeftModel.from_pretrained(tiny.model(kind), folder).merge_and_unload().save_pretrained(saved)
    return load_file(saved / "model.safetensors")


def values(source):
    found = {}
    for name, info in source.tensors.items():
        out = torch.empty(info.numel)
        source.fill(name, 0, out)
        found[name] = out.view(info.shape)
    return found


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_each_type_gives_what_peft_merges(kind, name, bases, tmp_path):
    folder = adapter(kind, ALL[name](kind), tmp_path / "adapter", bases[kind])
    wanted = with_peft(kind, folder, tmp_path / "merged")
    source = open_source(f"{bases[kind]}+{folder}")
    assert not source.problems
    found = values(source)
    assert found.keys() == wanted.keys()
    start = load_file(bases[kind] / "model.safetensors")
    assert any(not torch.equal(start[each], wanted[each]) for each in wanted)
    for each, tensor in wanted.items():
        torch.testing.assert_close(found[each], tensor, rtol=1e-6, atol=1e-6)


def outputs(model):
    return tiny.run(model.eval())


def merged(tmp_path, model, **more):
    """The one model of a recipe, merged into a folder."""
    merge({"merge_method": "passthrough", "models": [{"model": str(model)}], **more}, tmp_path / "out", progress=False)
    return tmp_path / "out"


@pytest.mark.parametrize("name", ["lora_embedding", "tokens", "whole_embedding", "head"])
def test_what_a_model_ties_comes_apart_where_the_adapter_changes_one_of_it(name, bases, tmp_path):
    """PEFT's merging in place would change the head with the embedding."""
    makers = {
        **EMBEDDINGS,
        "whole_embedding": lambda k: LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        "head": lambda k: LoraConfig(r=3, target_modules=["q_proj", "lm_head"]),
    }
    EMBEDDING["gemma"], TARGETS["gemma"] = EMBEDDING["llama"], TARGETS["llama"]
    folder = adapter("gemma", makers[name]("gemma"), tmp_path / "adapter", bases["gemma"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(tiny.model("gemma"), folder).eval()
    wanted = outputs(loaded)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        out = merged(tmp_path, f"{bases['gemma']}+{folder}")
    model, info = tf.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(outputs(model), wanted, rtol=1e-4, atol=1e-5)
    apart = name != "tokens"  # there PEFT changes both alike
    assert model.config.tie_word_embeddings is not apart
    assert any("stored apart" in str(note.message) for note in notes) is apart


def test_a_head_that_comes_apart_is_the_bases_in_a_merge(bases, tmp_path):
    config = LoraConfig(r=3, target_modules=["embed_tokens"])
    folder, base = adapter("gemma", config, tmp_path / "adapter", bases["gemma"]), str(bases["gemma"])
    models = [{"model": base, "adapter": str(folder), "parameters": {"weight": 0.5}}]
    with pytest.warns(UserWarning, match=r"lm_head.weight is stored apart"):
        merge(
            {"merge_method": "task_arithmetic", "base_model": base, "models": models}, tmp_path / "out", progress=False
        )
    found = load_file(tmp_path / "out" / "model.safetensors")
    start = load_file(bases["gemma"] / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(found["lm_head.weight"], start)
    assert not torch.equal(found["model.embed_tokens.weight"], start)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("target", ["shared", "embed_tokens", "lm_head"])
def test_three_embeddings_and_a_head_come_apart(target, bases, tmp_path):
    config = LoraConfig(target_modules=[target])
    folder = adapter("t5", config, tmp_path / "adapter", bases["t5"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = outputs(PeftModel.from_pretrained(tiny.model("t5"), folder))
        found = tf.AutoModelForSeq2SeqLM.from_pretrained(merged(tmp_path, f"{bases['t5']}+{folder}"))
    torch.testing.assert_close(outputs(found), wanted, rtol=1e-4, atol=1e-5)


def test_the_head_of_a_task_comes_with_the_adapter(bases, tmp_path):
    """The base is a language model, the adapter was trained with a head for five classes."""
    torch.manual_seed(2)
    kind = tf.LlamaForSequenceClassification
    model = kind.from_pretrained(bases["llama"], num_labels=5, pad_token_id=0)
    model = tiny.move(get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["v_proj"])), 3, 0.2)
    model.save_pretrained(tmp_path / "adapter")
    out = merged(tmp_path, f"{bases['llama']}+{tmp_path / 'adapter'}")
    found, info = tf.AutoModelForSequenceClassification.from_pretrained(out, pad_token_id=0, output_loading_info=True)
    assert not any(info.values())
    assert json.loads((out / "config.json").read_text())["architectures"] == [kind.__name__]
    assert found.config.num_labels == 5
    torch.testing.assert_close(outputs(found), outputs(model), rtol=1e-4, atol=1e-5)


def test_a_grown_vocabulary_comes_with_the_adapter(bases, tmp_path):
    torch.manual_seed(2)
    model = tiny.model("llama")
    model.resize_token_embeddings(53)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "embed_tokens", "lm_head"]))
    tiny.move(model, 3, 0.2).save_pretrained(tmp_path / "adapter")
    found = tf.AutoModelForCausalLM.from_pretrained(merged(tmp_path, f"{bases['llama']}+{tmp_path / 'adapter'}"))
    assert found.config.vocab_size == 53
    torch.testing.assert_close(outputs(found), outputs(model), rtol=1e-4, atol=1e-5)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(vocab_size=50, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, **SMALL)
    ),
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(vocab_size=50, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, **SMALL)
    ),
}


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_that_transformers_stacks_are_taken_apart_again(kind, tmp_path):
    torch.manual_seed(4)
    base = EXPERTS[kind]()
    base.save_pretrained(tmp_path / "base")
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters)
    model = tiny.move(get_peft_model(base, config), 3, 0.2).eval()
    model.save_pretrained(tmp_path / "adapter")
    wanted = model.merge_and_unload()
    wanted.save_pretrained(tmp_path / "merged")
    found = values(open_source(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"))
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == stored.keys()
    for name, tensor in stored.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


def prefix_tuning(kind):
    return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


REFUSED = {
    "prompts": (prefix_tuning, "of type PREFIX_TUNING, which adds keys and values to the attention: it cannot be"),
    "frod": (of(peft.FrodConfig), "of type FROD, which is made of the base weights of several layers at once"),
    "poly": (of(peft.PolyConfig), "of type POLY, which mixes its parts by the task of each sample"),
    "compacter": (
        of(hf_modular.CompacterConfig, phm_dim=2, reduction_factor=2),
        r"\(HFM_COMPACTER\) cannot be merged into layer",
    ),
    "lily": (of(peft.LilyConfig, r=4), r"\(LILY\) cannot be merged into layer 'model.layers.0"),
    "lora_bias": (lora(lora_bias=True), r"cannot be merged into layer .* the base layer has no bias"),
    "beft": (of(peft.BeftConfig), "has no bias"),
    "alora": (lora(alora_invocation_tokens=[1]), r"with alora_invocation_tokens=\[1\] it acts on some tokens only"),
    "random_start": (lora(init_lora_weights="pissa_niter_4"), "changed in a way that cannot be repeated"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_refused_by_name_before_anything_is_written(name, bases, tmp_path):
    make, words = REFUSED[name]
    folder = adapter("llama", make("llama"), tmp_path / "adapter", bases["llama"])
    with pytest.raises(ValueError, match=words):
        merged(tmp_path, f"{bases['llama']}+{folder}")
    assert not (tmp_path / "out").exists()


def test_all_recipes_may_name_adapters(bases, tmp_path):
    one, two = (adapter("llama", lora(r=r)("llama"), tmp_path / str(r), bases["llama"]) for r in (2, 3))
    base = str(bases["llama"])
    entries = [{"model": f"{base}+{one}"}, {"model": base, "adapter": str(two), "parameters": {"weight": 0.5}}]
    recipe = {"merge_method": "task_arithmetic", "base_model": base, "models": entries, "parameters": {"weight": 1}}
    report = merge(recipe, tmp_path / "out", progress=False)
    found, start = load_file(tmp_path / "out" / "model.safetensors"), load_file(bases["llama"] / "model.safetensors")
    first, second = (with_peft("llama", folder, tmp_path / f"m{folder.name}") for folder in (one, two))
    for name, tensor in start.items():
        wanted = tensor + (first[name] - tensor) + (second[name] - tensor) * 0.5
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-5)
    inputs = {entry["model"]: entry for entry in report.inputs}
    described = inputs[f"{base}+{two}"]
    about = {"peft_type": "LORA", "layers": 6, "model_class": "LlamaForCausalLM", "rank": 3}
    assert described["adapter"] == about
    assert described["files"].keys() == {"model.safetensors", "adapter_model.safetensors"}
    again = merge(tmp_path / "out" / "merge_recipe.yaml", tmp_path / "again", workers=1, progress=False)
    assert again.outputs == report.outputs


def test_blocks_and_threads_change_no_bit(bases, tmp_path):
    folder = adapter("llama", ALL["dora"]("llama"), tmp_path / "adapter", bases["llama"])
    source = open_source(f"{bases['llama']}+{folder}")
    whole, name = values(source), "model.layers.1.mlp.down_proj.weight"
    parts = [torch.empty(100) for _ in range(0, 2000, 100)]
    for i, part in enumerate(parts):
        source.fill(name, i * 100, part)
    assert torch.equal(torch.cat(parts), whole[name].flatten()[:2000])
    out = torch.empty(64, dtype=torch.float32)
    source.weights.read_into(name, out, 64)
    assert torch.equal(out, whole[name].flatten()[64:128])


def test_an_adapter_of_another_base_is_refused_unless_any_may_be(bases, tmp_path):
    folder = adapter("llama", lora()("llama"), tmp_path / "adapter", "org/another")
    config = json.loads((folder / "adapter_config.json").read_text())
    reference = f"{bases['llama']}+{folder}"
    with pytest.raises(ValueError, match=r"was trained on org/another, not on .*`adapter_base: any`"):
        merged(tmp_path, reference)
    merged(tmp_path, reference, adapter_base="any")
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/from/here"}))
    [note] = open_source(reference).notes
    assert "was not checked" in note


def damaged(**changes):
    def damage(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def without_a_tensor(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, folder / "adapter_model.safetensors")


DAMAGES = {
    "type": (damaged(peft_type="NEW"), "is of type 'NEW', which PEFT does not know: import the package that has it"),
    "rank": (damaged(r=7), "does not fit .*size mismatch"),
    "large rank": (damaged(r=10**9), "has r=1000000000, which must not be larger than 64, the largest side"),
    "class": (damaged(auto_mapping={"base_model_class": "pipeline"}, target_modules=["x"]), "does not fit"),
    "megatron": (damaged(megatron_config={"a": 1}, megatron_core="antigravity"), "belongs to layers of Megatron"),
    "targets": (damaged(target_modules=["nowhere"]), "does not fit .*Target modules"),
    "tensors": (without_a_tensor, "does not fit .* its file lacks"),
    "file": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "config": (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_adapter_is_refused_by_name(name, bases, tmp_path):
    damage, words = DAMAGES[name]
    folder = adapter("llama", lora()("llama"), tmp_path / "adapter", bases["llama"])
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        open_source(f"{bases['llama']}+{folder}")


def test_an_adapter_of_another_architecture_is_refused(bases, tmp_path):
    folder = adapter("bert", lora()("bert"), tmp_path / "adapter", bases["bert"])
    with pytest.raises(ValueError, match=r"does not fit .*: it has no \['encoder\.layer\.0"):
        open_source(f"{bases['llama']}+{folder}")


@pytest.mark.parametrize("reference", ["one+two+three", "+two", "one+"])
def test_a_reference_with_an_adapter_has_two_parts(reference):
    with pytest.raises(ValueError, match=r"must be given as model\+adapter"):
        open_source(reference)


def test_a_folder_may_have_a_plus_in_its_name(bases, tmp_path):
    plus = tmp_path / "a+b"
    tiny.model("llama").save_pretrained(plus)
    folder = adapter("llama", lora()("llama"), tmp_path / "c+d", plus)
    assert open_source(str(plus)).about == {}
    assert open_source(f"{plus}+{folder}").about["adapter"]["rank"] == 3
