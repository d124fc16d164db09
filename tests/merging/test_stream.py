"""merge(): from checkpoints to a checkpoint that transformers loads, and what it refuses before it writes anything."""

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from hf_modular.checkpoints import Checkpoint, save_checkpoint
from hf_modular.merging import (
    DAREConfig,
    LinearConfig,
    MergeRecipe,
    MergeReport,
    TaskArithmeticConfig,
    merge,
    merge_state_dicts,
)
from hf_modular.merging.runs import _checks as checks

SMALL = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = LlamaConfig(vocab_size=48, num_key_value_heads=2, **SMALL)


def fine_tunes(folder, make, shard_sizes=("5GB", "20KB", "9KB")):
    """A base and two fine-tunes of it, sharded differently."""
    torch.manual_seed(0)
    base = make()
    paths = []
    for i, (name, size) in enumerate(zip(("base", "one", "two"), shard_sizes, strict=True)):
        model = make()
        model.load_state_dict(base.state_dict())
        if i:
            torch.manual_seed(i)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(folder / name, max_shard_size=size)
        paths.append(folder / name)
    return paths


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    return fine_tunes(tmp_path_factory.mktemp("llamas"), lambda: LlamaForCausalLM(LLAMA))


@pytest.fixture
def recipe(llamas):
    base, one, two = llamas
    return MergeRecipe.of(DAREConfig(drop=0.4), [one, two], base, weights=[0.6, 0.5], seed=3)


def read(folder):
    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# --- the result ------------------------------------------------------------------------------------------------------


def test_the_result_loads_and_computes_what_a_merge_by_hand_does(llamas, tmp_path):
    base, one, two = (AutoModelForCausalLM.from_pretrained(path) for path in llamas)
    recipe = MergeRecipe.of(TaskArithmeticConfig(scale=0.7), llamas[1:], llamas[0], weights=[0.9, -0.3])
    merge(recipe, tmp_path / "out")
    with torch.no_grad():
        for w, a, b in zip(base.parameters(), one.parameters(), two.parameters(), strict=True):
            w += 0.7 * (0.9 * (a - w) - 0.3 * (b - w))
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, base(ids).logits)
        assert not torch.allclose(merged(ids).logits, one(ids).logits, atol=1e-2)


@pytest.mark.parametrize(
    ("auto", "make", "example"),
    [
        (AutoModel, lambda: BertModel(BertConfig(vocab_size=48, **SMALL)), {"input_ids": torch.tensor([[3, 1, 4]])}),
        (
            AutoModelForImageClassification,
            lambda: ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, **SMALL)),
            {"pixel_values": torch.rand(2, 1, 8, 8)},
        ),
    ],
    ids=["bert", "vit"],
)
def test_other_kinds_of_models(auto, make, example, tmp_path):
    _, one, two = fine_tunes(tmp_path, make)
    merge(MergeRecipe.of(LinearConfig(), [one, two]), tmp_path / "out")
    merged, a, b = (auto.from_pretrained(path).eval() for path in (tmp_path / "out", one, two))
    with torch.no_grad():
        for x, y in zip(a.parameters(), b.parameters(), strict=True):
            x.add_(y).div_(2)
        torch.testing.assert_close(merged(**example)[0], a(**example)[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_out_dtype(recipe, tmp_path, dtype):
    merge(recipe, tmp_path / "wide")
    merge(recipe.model_copy(update={"out_dtype": dtype}), tmp_path / "out")
    wide, out = read(tmp_path / "wide"), read(tmp_path / "out")
    kind = getattr(torch, dtype)
    assert all(tensor.dtype == kind for tensor in out.values())
    if dtype != "float64":
        assert same(out, {name: tensor.to(kind) for name, tensor in wide.items()})
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == kind
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


EXACT = [(LinearConfig(), None), (TaskArithmeticConfig(scale=0.7), None), (DAREConfig(drop=0.0, scale=0.7), "float64")]


@pytest.mark.parametrize(("method", "dtype"), EXACT, ids=lambda p: getattr(p, "name", p))
def test_results_are_exact_where_the_method_or_the_recipe_says_so(llamas, tmp_path, method, dtype):
    """Weights of which most products and sums are inexact in fp32; the answers are exact fractions, rounded once."""
    base, *models = llamas
    recipe = MergeRecipe.of(method, models, base if method.base_model == "required" else None, weights=[0.3, 0.4567])
    merge(recipe.model_copy(update={"dtype": dtype, "out_dtype": "float32"}), tmp_path / "out")
    sources = [read(path) for path in (base, *models)]
    exact = {
        name: torch.tensor([float(exactly(method, *numbers)) for numbers in zip(*rows, strict=True)])
        for name in sources[0]
        for rows in [[source[name].flatten().tolist() for source in sources]]
    }
    found = read(tmp_path / "out")
    assert same({name: tensor.flatten() for name, tensor in found.items()}, exact)
    if dtype:
        merge(recipe.model_copy(update={"out_dtype": "float32"}), tmp_path / "fp32")
        assert not same(read(tmp_path / "fp32"), found)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def exactly(method, base, one, two):
    base, one, two, a, b = map(Fraction, (base, one, two, 0.3, 0.4567))
    if method.name == "linear":
        return (a * one + b * two) / (a + b)
    return base + Fraction(0.7) * (a * (one - base) + b * (two - base))


def test_inputs_of_different_dtypes(llamas, tmp_path):
    base, one, two = llamas
    narrow = tmp_path / "narrow"
    save_checkpoint(narrow, {name: tensor.bfloat16() for name, tensor in read(one).items()})
    (narrow / "config.json").write_text((one / "config.json").read_text())
    merge(MergeRecipe.of(TaskArithmeticConfig(), [narrow, two], base), tmp_path / "out")
    expected = merge_state_dicts(read(base), [read(narrow), read(two)], TaskArithmeticConfig())
    assert same(read(tmp_path / "out"), expected)


def test_settings_and_tokenizer_come_along(llamas, tmp_path):
    base, one, _ = llamas
    for name, content in {
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"chat_template": "old"}',
        "special_tokens_map.json": "{}",
        "preprocessor_config.json": "{}",
        "merges.txt": "a b",
        "trainer_state.json": "{}",
        "README.md": "# no",
        "modeling_mine.py": "print()",
        "training_args.bin": "x",
    }.items():
        (tmp_path / name).write_text(content)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for path in one.iterdir():
        (tokenizer / path.name).write_bytes(path.read_bytes())
    for path in [path for path in tmp_path.iterdir() if path.is_file()]:
        path.rename(tokenizer / path.name)
    recipe = MergeRecipe.of(
        LinearConfig(), [base, tokenizer], tokenizer_source=str(tokenizer), chat_template="{{ messages }}"
    )
    merge(recipe, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merge_recipe.yaml",
        "merge_report.json",
        "merges.txt",
        "model.safetensors",
        "preprocessor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_per_model_settings_filters_and_gradients(llamas, tmp_path):
    base, one, two = llamas
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [
            {"model": str(one), "parameters": {"weight": [{"filter": "mlp", "value": 0.25}, {"value": [1, 0]}]}},
            {"model": str(two), "parameters": {"weight": 0.5}},
        ],
    }
    merge(recipe, tmp_path / "out")
    out, w, a, b = (read(path) for path in (tmp_path / "out", base, one, two))
    for name, weight in {
        "model.layers.0.mlp.up_proj.weight": 0.25,
        "model.layers.0.self_attn.q_proj.weight": 1.0,
        "model.layers.1.self_attn.q_proj.weight": 0.0,
        "model.embed_tokens.weight": 1.0,
    }.items():
        torch.testing.assert_close(out[name], w[name] + weight * (a[name] - w[name]) + 0.5 * (b[name] - w[name]))


def test_integers_are_copied_and_a_difference_is_said(tmp_path):
    for i, name in enumerate(("base", "one")):
        (tmp_path / name).mkdir()
        save_file({"w": torch.rand(3), "steps": torch.tensor(i)}, tmp_path / name / "model.safetensors")
    recipe = MergeRecipe.of(TaskArithmeticConfig(), [tmp_path / "one"], tmp_path / "base")
    with pytest.warns(UserWarning, match="steps .* differs between the models and cannot be merged"):
        report = merge(recipe, tmp_path / "out")
    assert int(read(tmp_path / "out")["steps"]) == 0
    assert len(report.notes) == 1


# --- the same bits ---------------------------------------------------------------------------------------------------


def test_threads_and_shards_change_no_bit(recipe, tmp_path):
    merge(recipe, tmp_path / "one", workers=1)
    merge(recipe, tmp_path / "four", workers=4, max_shard_size="11KB")
    assert len([*(tmp_path / "four").glob("*.safetensors")]) > 3
    assert same(read(tmp_path / "four"), read(tmp_path / "one"))


def test_the_saved_recipe_gives_the_same_bytes(recipe, tmp_path):
    report = merge(recipe, tmp_path / "out", seed=11)
    assert report.seed == 11
    merge(tmp_path / "out" / "merge_recipe.yaml", tmp_path / "again")
    bytes_of = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert bytes_of[0] == bytes_of[1]
    merge(recipe, tmp_path / "other", seed=12)
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != bytes_of[0]


def test_another_process_gives_the_same_bytes(recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    merge(recipe, tmp_path / "out")
    subprocess.run(
        [sys.executable, "-m", "hf_modular.cli", "merge", tmp_path / "recipe.yaml", tmp_path / "cli", "-q"],
        env=os.environ | {"PYTHONHASHSEED": "161803", "OMP_NUM_THREADS": "2"},
        check=True,
    )
    for name in ("model.safetensors", "merge_recipe.yaml", "config.json"):
        assert (tmp_path / "cli" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report(recipe, llamas, tmp_path):
    report = merge(recipe, tmp_path / "out", workers=2)
    assert MergeReport.load(tmp_path / "out") == report
    out = tmp_path / "out" / "model.safetensors"
    assert report.outputs == {out.name: {"bytes": out.stat().st_size, "sha256": sha256(out)}}
    assert [entry["model"] for entry in report.inputs] == [str(path) for path in llamas]
    for entry in report.inputs:
        for name, described in entry["files"].items():
            assert described["sha256"] == sha256(Path(entry["model"]) / name)
    assert (report.merge_method, report.seed, report.workers, report.device) == ("dare", 3, 2, "cpu")
    assert report.parameters == sum(tensor.numel() for tensor in read(tmp_path / "out").values())
    assert report.peak_memory > 1e8
    assert report.versions.keys() == {"hf_modular", "torch", "numpy", "python"}


def sha256(path):
    return subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]


# --- tied weights ----------------------------------------------------------------------------------------------------


def test_tied_weights_that_one_model_stores_twice(tmp_path):
    tied = LlamaConfig(vocab_size=48, num_key_value_heads=2, tie_word_embeddings=True, **SMALL)
    base, one, two = fine_tunes(tmp_path, lambda: LlamaForCausalLM(tied))
    tensors = read(one)
    (one / "model.safetensors.index.json").unlink()
    for path in one.glob("*.safetensors"):
        path.unlink()
    save_checkpoint(tmp_path / "twice", tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    (tmp_path / "twice" / "model.safetensors").rename(one / "model.safetensors")
    with pytest.warns(UserWarning, match=r"left out of .*one.*: lm_head\.weight"):
        merge(MergeRecipe.of(TaskArithmeticConfig(), [one, two], base), tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    expected = merge_state_dicts(read(base), [tensors, read(two)], TaskArithmeticConfig())
    assert same(read(tmp_path / "out"), expected)


def test_a_model_that_unties_what_the_base_ties(tmp_path):
    tied = LlamaConfig(vocab_size=48, num_key_value_heads=2, tie_word_embeddings=True, **SMALL)
    torch.manual_seed(5)
    LlamaForCausalLM(tied).save_pretrained(tmp_path / "base")
    LlamaForCausalLM(LLAMA).save_pretrained(tmp_path / "one")
    merge(MergeRecipe.of(TaskArithmeticConfig(scale=0.5), [tmp_path / "one"], tmp_path / "base"), tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    base, one = read(tmp_path / "base"), read(tmp_path / "one")
    for name, own in {"lm_head": merged.lm_head, "model.embed_tokens": merged.model.embed_tokens}.items():
        expected = (base["model.embed_tokens.weight"] + one[f"{name}.weight"]) / 2
        torch.testing.assert_close(own.weight.detach(), expected)


# --- what is refused -------------------------------------------------------------------------------------------------


def copied(source, target):
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def another_shape(folder):
    save_checkpoint(folder, read(folder) | {"model.norm.weight": torch.ones(31)}, overwrite=True)


def another_name(folder):
    tensors = read(folder)
    tensors["model.norm.wait"] = tensors.pop("model.norm.weight")
    save_checkpoint(folder, tensors, overwrite=True)


def an_integer_weight(folder):
    save_checkpoint(folder, read(folder) | {"model.norm.weight": torch.ones(32, dtype=torch.int8)}, overwrite=True)


def float8(folder):
    eight = read(folder)["lm_head.weight"].to(torch.float8_e4m3fn)
    save_checkpoint(folder, read(folder) | {"lm_head.weight": eight}, overwrite=True)


def nan(folder):
    spoilt = read(folder)["lm_head.weight"].clone()
    spoilt[3, 4] = float("nan")
    save_checkpoint(folder, read(folder) | {"lm_head.weight": spoilt}, overwrite=True)


def truncated(folder):
    file = sorted(folder.glob("*.safetensors"))[-1]
    os.truncate(file, file.stat().st_size - 5)


def missing_shard(folder):
    sorted(folder.glob("*.safetensors"))[-1].unlink()


def pickled(folder):
    for path in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        path.unlink()
    torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")


def nothing(folder):
    for path in folder.iterdir():
        path.unlink()


def config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def broken_config(folder):
    (folder / "config.json").write_text("{")


BAD_MODELS = [
    (another_shape, "model.norm.weight must have the base's shape (32,), but has (31,) in"),
    (another_name, "has no tensor model.norm.weight"),
    (another_name, "has the tensor model.norm.wait, which the base has not"),
    (an_integer_weight, "model.norm.weight is float32 in the base, but int8 in"),
    (float8, "lm_head.weight of {} is float8_e4m3fn, which cannot be merged"),
    (nan, "the merged tensor lm_head.weight must be finite, but has NaN or infinite values ({} has them already)"),
    (truncated, "it is cut short or damaged"),
    (missing_shard, "there is no such file in {}"),
    (pickled, "only safetensors are read, because a pickle can run any code, but {} holds ['pytorch_model.bin']"),
    (nothing, "must hold model.safetensors or model.safetensors.index.json"),
    (config(model_type="mistral"), "all models must be of one architecture"),
    (
        config(quantization_config={"quant_method": "bitsandbytes"}),
        "is quantised (bitsandbytes): give the model that it was made from",
    ),
    (broken_config, "must hold valid JSON"),
]


@pytest.mark.parametrize(
    ("damage", "message"), BAD_MODELS, ids=[f"{d.__name__}-{i}" for i, (d, _) in enumerate(BAD_MODELS)]
)
def test_a_bad_model_is_refused_and_nothing_is_left(llamas, tmp_path, damage, message):
    base, one, two = llamas
    bad = copied(two, tmp_path / "bad")
    damage(bad)
    recipe = MergeRecipe.of(TaskArithmeticConfig(), [one, bad], base)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        merge(recipe, tmp_path / "out")
    assert message.format(bad) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_all_problems_come_at_once(llamas, tmp_path):
    _, one, two = llamas
    bad = copied(two, tmp_path / "bad")
    another_shape(bad)
    config(model_type="mistral")(bad)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="cannot begin") as error:
        merge(MergeRecipe.of(LinearConfig(), [one, bad], weights=[1, -1]), tmp_path / "out")
    for part in ("thesis.txt", "one architecture", "model.norm.weight must have", "must not sum to 0"):
        assert part in str(error.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_several_bad_models_come_at_once(llamas, tmp_path):
    recipe = MergeRecipe.of(LinearConfig(), [llamas[0], tmp_path / "none", tmp_path / "nought"])
    with pytest.raises(ValueError, match=r"(?s)there is no folder .*none.*there is no folder .*nought"):
        merge(recipe, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:7"}, "finds no CUDA device"),
        ({"device": "tpuu"}, "`device` must be"),
        ({"workers": 0}, "`workers` must be at least 1, but got workers=0"),
        ({"max_shard_size": "5XB"}, "XB"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_options_are_refused(recipe, tmp_path, options, message):
    if options.get("device") == "cuda:7" and torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    with pytest.raises(ValueError, match=message):
        merge(recipe, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_noticed_before(recipe, tmp_path, monkeypatch):
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(checks, "disk_usage", lambda path: full)
    with pytest.raises(ValueError, match=r"the result takes [\d,]+ bytes, but .* has only 1,000 free"):
        merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_input_is_never_overwritten(llamas, tmp_path):
    base = copied(llamas[0], tmp_path / "base")
    before = (base / "model.safetensors").read_bytes()
    recipe = MergeRecipe.of(TaskArithmeticConfig(), [llamas[1]], base)
    with pytest.raises(ValueError, match="must not be one of the models"):
        merge(recipe, base, overwrite=True)
    assert (base / "model.safetensors").read_bytes() == before


def test_overwriting(recipe, llamas, tmp_path):
    merge(recipe, tmp_path / "out", max_shard_size="9KB")
    report = merge(MergeRecipe.of(LinearConfig(), llamas[1:]), tmp_path / "out", overwrite=True)
    assert report.merge_method == "linear"
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
