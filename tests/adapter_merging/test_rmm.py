"""RMM: adapters stored in one, and each of them had back."""

import json
from pathlib import Path

import pytest
import torch
from adapters import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from adapter_merging.zoo import NAMES, TOKENS, Zoo, adapted, difference, lora, merged_weights, zoo
from hf_modular import MoSConfig, RMMConfig, add_task, merge_adapter_files, merge_adapters
from hf_modular._reversible import storage
from hf_modular.adapter_merging import AdapterRecipe, AdapterReport

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*lora_bias=True.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]

GRANULARITIES = ["position", "tensor", "layer"]

# Adapters that can be had back exactly: of different ranks, scalings and layers, with heads of their own.
TRIPLES = {
    "plain": ({}, {}, {}),
    "ranks": ({"r": 2, "lora_alpha": 16}, {"r": 5, "use_rslora": True}, {"rank_pattern": {"fc": 1}}),
    "layers": ({"target_modules": ["embed", "fc"]}, {"target_modules": ["fc", "conv3"]}, {"r": 2}),
    "heads": ({"modules_to_save": ["head"]}, {"modules_to_save": ["head", "norm"]}, {}),
}


def three(case="plain"):
    return adapted(*(lora(**settings) for settings in TRIPLES[case]))


def stored(model, folder, config, **more):
    """The RMM adapter on a base of its own, and the report."""
    more = {"warn_above": 10, **more}
    report = merge_adapters(model, [*model.peft_config], config, output_dir=folder, **more)
    return PeftModel.from_pretrained(zoo(), folder, adapter_name="rmm").eval(), report


def saved(model, folder):
    for name in model.peft_config:
        model.save_pretrained(folder, selected_adapters=[name])
    return [str(folder / name) for name in model.peft_config]


def recipe(adapters, **more):
    return {"merge_method": "rmm", "models": [{"model": str(name)} for name in adapters], "warn_above": 10, **more}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("case", TRIPLES)
def test_all_tasks_are_exact_at_one_direction_less_than_adapters(case, granularity, tmp_path):
    model = three(case)
    config = RMMConfig(p=2, granularity=granularity, canonicalize=case == "ranks")
    loaded, report = stored(model, tmp_path / "rmm", config)
    assert loaded.tasks == [*NAMES]
    assert all(error < 1e-5 for error in [*report.tasks.values(), report.error])
    for task in NAMES:
        loaded.set_task(task)
        model.set_adapter(task)
        assert_close(loaded(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)
        assert difference(merged_weights(loaded, "rmm"), merged_weights(model, task), zoo()) < 1e-5


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_report_tells_how_far_each_task_is(granularity, tmp_path):
    model = three("ranks")
    loaded, report = stored(model, tmp_path / "rmm", RMMConfig(p=1, granularity=granularity))
    assert loaded.peft_config["rmm"].errors == pytest.approx(report.tasks)
    for task in NAMES:
        loaded.set_task(task)
        wanted = merged_weights(model, task)
        assert difference(merged_weights(loaded, "rmm"), wanted, zoo()) == pytest.approx(report.tasks[task], rel=1e-3)
    assert min(report.tasks.values()) < report.error < max(report.tasks.values())
    assert all(0.01 < error < 2 for error in report.tasks.values())


@pytest.mark.parametrize("p", [1, 2])
def test_storage_is_the_closed_form(p, tmp_path):
    model = three()
    _, report = stored(model, tmp_path / "rmm", RMMConfig(p=p))
    assert report.settings["storage"] == pytest.approx(storage(n=3, r=4, p=p))
    own = sum(stored_numbers(folder) for folder in saved(model, tmp_path))
    assert stored_numbers(tmp_path / "rmm") / own == pytest.approx((p * (4 + 3) + 4) / (4 * 3))


def stored_numbers(folder):
    """Of the adapter alone: PEFT saves embeddings with the adapters on them."""
    return sum(t.numel() for name, t in tensors(folder).items() if "lora_" in name or "hfm_rmm_" in name)


def tensors(folder):
    return load_file(f"{folder}/adapter_model.safetensors")


def test_more_directions_come_nearer(tmp_path):
    model = adapted(*(lora() for _ in range(3)))
    errors = [stored(model, tmp_path / str(p), RMMConfig(p=p))[1].error for p in (1, 2)]
    assert errors[1] < 1e-5 < 0.1 < errors[0]


def test_no_other_adapter_of_the_same_size_is_nearer_in_the_factors(tmp_path):
    """At each position the basis is the best: with any other one the factors are further away."""
    model = three()
    loaded, _ = stored(model, tmp_path / "rmm", RMMConfig(p=1))
    layer = loaded.base_model.model.fc.adapters["rmm"]
    A = torch.stack([model.base_model.model.fc.lora_A[name].weight.detach() for name in NAMES])  # (n, r, in)

    def distance(basis):
        rest = A - A.mean(0)
        along = (rest * basis).sum(1, keepdim=True)
        return float((rest - along * basis).square().sum())

    best = distance(layer.A.basis.detach()[0])
    rng = torch.Generator().manual_seed(0)
    for by in (0.1, 1.0, 10.0):
        other = layer.A.basis.detach()[0] + by * torch.randn(A.shape[1:], generator=rng)
        assert best < distance(other / other.norm(dim=0))


def test_canonical_factors_do_not_depend_on_how_an_adapter_was_factored(tmp_path):
    """B A = (B R) (R⁻¹ A): RMM on the factors as they are sees two adapters, on balanced ones the same twice."""
    model = adapted(lora(target_modules=["fc"]), lora(target_modules=["fc"]), lora(target_modules=["fc"]))
    fc = model.base_model.model.fc
    R = torch.randn(4, 4, generator=torch.Generator().manual_seed(3)) + 2 * torch.eye(4)
    with torch.no_grad():
        fc.lora_B["second"].weight.copy_(fc.lora_B["first"].weight @ R)
        fc.lora_A["second"].weight.copy_(torch.linalg.inv(R) @ fc.lora_A["first"].weight)
    raw, canonical = (
        stored(model, tmp_path / str(flag), RMMConfig(p=1, canonicalize=flag))[1].tasks for flag in (False, True)
    )
    assert raw["first"] > 0.05
    assert max(canonical.values()) < 1e-4  # two different adapters are exact at p=1


def test_samples_of_a_batch_may_name_tasks(tmp_path):
    model = three("heads")
    loaded, _ = stored(model, tmp_path / "rmm", RMMConfig(p=2))
    together = loaded(TOKENS, adapter_names=["third", "first", "__base__"])
    for i, task in enumerate(["third", "first"]):
        loaded.set_task(task)
        assert_close(together[i], loaded(TOKENS)[i], rtol=1e-4, atol=1e-5)
    assert_close(together[2], zoo()(TOKENS)[2])


def test_heads_of_different_sizes_are_kept_apart(tmp_path):
    model = adapted(lora(modules_to_save=["head"]), lora(modules_to_save=["head"]))
    model.base_model.model.head.modules_to_save["second"] = nn.Linear(5, 3)
    loaded, report = stored(model, tmp_path / "rmm", RMMConfig(p=1))
    assert report.notes == ["kept whole for each task: head"]
    for task, size in {"first": 4, "second": 3}.items():
        loaded.set_task(task)
        model.set_adapter(task)
        assert loaded(TOKENS).shape == (3, size)
        assert_close(loaded(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["ranks", "layers", "heads"])
def test_a_task_goes_back_to_a_lora_adapter(case, tmp_path):
    model = three(case)
    loaded, _ = stored(model, tmp_path / "rmm", RMMConfig(p=2))
    loaded.set_task("third")
    loaded.revert("second", tmp_path / "second")
    assert loaded.task == "third"
    plain = PeftModel.from_pretrained(zoo(), tmp_path / "second", adapter_name="back").eval()
    assert plain.peft_config["back"].peft_type == "LORA"
    assert difference(merged_weights(plain, "back"), merged_weights(model, "second"), zoo()) < 1e-5
    model.set_adapter("second")
    assert_close(plain(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)


def test_it_is_merged_into_the_base_at_one_task(tmp_path):
    model = three("heads")
    loaded, _ = stored(model, tmp_path / "rmm", RMMConfig(p=2))
    loaded.set_task("second")
    whole = loaded.merge_and_unload()
    assert isinstance(whole, Zoo)
    assert difference(whole.state_dict(), merged_weights(model, "second"), zoo()) < 1e-5


# -- from folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_folders_give_what_a_model_gives(granularity, tmp_path):
    model = three("ranks")
    folders = saved(model, tmp_path)
    parameters = {"p": 1, "granularity": granularity, "canonicalize": True}
    report = merge_adapter_files(recipe(folders, parameters=parameters), tmp_path / "rmm")
    assert report == AdapterReport.load(tmp_path / "rmm")
    _, live = stored(model, tmp_path / "live", RMMConfig(**parameters))
    assert report.tasks == pytest.approx(live.tasks)
    found, wanted = tensors(tmp_path / "rmm"), tensors(tmp_path / "live")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    again = merge_adapter_files(tmp_path / "rmm" / "merge_recipe.yaml", tmp_path / "again")
    assert again.settings == report.settings
    assert all(torch.equal(tensor, found[name]) for name, tensor in tensors(tmp_path / "again").items())


def test_a_recipe_is_made_from_the_settings(tmp_path):
    folders = saved(adapted(lora(target_modules=["fc"]), lora(target_modules=["fc"])), tmp_path)
    made = AdapterRecipe.of(RMMConfig(p=1, granularity="layer"), folders, warn_above=10)
    merge_adapter_files(made, tmp_path / "rmm")
    config = json.loads((tmp_path / "rmm" / "adapter_config.json").read_text())
    assert (config["p"], config["granularity"], config["tasks"]) == (1, "layer", ["first", "second"])


def test_tasks_are_named_in_the_recipe_or_after_their_folders(tmp_path):
    folders = saved(three(), tmp_path)
    named = recipe(folders)
    named["models"][1]["task"] = "parsing"
    merge_adapter_files(named, tmp_path / "rmm")
    config = json.loads((tmp_path / "rmm" / "adapter_config.json").read_text())
    assert config["tasks"] == ["first", "parsing", "third"]


def test_numbers_are_stored_in_the_dtype_of_the_adapters(tmp_path):
    loaded, _ = stored(three().to(torch.float64), tmp_path / "rmm", RMMConfig())
    assert {t.dtype for t in tensors(tmp_path / "rmm").values()} == {torch.float64}
    assert next(iter(loaded.parameters())).dtype == torch.float32


def test_adapters_of_other_types_are_held_if_their_change_is_of_low_rank(tmp_path):
    model = adapted(*(MoSConfig(shards=2, target_modules=["fc", "gpt"]) for _ in range(3)))
    loaded, report = stored(model, tmp_path / "rmm", RMMConfig(p=2))
    assert report.error < 1e-5
    loaded.set_task("second")
    assert difference(merged_weights(loaded, "rmm"), merged_weights(model, "second"), zoo()) < 1e-5


def test_what_has_no_low_rank_is_reduced_to_the_rank_that_is_stated(tmp_path):
    model = adapted(lora(use_dora=True, target_modules=["fc"]), lora(target_modules=["fc"]))
    with pytest.raises(ValueError, match=r"adapter 'first' adds to 'fc' has no low rank of its own: state the `rank`"):
        stored(model, tmp_path / "never", RMMConfig(p=1))
    assert not (tmp_path / "never").exists()
    loaded, report = stored(model, tmp_path / "rmm", RMMConfig(p=1, rank=3))
    assert report.layers["fc"]["rank"] == 3
    delta = (merged_weights(model, "first")["fc.weight"] - zoo().fc.weight).detach().double()
    singular = torch.linalg.svdvals(delta)
    lost = float((singular[3:].square().sum() / singular.square().sum()).sqrt())
    assert report.tasks["first"] == pytest.approx(lost, rel=1e-3)
    assert difference(merged_weights(loaded, "rmm"), merged_weights(model, "first"), zoo()) == pytest.approx(
        lost, 1e-3
    )


def test_biases_are_refused_or_told(tmp_path):
    model = adapted(*(lora(target_modules=["fc"], lora_bias=True) for _ in range(2)))
    with pytest.raises(ValueError, match=r"changes the bias of 'fc' too"):
        stored(model, tmp_path / "never", RMMConfig(p=1))
    loaded, report = stored(model, tmp_path / "rmm", RMMConfig(p=1, rank=4))
    found = difference(merged_weights(loaded, "rmm"), merged_weights(model, "first"), zoo())
    assert found == pytest.approx(report.tasks["first"], rel=1e-3)
    assert found > 0.01


# -- tasks that come and go ----------------------------------------------------------------------------------------


def newcomer(folder, model, mix, **settings):
    """An adapter that is a mix of the first two where their factors are, in a folder."""
    other = adapted(lora(**settings))
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_" in name:
                parts = [model.get_parameter(name.replace("first", own)) for own in NAMES[:2]]
                parameter.copy_(sum(weight * part for weight, part in zip(mix, parts, strict=True)))
    other.save_pretrained(folder)
    return other, folder / "first"


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_task_in_the_directions_of_the_others_is_added_without_loss(granularity, tmp_path):
    """The mean and the differences of the factors are what is stored, so their mixes lie within."""
    model = adapted(lora(), lora())
    loaded, _ = stored(model, tmp_path / "rmm", RMMConfig(p=1, granularity=granularity))
    other, folder = newcomer(tmp_path / "new", model, (0.3, 0.7))
    report = add_task(loaded, "new", folder)
    assert report.error < 1e-5
    assert loaded.tasks == ["first", "second", "new"]
    loaded.set_task("new")
    assert difference(merged_weights(loaded, "rmm"), merged_weights(other, "first"), zoo()) < 1e-5
    loaded.save_pretrained(tmp_path / "three")
    again = PeftModel.from_pretrained(zoo(), tmp_path / "three" / "rmm").eval()
    assert again.task == "new"
    assert_close(again(TOKENS), loaded(TOKENS))


def test_what_is_lost_of_an_added_task_is_told(tmp_path):
    model = three("heads")
    loaded, _ = stored(model, tmp_path / "rmm", RMMConfig(p=2))
    other = adapted(lora(r=6, modules_to_save=["head"]))
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.mul_(1.1 if "lora_" in name else 1)
    other.save_pretrained(tmp_path / "new")
    before = {task: at(loaded, task) for task in NAMES}
    with pytest.warns(UserWarning, match=r"relative error of \d\.\d+, above 0\.3.*Make the RMM adapter anew"):
        report = add_task(loaded, "new", tmp_path / "new" / "first")
    loaded.set_task("new")
    start = {name: value for name, value in zoo().state_dict().items() if not name.startswith(("head", "norm"))}
    found, wanted = ({name: w[name] for name in start} for w in (merged_weights(loaded, "rmm"), merged(other)))
    far = sum(float((found[name] - wanted[name]).square().sum()) for name in start)
    own = sum(float((wanted[name] - value).square().sum()) for name, value in start.items())
    assert loaded.peft_config["rmm"].errors["new"] == pytest.approx((far / own) ** 0.5, rel=1e-3)
    assert report.tasks == {"new": pytest.approx((far / own) ** 0.5, rel=1e-3)}
    assert_close(merged_weights(loaded, "rmm")["head.weight"], merged(other)["head.weight"])
    assert all(torch.equal(at(loaded, task), output) for task, output in before.items())


def merged(model):
    return merged_weights(model, "first")


def at(model, task):
    model.set_task(task)
    return model(TOKENS)


def test_a_task_is_deleted(tmp_path):
    model = three("heads")
    loaded, _ = stored(model, tmp_path / "rmm", RMMConfig(p=2))
    before = at(loaded, "third")
    loaded.delete_task("first")
    assert loaded.tasks == ["second", "third"]
    assert torch.equal(at(loaded, "third"), before)
    loaded.save_pretrained(tmp_path / "two")
    again = PeftModel.from_pretrained(zoo(), tmp_path / "two" / "rmm", adapter_name="again").eval()
    assert torch.equal(at(again, "third"), before)


def test_tasks_are_deleted_until_one_is_left_and_others_come(tmp_path):
    model = adapted(lora(), lora())
    loaded, _ = stored(model, tmp_path / "rmm", RMMConfig(p=1))
    before = at(loaded, "second")
    loaded.delete_task("first")
    with pytest.raises(ValueError, match=r"must hold a task, but \['second'\] are all: delete the adapter instead"):
        loaded.delete_task("second")
    loaded.save_pretrained(tmp_path / "one")
    again = PeftModel.from_pretrained(zoo(), tmp_path / "one" / "rmm").eval()
    assert torch.equal(again(TOKENS), before)
    report = add_task(again, "first", saved(model, tmp_path)[0])  # its direction is still there
    assert report.error < 1e-5
    again.revert("first", tmp_path / "back")
    assert difference(merged_weights(back(tmp_path / "back"), "back"), merged_weights(model, "first"), zoo()) < 1e-5


def back(folder):
    return PeftModel.from_pretrained(zoo(), folder, adapter_name="back").eval()


def test_an_adapter_that_is_not_active_is_meant_by_its_name(tmp_path):
    model = three()
    loaded, _ = stored(model, tmp_path / "rmm", RMMConfig(p=2))
    folders = saved(model, tmp_path)
    merge_adapter_files(recipe(folders[:2], parameters={"p": 1}), tmp_path / "two")
    loaded.load_adapter(tmp_path / "two", adapter_name="two")
    loaded.set_task("third")
    loaded.set_task("second", adapter_name="two")
    loaded.revert("first", tmp_path / "back", adapter_name="two")
    with pytest.warns(UserWarning, match="relative error"):
        add_task(loaded, "new", folders[2], adapter_name="two")
    loaded.delete_task("first", adapter_name="two")
    assert (loaded.task, loaded.tasks) == ("third", [*NAMES])
    loaded.set_adapter("two")
    assert (loaded.task, loaded.tasks) == ("second", ["second", "new"])
    assert difference(merged_weights(back(tmp_path / "back"), "back"), merged_weights(model, "first"), zoo()) < 1e-5


def test_a_task_is_written_over_nothing(tmp_path):
    model = adapted(lora(target_modules=["fc"]), lora(target_modules=["fc"]))
    loaded, _ = stored(model, tmp_path / "rmm", RMMConfig(p=1))
    before = tensors(tmp_path / "rmm")
    with pytest.raises(ValueError, match=r"must be absent or empty, but .*rmm holds"):
        loaded.revert("first", tmp_path / "rmm")
    assert tensors(tmp_path / "rmm").keys() == before.keys()
    loaded.revert("first", tmp_path / "rmm", overwrite=True)
    assert back(tmp_path / "rmm").peft_config["back"].peft_type == "LORA"


@pytest.mark.parametrize(
    "change",
    [
        lambda loaded, folder: loaded.delete_task("first"),
        lambda loaded, folder: add_task(loaded, "new", folder),
        lambda loaded, folder: loaded.set_task("second"),
        lambda loaded, folder: loaded.revert("second", folder.parent / "back"),
    ],
    ids=["delete", "add", "set", "revert"],
)
def test_what_is_merged_is_left_alone(change, tmp_path):
    model = adapted(lora(target_modules=["fc"]), lora(target_modules=["fc"]))
    loaded, _ = stored(model, tmp_path / "rmm", RMMConfig(p=1))
    folder = Path(saved(model, tmp_path)[0])
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items() if "hfm_rmm" in name}
    config = loaded.peft_config["rmm"].to_dict()
    loaded.merge_adapter()
    with pytest.raises(ValueError, match=r"Adapter 'rmm' is merged into 'fc': call `unmerge_adapter` first"):
        change(loaded, folder)
    loaded.unmerge_adapter()
    assert loaded.peft_config["rmm"].to_dict() == config
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in before.items())


# -- numbers that round, and nothing at all ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_error_counts_the_rounding(dtype, granularity, tmp_path):
    """At a sufficient p nothing else is lost, and the task that goes back has the same error."""
    model = adapted(lora(), lora(r=2), lora())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    folders = saved(model, tmp_path)
    report = merge_adapter_files(recipe(folders, parameters={"p": 9, "granularity": granularity}), tmp_path / "rmm")
    assert {tensor.dtype for tensor in tensors(tmp_path / "rmm").values()} == {dtype}
    assert report.notes == ["3 adapters differ in 2 directions at most: p=9 is not needed"]
    loaded = PeftModel.from_pretrained(zoo(), tmp_path / "rmm", adapter_name="rmm").eval()
    for task, folder in zip(NAMES, folders, strict=True):
        loaded.revert(task, tmp_path / f"{task}-again")
        wanted = merged_weights(back(folder), "back")
        found = difference(merged_weights(back(tmp_path / f"{task}-again"), "back"), wanted, zoo())
        assert report.tasks[task] == pytest.approx(found, rel=0.02)
        assert 1e-5 < found < 1e-2


def test_what_is_stored_of_nothing_is_an_error(tmp_path):
    """Of an adapter that was never trained, and of a layer that a new one has not: something comes back of them."""
    model = adapted(lora(target_modules=["fc", "gpt"]), lora(target_modules=["fc", "gpt"]))
    model.add_adapter("third", lora(target_modules=["fc", "gpt"]))  # its B is nothing
    loaded, report = stored(model, tmp_path / "rmm", RMMConfig(p=1))
    assert report.tasks["third"] == 1
    adapted(lora(target_modules=["fc"])).save_pretrained(tmp_path / "new")
    with pytest.warns(UserWarning, match="relative error"):
        added = add_task(loaded, "new", tmp_path / "new" / "first")
    assert added.layers["gpt"]["error"] == 1
    assert 0 < added.layers["fc"]["error"] != 1


def test_tied_and_scaled_embeddings(tmp_path):
    """Gemma's, on which the adapters are, or which they have trained whole together with the head."""
    on_it = {"target_modules": ["embed_tokens", "q_proj"]}
    whole = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    for case, settings in {"on": on_it, "whole": whole}.items():
        folders = [tmp_path / case / name for name in NAMES[:2]]
        for seed, folder in enumerate(folders):
            tiny.move(get_peft_model(tiny.model("gemma"), LoraConfig(r=2, **settings)), seed, 0.2).save_pretrained(
                folder
            )
        tiny.model("gemma").save_pretrained(tmp_path / "base")
        merge_adapter_files(
            recipe(folders, parameters={"p": 1}, base_model=str(tmp_path / "base")), tmp_path / f"{case}-rmm"
        )
        loaded = PeftModel.from_pretrained(tiny.model("gemma"), tmp_path / f"{case}-rmm").eval()
        loaded.revert("second", tmp_path / f"{case}-back")
        loaded.set_task("second")
        plain = PeftModel.from_pretrained(tiny.model("gemma"), tmp_path / f"{case}-back").eval()
        wanted = tiny.run(PeftModel.from_pretrained(tiny.model("gemma"), folders[1]).eval())
        assert_close(tiny.run(loaded), wanted, rtol=1e-4, atol=1e-5)
        assert_close(tiny.run(plain), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: adapted(lora(target_modules=["fc", "gpt"])), r"it lacks \['gpt'\]"),
        (lambda: adapted(lora(target_modules=["fc"], modules_to_save=["head"])), r"it lacks \['head'\]"),
    ],
)
def test_a_task_that_has_no_place_is_refused(make, words, tmp_path):
    model = adapted(*(lora(target_modules=["fc"]) for _ in range(2)))
    loaded, _ = stored(model, tmp_path / "rmm", RMMConfig(p=1))
    make().save_pretrained(tmp_path / "new")
    with pytest.raises(ValueError, match=words):
        add_task(loaded, "new", tmp_path / "new" / "first")
    assert loaded.tasks == ["first", "second"]


def test_a_task_needs_a_name_of_its_own(tmp_path):
    model = adapted(*(lora(target_modules=["fc"]) for _ in range(2)))
    loaded, _ = stored(model, tmp_path / "rmm", RMMConfig(p=1))
    folder = saved(model, tmp_path)[0]
    before = at(loaded, "first")
    with pytest.raises(ValueError, match="name of its own"):
        add_task(loaded, "second", folder)
    assert loaded.tasks == ["first", "second"]
    assert torch.equal(at(loaded, "first"), before)
    with pytest.raises(TypeError, match="must hold an RMM adapter"):
        add_task(model, "new", folder)


# -- wrong calls ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"output_dir": None}, "give an `output_dir`"),
        ({"weights": [1, 2]}, r"\{'weights': \[1, 2\]\} mean nothing"),
        ({"rank": 3}, r"\{'rank': 3\} mean nothing"),
        ({"space": "parameters"}, "mean nothing"),
        ({"adapters": ["first"]}, "stores at least 2 adapters in common, but got 1"),
    ],
)
def test_a_wrong_call_writes_nothing(settings, words, tmp_path):
    model = adapted(lora(target_modules=["fc"]), lora(target_modules=["fc"]))
    call = {"adapters": NAMES[:2], "output_dir": tmp_path / "out", **settings}
    with pytest.raises(ValueError, match=words):
        merge_adapters(model, config=RMMConfig(), **call)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"rank": 4}, r"rank.*put it under `parameters`"),
        ({"space": "parameters"}, "space"),
        ({"into": {"peft_type": "LORA"}}, "into"),
        ({"parameters": {"p": 0}}, r"`p` must be in \[1, inf\)"),
        ({"parameters": {"p": [1, 2]}}, "has one 'p' for all layers"),
        ({"parameters": {"weight": 0.5}}, "weighs no adapters"),
        ({"parameters": {"granularity": "row"}}, "must be one of"),
        ({"parameters": {"density": 1}}, "no setting 'density'"),
    ],
)
def test_recipes_are_read_strictly(more, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        merge_adapter_files(recipe(["one", "two"], **more), tmp_path / "out")


def test_other_methods_have_no_tasks(tmp_path):
    wrong = recipe(["one", "two"], merge_method="linear")
    wrong["models"][0]["task"] = "parsing"
    with pytest.raises(ValueError, match="'linear' keeps no tasks apart"):
        merge_adapter_files(wrong, tmp_path / "out")


def test_tasks_of_one_name_are_refused(tmp_path):
    folders = [saved(three(), tmp_path / part)[0] for part in ("here", "there")]
    with pytest.raises(ValueError, match=r"needs a name of its own, .*: state them as `task`"):
        merge_adapter_files(recipe(folders), tmp_path / "out")


def test_biases_of_adapted_layers_are_refused(tmp_path):
    folders = saved(adapted(lora(target_modules=["fc"], bias="lora_only")), tmp_path)
    folders += saved(adapted(lora(target_modules=["fc"])), tmp_path / "plain")
    wrong = recipe(folders)
    wrong["models"][1]["task"] = "plain"
    with pytest.raises(ValueError, match=r"both of \['fc'\]"):
        merge_adapter_files(wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists()
