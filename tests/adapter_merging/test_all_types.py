"""Adapters of every type of PEFT that changes weights: merged in memory and from folders as whole models are."""

import copy

import pytest
import torch
from adapters import tiny
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from adapter_merging.zoo import difference
from hf_modular import merge_adapter_files, merge_adapters
from hf_modular.merging import TaskArithmeticConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

TARGETS = ["q_proj", "down_proj"]
WEIGHTS = {"one": 0.7, "two": -0.2}

# What a type needs beside its defaults on so small a model.
MERGED = {
    "ADAMSS": {},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "DEFT": {},
    "DELORA": {},
    "FOURIERFT": {"n_frequency": 20},
    "FROD": {},
    "GLORA": {},
    "GRALORA": {},
    "HFM_FLORA": {"r": 2},
    "HFM_HUT": {"r": 2},
    "HFM_MOS": {"shards": 2},
    "HFM_RMM": {"tasks": ["here", "there"], "r": 2},
    "HFM_SSF": {},
    "HIRA": {},
    "HRA": {},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LOHA": {"r": 2},
    "LOKR": {},
    "LORA": {"use_rslora": True, "lora_alpha": 3},
    "MISS": {"r": 8},
    "OFT": {"oft_block_size": 8, "r": 0},
    "OSF": {},
    "PEANUT": {},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {},
    "TINYLORA": {},
    "UNILORA": {},
    "VBLORA": {"num_vectors": 16, "vector_length": 8, "r": 2, "topk": 2},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 20},
}
IN_MEMORY_ONLY = {"ADAMSS", "FROD", "OSF", "PSOFT"}  # they take parts of the base weights, which are not in the file
OTHERWISE = {  # tested elsewhere, or no change of the weights of layers with two sides
    "ADALORA": "one that is trained at a time: test_files",
    "ADAPTION_PROMPT": "prompts",
    "BEFT": "biases only",
    "CARTRIDGE": "a cache",
    "CPT": "prompts",
    "HFM_COMPACTER": "a network behind the layer: test_into",
    "LN_TUNING": "norms: test_parameters",
    "MULTITASK_PROMPT_TUNING": "prompts",
    "PREFIX_TUNING": "prompts",
    "PROMPT_TUNING": "prompts",
    "P_TUNING": "prompts",
    "TRAINABLE_TOKENS": "single tokens",
    "XLORA": "a mixture over tokens",
}
REFUSED = {"LILY": {}, "POLY": {}}


def two(kind, settings):
    """A model with two adapters that are apart."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    torch.manual_seed(0)
    model = get_peft_model(tiny.model("llama"), config(target_modules=TARGETS, **settings), "one")
    model.add_adapter("two", config(target_modules=TARGETS, **settings))
    for seed, name in enumerate(WEIGHTS):
        model.set_adapter(name)
        tiny.move(model, seed, 0.1)
    return model.eval()


def truth(model):
    base, wanted = tiny.model("llama").state_dict(), {}
    for name, weight in WEIGHTS.items():
        one = copy.deepcopy(model)
        one.set_adapter(name)
        whole = one.merge_and_unload().state_dict()
        wanted = {key: wanted.get(key, value) + weight * (whole[key] - value) for key, value in base.items()}
    return wanted


def loaded(folder):
    return PeftModel.from_pretrained(tiny.model("llama"), folder).merge_and_unload().state_dict()


def test_every_type_is_here():
    known = {str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING if "INPUT" not in kind.value}
    assert known <= MERGED.keys() | OTHERWISE.keys() | REFUSED.keys() | {"SHADOW"}


@pytest.mark.parametrize("kind", MERGED)
def test_merged_as_whole_models_are(kind, tmp_path):
    model = two(kind, MERGED[kind])
    wanted, base = truth(model), tiny.model("llama")
    merge_adapters(
        model, [*WEIGHTS], TaskArithmeticConfig(), weights=[*WEIGHTS.values()], rank=64, output_dir=tmp_path / "live"
    )
    assert difference(loaded(tmp_path / "live"), wanted, base) < 1e-5
    base.save_pretrained(tmp_path / "base")
    for name in WEIGHTS:
        model.peft_config[name].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path, selected_adapters=[name])
    models = [{"model": str(tmp_path / name), "parameters": {"weight": weight}} for name, weight in WEIGHTS.items()]
    recipe = {"merge_method": "task_arithmetic", "models": models, "rank": 64}
    if kind in IN_MEMORY_ONLY:
        with pytest.raises(ValueError, match=rf"\({kind}\) .* load both, and merge the adapters in memory"):
            merge_adapter_files(recipe, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    merge_adapter_files(recipe, tmp_path / "out")
    assert difference(loaded(tmp_path / "out"), wanted, base) < 1e-5


@pytest.mark.parametrize("kind", REFUSED)
def test_what_changes_no_weights_is_refused(kind, tmp_path):
    model = two(kind, REFUSED[kind])
    with pytest.raises(ValueError, match=rf"\({kind}\) .* changes no weight"):
        merge_adapters(model, [*WEIGHTS], TaskArithmeticConfig(), rank=64, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
