"""What the layers share stays one thing: in training, in files, and on every way of loading."""

import pickle
from collections.abc import Iterator

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from adapters.tiny import TOKENS, blocks, model, move, run, trainable
from hf_modular import CompacterConfig, MoSConfig
from hf_modular.adapters import Adapter, AdapterConfig

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")


def compacter(**choices: object) -> AdapterConfig:
    return CompacterConfig(**{"reduction_factor": 4, "init_weights": False, **choices})


def mos(**choices: object) -> AdapterConfig:
    targets = r".*(q_proj|v_proj|down_proj|\.q|\.wi|query)"
    return MoSConfig(**{"target_modules": targets, "init_weights": False, **choices})


# (config, tensors that are shared in the file of the llama: one rule, or two matrices for each of three types)
METHODS = pytest.mark.parametrize(("config", "count"), [(compacter, 1), (mos, 6)], ids=["compacter", "mos"])
KINDS = pytest.mark.parametrize("kind", ["llama", "t5"])


def adapted(kind: str, config: object, **choices: object) -> PeftModel:
    torch.manual_seed(3)
    return move(get_peft_model(model(kind), config(**choices))).eval()


def named(model: nn.Module, adapter_name: str = "default") -> Iterator[tuple[str, nn.Parameter]]:
    """All names of the shared parameters, with the parameter."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if f"_adapter.{adapter_name}.shared." in name:
            yield name, parameter


def objects(model: nn.Module, adapter_name: str = "default") -> set[int]:
    return {id(parameter) for _, parameter in named(model, adapter_name)}


# -- in the model ----------------------------------------------------------------------------------------------------


@METHODS
def test_a_state_dict_and_an_optimizer_hold_it_once(config, count):
    ours = adapted("llama", config)
    names = [name for name in ours.state_dict() if ".shared." in name]
    assert len(names) == len(objects(ours)) == count
    optimizer = torch.optim.AdamW(p for p in ours.parameters() if p.requires_grad)
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == trainable(ours)


@METHODS
@pytest.mark.parametrize("assign", [False, True])
def test_a_whole_state_dict_loads_strictly(config, count, assign: bool):
    ours, other = adapted("llama", config), get_peft_model(model("llama"), config()).eval()
    other.load_state_dict(ours.state_dict(), strict=True, assign=assign)
    assert len(objects(other)) == count
    assert torch.equal(run(other), run(ours))


@METHODS
def test_it_stays_one_in_half_precision_and_when_pickled(config, count):
    ours = get_peft_model(model("llama").bfloat16(), config())
    for changed in (ours, pickle.loads(pickle.dumps(ours)), ours.float(), ours.bfloat16()):
        assert len(objects(changed)) == count


@METHODS
def test_freezing_and_switching_reach_it_from_every_layer(config, count):
    ours = adapted("llama", config)
    ours.add_adapter("second", config())
    assert not objects(ours) & objects(ours, "second")
    for name, other in (("second", "default"), ("default", "second")):
        ours.set_adapter(name)
        flags = {n: {p.requires_grad for _, p in named(ours, n)} for n in (name, other)}
        assert flags == {name: {True}, other: {False}}


@METHODS
def test_each_adapter_has_its_own_and_takes_it_along(config, count):
    ours = adapted("llama", config)
    before = run(ours)
    ours.add_adapter("second", config())
    assert len(objects(ours, "second")) == count
    ours.set_adapter("second")
    move(ours, seed=9)
    assert not torch.equal(run(ours), before)
    ours.set_adapter("default")
    assert torch.equal(run(ours), before)
    ours.delete_adapter("second")
    assert not objects(ours, "second")
    assert not any(".second." in name for name in ours.state_dict())
    assert torch.equal(run(ours), before)


@METHODS
def test_a_layer_that_is_cut_off_does_not_take_it_away_unseen(config, count, tmp_path):
    ours = adapted("llama", config)
    ours.base_model.model.model.layers = ours.base_model.model.model.layers[1:]
    assert len(objects(ours)) == count
    with pytest.raises(ValueError, match="layers share are not in the state dict"):
        ours.save_pretrained(tmp_path)


@METHODS
def test_it_compiles_without_a_break(config, count):
    ours = adapted("llama", config).base_model.model
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(compiled), run(ours))


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@METHODS
def test_fsdp_2_shards_it_once_it_is_wrapped_before_the_layers(config, count, one_process):
    """Its tensors are there only while it is called, as those of every module that is sharded."""
    plain, sharded = adapted("llama", config), adapted("llama", config)
    for module in {m.shared for m in sharded.modules() if isinstance(m, Adapter)}:
        fully_shard(module)
    for layer in sharded.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    for trained in (plain, sharded):
        optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            trained(input_ids=TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    whole = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    expected, found = get_peft_model_state_dict(plain), get_peft_model_state_dict(sharded, state_dict=whole)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# -- in files --------------------------------------------------------------------------------------------------------


@METHODS
@KINDS
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_it_is_saved_once_and_loaded_by_peft(config, count, kind, low_cpu_mem_usage, tmp_path):
    ours = adapted(kind, config)
    ours.save_pretrained(tmp_path)
    names = [name for name in load_file(tmp_path / "adapter_model.safetensors") if ".shared." in name]
    assert len(names) == len(objects(ours))
    loaded = PeftModel.from_pretrained(
        model(kind), tmp_path, adapter_name="loaded", low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert len(objects(loaded, "loaded")) == len(objects(ours))
    assert torch.equal(run(loaded), run(ours))


@METHODS
@KINDS
def test_transformers_saves_and_loads_it_by_itself(config, count, kind, tmp_path):
    torch.manual_seed(3)
    ours = model(kind)
    ours.add_adapter(config())
    move(ours)
    ours.save_pretrained(tmp_path)
    loaded = model(kind)
    report = loaded.load_adapter(str(tmp_path))
    assert (report.missing_keys, report.unexpected_keys, report.mismatched_keys) == (set(), set(), set())
    assert len(objects(loaded)) == len(objects(ours))
    assert torch.equal(run(loaded.eval()), run(ours.eval()))
    through_peft = PeftModel.from_pretrained(model(kind), tmp_path).eval()
    assert torch.equal(run(through_peft), run(ours))

    loaded.add_adapter(config(), "second")
    assert not objects(loaded) & objects(loaded, "second")
    loaded.set_adapter("default")
    assert torch.equal(run(loaded.eval()), run(ours))
    loaded.disable_adapters()
    torch.testing.assert_close(run(loaded), run(model(kind)))


@METHODS
def test_the_files_keys_say_where_the_layers_are(config, count, tmp_path):
    ours = adapted("llama", config)
    ours.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    bare = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
    other = inject_adapter_in_model(config(), model("llama"), state_dict=bare)
    result = set_peft_model_state_dict(other, bare)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "hfm_" in key]
    assert torch.equal(run(other.eval()), run(ours))


@METHODS
def test_other_weights_take_the_place_of_its_own(config, count, tmp_path):
    """Hot-swapping: into the same storage, so that what was compiled stays valid."""
    ours, other = (
        adapted("llama", config),
        move(get_peft_model(model("llama"), config(seed=0) if count > 1 else config())),
    )
    other.save_pretrained(tmp_path)
    storage = {parameter.data_ptr() for _, parameter in named(ours)}
    set_peft_model_state_dict(ours, load_file(tmp_path / "adapter_model.safetensors"))
    assert {parameter.data_ptr() for _, parameter in named(ours)} == storage
    assert torch.equal(run(ours), run(other.eval()))


def test_layers_of_a_plain_model_share_too():
    ours = get_peft_model(blocks(), MoSConfig(target_modules=["wide"], shards=2))
    assert len(objects(ours)) == 2
