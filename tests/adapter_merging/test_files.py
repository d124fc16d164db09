"""Adapters in folders: merged without a model as they are in one."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from adapters import tiny
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from adapter_merging.zoo import NAMES, TOKENS, adapted, difference, lora, merged_weights, zoo
from hf_modular import FLoRAConfig, HUTConfig, MoSConfig, SSFConfig, merge_adapter_files, merge_adapters
from hf_modular.adapter_merging import AdapterRecipe, AdapterReport
from hf_modular.merging import TaskArithmeticConfig, TIESConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:.*lora_bias=True.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*have invalid shape.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]


def saved(model, folder, base=None):
    """Each adapter of the model in a folder of its own."""
    for name, config in model.peft_config.items():
        config.base_model_name_or_path = base and str(base)
        model.save_pretrained(folder, selected_adapters=[name])
    return [str(folder / name) for name in model.peft_config]


def recipe(method, adapters, weights, **more):
    entries = [{"model": str(a), "parameters": {"weight": w}} for a, w in zip(adapters, weights, strict=True)]
    return {"merge_method": method, "models": entries, **more}


CASES = {
    "ranks": ({"r": 2, "lora_alpha": 16}, {"r": 5, "lora_alpha": 3, "use_rslora": True}),
    "patterns": ({"rank_pattern": {"fc": 3, "^conv2": 2}, "alpha_pattern": {"free": 20}}, {"r": 2}),
    "biases": (
        {"lora_bias": True, "target_modules": ["fc", "conv1"]},
        {"lora_bias": True, "target_modules": ["fc", "gpt"]},
    ),
    "heads": ({"modules_to_save": ["head"]}, {"modules_to_save": ["head"]}),
}


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("case", CASES)
def test_lora_adapters_merge_as_in_a_model(case, method, tmp_path):
    model = adapted(*(lora(**settings) for settings in CASES[case]))
    folders = saved(model, tmp_path)
    more = {"parameters": {"density": 0.5, "election": "symmetric"}, "rank": 24} if method == "ties" else {}
    if (case, method) == ("heads", "ties"):
        with pytest.raises(ValueError, match=r"'head.bias' was trained whole .* State the `base_model`"):
            merge_adapter_files(recipe(method, folders, [1, 2], **more), tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    config = TIESConfig(density=0.5) if method == "ties" else TaskArithmeticConfig(normalize=True)
    live = merge_adapters(model, NAMES[:2], config, weights=[1, 2], rank=more.get("rank"))
    report = merge_adapter_files(recipe(method, folders, [1, 2], **more), tmp_path / "out")
    assert report.layers.keys() == live.layers.keys()
    assert report == AdapterReport.load(tmp_path / "out")
    loaded = PeftModel.from_pretrained(zoo(), tmp_path / "out", adapter_name="merged").eval()
    assert difference(merged_weights(loaded, "merged"), merged_weights(model, "merged"), zoo()) < 2e-6
    model.set_adapter("merged")
    assert_close(loaded(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)


def test_the_recipe_in_the_folder_gives_the_same_bits(tmp_path):
    folders = saved(adapted(lora(), lora(r=2)), tmp_path)
    merge_adapter_files(recipe("dare", folders, [1, 0.5], seed=3, rank=6, warn_above=1), tmp_path / "one")
    merge_adapter_files(tmp_path / "one" / "merge_recipe.yaml", tmp_path / "two")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = merge_adapter_files(tmp_path / "one" / "merge_recipe.yaml", tmp_path / "three", seed=4)
    assert other.settings["seed"] == 4
    assert not torch.equal(
        next(iter(load_file(tmp_path / "three" / "adapter_model.safetensors").values())), next(iter(one.values()))
    )


def test_the_result_has_the_dtype_of_the_adapters(tmp_path):
    folders = saved(adapted(lora(), lora()), tmp_path)
    for folder in folders:
        path = f"{folder}/adapter_model.safetensors"
        save_file({name: t.bfloat16() for name, t in load_file(path).items()}, path)
    merge_adapter_files(recipe("linear", folders, [1, 1]), tmp_path / "out")
    assert {t.dtype for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {torch.bfloat16}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Tiny models of transformers in folders."""
    folders = {}
    for kind in ("llama", "gpt2", "bert"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        tiny.model(kind).save_pretrained(folders[kind])
    return folders


TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "bert": ["query", "word_embeddings"]}

# (config, whether its effect depends on the base weights)
TYPES = {
    "dora": (lambda t: LoraConfig(r=2, use_dora=True, target_modules=t), True),
    "adalora": (lambda t: AdaLoraConfig(init_r=2, target_modules=t, total_step=10), False),
    "loha": (lambda t: LoHaConfig(r=2, target_modules=t), True),
    "ia3": (lambda t: IA3Config(target_modules=t, feedforward_modules=t[1:]), True),
    "ssf": (lambda t: SSFConfig(target_modules=t), True),
    "hut": (lambda t: HUTConfig(r=2, target_modules=t), True),
    "flora": (lambda t: FLoRAConfig(r=2, target_modules=t), False),
    "mos": (lambda t: MoSConfig(shards=2, target_modules=t), False),
}


def one(config, kind, seed):
    torch.manual_seed(seed)
    return tiny.move(get_peft_model(tiny.model(kind), config), seed, 0.2).eval()


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", TYPES)
def test_other_types_are_read_on_a_base_without_memory(name, kind, bases, tmp_path):
    make, needs_weights = TYPES[name]
    if (name, kind) == ("loha", "gpt2"):
        pytest.skip("PEFT's LoHa has no layer for Conv1D")
    no_embeddings = name in ("adalora", "hut", "ia3", "loha", "ssf")
    targets = ["query", "output.dense"] if kind == "bert" and no_embeddings else TARGETS[kind]
    models = [one(make(targets), kind, seed) for seed in (1, 2)]
    base = tiny.model(kind).state_dict()
    folder = bases[kind]
    if not needs_weights:  # the config is enough
        folder = tmp_path / "config"
        folder.mkdir()
        shutil.copy(bases[kind] / "config.json", folder)
    for i, model in enumerate(models):
        model.peft_config["default"].base_model_name_or_path = str(folder)
        model.save_pretrained(tmp_path / str(i))
    whole = [model.merge_and_unload().state_dict() for model in models]
    wanted = {n: w + sum(c * (m[n] - w) for m, c in zip(whole, (0.7, -0.2), strict=True)) for n, w in base.items()}
    recipes = recipe("task_arithmetic", [tmp_path / "0", tmp_path / "1"], [0.7, -0.2], rank=100)
    report = merge_adapter_files(recipes, tmp_path / "out")
    assert report.error < 1e-5
    loaded = PeftModel.from_pretrained(tiny.model(kind), tmp_path / "out")
    assert loaded.peft_config["default"].peft_type == "LORA"
    assert difference(loaded.merge_and_unload().state_dict(), wanted, tiny.model(kind)) < 2e-5


def test_adapters_of_different_types_merge_in_weight_space(bases, tmp_path):
    configs = [LoraConfig(r=2, target_modules=["q_proj"]), HUTConfig(r=2, target_modules=["q_proj", "v_proj"])]
    models = [one(config, "llama", 1) for config in configs]
    for i, model in enumerate(models):
        model.peft_config["default"].base_model_name_or_path = str(bases["llama"])
        model.save_pretrained(tmp_path / str(i))
    base = tiny.model("llama").state_dict()
    whole = [model.merge_and_unload().state_dict() for model in models]
    wanted = {n: (whole[0][n] + whole[1][n]) / 2 for n in base}
    merge_adapter_files(recipe("linear", [tmp_path / "0", tmp_path / "1"], [1, 1], rank=32), tmp_path / "out")
    loaded = PeftModel.from_pretrained(tiny.model("llama"), tmp_path / "out").merge_and_unload().state_dict()
    assert difference(loaded, wanted, tiny.model("llama")) < 2e-6


def test_what_is_tied_stays_tied(tmp_path):
    """An embedding that adapters have trained whole, and the head with it."""
    config = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    models = [one(LoraConfig(r=2, **config), "gemma", seed) for seed in (1, 2)]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i))
    whole = [model.merge_and_unload().state_dict() for model in models]
    wanted = {name: (whole[0][name] + whole[1][name]) / 2 for name in whole[0]}
    merge_adapter_files(recipe("linear", [tmp_path / "0", tmp_path / "1"], [1, 1]), tmp_path / "out")
    merged = PeftModel.from_pretrained(tiny.model("gemma"), tmp_path / "out").merge_and_unload()
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    assert difference(merged.state_dict(), wanted, tiny.model("gemma")) < 2e-6


def biased(bases, folder, bias, *configs):
    """Folders of adapters of a BERT that have trained biases, and the merged models."""
    models = [one(replace(config, bias=bias), "bert", seed) for seed, config in enumerate(configs)]
    for i, model in enumerate(models):
        model.peft_config["default"].base_model_name_or_path = str(bases["bert"])
        model.save_pretrained(folder / str(i))
    return [folder / str(i) for i in range(len(models))], [model.merge_and_unload().state_dict() for model in models]


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (1, -0.4)])
def test_trained_biases(bias, weights, bases, tmp_path):
    """Of layers that have adapters, which in a file lie inside of these, and of others."""
    configs = [LoraConfig(r=2, target_modules=["query"]), LoraConfig(r=3, target_modules=["query", "output.dense"])]
    folders, whole = biased(bases, tmp_path, bias, *configs)
    base = tiny.model("bert").state_dict()
    changed = [name for name in base if name.endswith("bias") and not torch.equal(whole[1][name], base[name])]
    assert len(changed) == (6 if bias == "lora_only" else len([n for n in base if n.endswith("bias")]))
    wanted = {n: w + sum(c * (m[n] - w) for c, m in zip(weights, whole, strict=True)) for n, w in base.items()}
    recipes = recipe("task_arithmetic", folders, weights, base_model=str(bases["bert"]))
    merge_adapter_files(recipes, tmp_path / "out")
    found = PeftModel.from_pretrained(tiny.model("bert"), tmp_path / "out").merge_and_unload().state_dict()
    assert difference(found, wanted, tiny.model("bert")) < 2e-6


def test_biases_that_an_adapter_rewrites(bases, tmp_path):
    """Its parameters can be merged, but what it does to the weights depends on the biases."""
    config = SSFConfig(target_modules=["query"])
    folders, _ = biased(bases, tmp_path, "hfm_ssf_only", config, config)
    with pytest.raises(ValueError, match=r"HFM_SSF\) has trained the biases of layers that it adapts, .*query"):
        merge_adapter_files(recipe("linear", folders, [1, 1], rank=4), tmp_path / "out")
    merge_adapter_files(recipe("linear", folders, [1, 1], space="parameters"), tmp_path / "out")
    first, second, found = (load_file(f / "adapter_model.safetensors") for f in (*folders, tmp_path / "out"))
    assert any(name.endswith("query.base_layer.bias") for name in found)
    assert_close(found, {name: (first[name] + second[name]) / 2 for name in first})
    PeftModel.from_pretrained(tiny.model("bert"), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"merge_method": "tis"}, "there is no method 'tis'.* did you mean 'ties'"),
        ({"ranks": 3}, "there is no such key, there are .*'rank'"),
        ({"rank": 0}, "`rank` must be a positive integer"),
        ({"rank": 1.5}, "`rank` must be a positive integer, or a share"),
        ({"space": "weight"}, "space"),
        ({"space": "parameters", "rank": 3}, "`rank` and `into` must not be given"),
        ({"into": {"r": 3}}, "`into` must name one of"),
        ({"into": {"peft_type": "LORA", "rr": 3}}, "rr"),
        (
            {"parameters": {"density": 2}, "merge_method": "ties"},
            r"parameters\.density: `density` must be in \[0, 1\]",
        ),
        ({"tokenizer_source": "base"}, "there is no such key"),
    ],
)
def test_a_recipe_is_read_strictly(changes, words):
    with pytest.raises(ValueError, match=words):
        AdapterRecipe.load(recipe("linear", ["one", "two"], [1, 1]) | changes)


def test_an_adapter_may_be_listed_once():
    with pytest.raises(ValueError, match=r"models\[1\]\.model: each adapter may be listed once"):
        AdapterRecipe.load(recipe("linear", ["one", "one"], [1, 1]))


def test_nothing_is_written_where_something_is(tmp_path):
    folders = saved(adapted(lora(), lora()), tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="must be absent or empty"):
        merge_adapter_files(recipe("linear", folders, [1, 1]), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    merge_adapter_files(recipe("linear", folders, [1, 1]), tmp_path / "out", overwrite=True)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "mine.txt",
        "adapter_config.json",
        "adapter_model.safetensors",
        "merge_report.json",
        "merge_recipe.yaml",
    }
    with pytest.raises(ValueError, match="must not be one of the adapters"):
        merge_adapter_files(recipe("linear", folders, [1, 1]), folders[0], overwrite=True)


def test_a_folder_without_an_adapter_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder ./nowhere"):
        merge_adapter_files(recipe("linear", ["./nowhere", "x"], [1, 1]), tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"is no adapter: it has no adapter_config\.json"):
        merge_adapter_files(recipe("linear", [tmp_path], [1]), tmp_path / "out")


def test_a_damaged_config_is_refused(tmp_path):
    folders = saved(adapted(lora(), lora()), tmp_path)
    path = tmp_path / "first" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"r": 7}))
    with pytest.raises(
        ValueError, match=r"must be \(r, in\) and \(out, r\) with the config's r, but for layer 'conv1'"
    ):
        merge_adapter_files(recipe("linear", folders, [1, 1]), tmp_path / "out")


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A model that transformers saves by other names than it has, with two adapters that depend on its weights."""
    folder = tmp_path_factory.mktemp("seeing")
    sizes = {"hidden_size": 8, "intermediate_size": 6, "num_attention_heads": 2, "num_hidden_layers": 1}
    text, vision = LlamaConfig(vocab_size=24, **sizes), CLIPVisionConfig(image_size=8, patch_size=4, **sizes)
    torch.manual_seed(0)
    LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision)).save_pretrained(folder / "base")
    for name in NAMES[:2]:
        config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
        model = get_peft_model(LlavaForConditionalGeneration.from_pretrained(folder / "base"), config)
        tiny.move(model, len(name), 0.1)
        model.save_pretrained(folder / name)
    return folder


def test_a_base_that_is_saved_by_other_names(seeing, tmp_path):
    merge_adapter_files(
        recipe("linear", [seeing / name for name in NAMES[:2]], [1, 1]) | {"rank": 8}, tmp_path / "out"
    )
    base = LlavaForConditionalGeneration.from_pretrained(seeing / "base")
    merged = [
        PeftModel.from_pretrained(copy.deepcopy(base), folder).merge_and_unload().state_dict()
        for folder in (seeing / NAMES[0], seeing / NAMES[1], tmp_path / "out")
    ]
    for name, tensor in merged[2].items():
        assert_close(tensor, (merged[0][name] + merged[1][name]) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed")
def test_a_quantised_base_is_refused(seeing, tmp_path):
    shutil.copytree(seeing / "base", tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    settings = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    content = recipe(
        "linear", [seeing / name for name in NAMES[:2]], [1, 1], base_model=str(tmp_path / "base"), rank=8
    )
    with pytest.raises(ValueError, match="is quantised"):
        merge_adapter_files(content, tmp_path / "out")
