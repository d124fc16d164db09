"""What cannot work is refused with a reason, before anything has changed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn

from adapters import tiny
from adapters.conftest import Saved, adapted
from adapters.table import METHODS
from hf_modular import HUTConfig, SSFConfig
from hf_modular.testing import AdapterCase

all_methods = pytest.mark.parametrize("case", METHODS, ids=str)
Make = Callable[[AdapterCase, str], Saved]


# -- settings ---------------------------------------------------------------------------------------------------------

COMMON = [
    ({"target_modules": 3}, TypeError, "`target_modules` must be a list of names or a regular expression"),
    ({"target_modules": ["q_proj", 3]}, TypeError, "`target_modules` must be a list"),
    ({"target_modules": "(q_proj"}, ValueError, r"target_modules='\(q_proj': missing \)"),
    ({"exclude_modules": {"q_proj": 1}.items()}, TypeError, "`exclude_modules` must be a list"),
    ({"exclude_modules": "*"}, ValueError, "`exclude_modules` must be a regular expression"),
    ({"modules_to_save": "classifier"}, TypeError, "`modules_to_save` must be a list of names, but got"),
    ({"target_modules": ".*q_proj", "layers_to_transform": [1]}, ValueError, "`layers_to_transform` needs `target_m"),
    ({"target_modules": ".*q_proj", "layers_pattern": "h"}, ValueError, "`layers_pattern` needs `target_modules`"),
    ({"layers_pattern": "h"}, ValueError, "`layers_pattern` needs `layers_to_transform`"),
    ({"layers_to_transform": [1, -1]}, ValueError, r"`layers_to_transform` must be .*\[1, -1\]"),
    ({"layers_to_transform": 1.5}, ValueError, "`layers_to_transform` must be numbers from 0 on"),
    ({"bias": "some"}, ValueError, "`bias` must be one of"),
    ({"task_type": "SINGING"}, ValueError, "Invalid task type: 'SINGING'"),
    ({"format_version": 2}, ValueError, r"format_version=2.*reads up to 1. Upgrade hf_modular"),
    ({"format_version": 0}, ValueError, "`format_version` must be a positive integer"),
]


@all_methods
@pytest.mark.parametrize(("settings", "error", "message"), COMMON, ids=lambda v: str(v)[:40])
def test_common_settings(case: AdapterCase, settings: dict[str, object], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        case.config(**settings)


OWN = [
    (HUTConfig, {"r": 0}, ValueError, "`r` must be a positive integer, but got r=0"),
    (HUTConfig, {"r": 2.0}, ValueError, "`r` must be a positive integer"),
    (HUTConfig, {"r": True}, ValueError, "`r` must be a positive integer"),
    (HUTConfig, {"form": "tiles"}, ValueError, r"`form` must be one of \['tile', 'row_column', 'low_rank'\]"),
    (HUTConfig, {"scale_shift": "yes"}, TypeError, "`scale_shift` must be True or False, but got scale_shift='yes'"),
    (HUTConfig, {"init_weights": "identity"}, TypeError, "`init_weights` must be True or False"),
    (HUTConfig, {"dropout": 1.0}, ValueError, r"`dropout` must be in \[0.0, 1.0\), but got dropout=1.0"),
    (HUTConfig, {"dropout": -0.1}, ValueError, "`dropout` must be in"),
    (HUTConfig, {"dropout": "0.1"}, TypeError, "`dropout` must be a finite number, but got dropout='0.1'"),
    (HUTConfig, {"dropout": float("nan")}, TypeError, "`dropout` must be a finite number"),
    (HUTConfig, {"rank_pattern": ["q_proj"]}, TypeError, "`rank_pattern` must be a dict"),
    (HUTConfig, {"rank_pattern": {"q_proj": -1}}, ValueError, r"`rank_pattern\['q_proj'\]` must be a positive"),
    (HUTConfig, {"rank_pattern": {"(": 1}}, ValueError, "`rank_pattern` must be a regular expression"),
    (SSFConfig, {"shift": "always"}, ValueError, r"`shift` must be one of \['auto', True, False\]"),
    (SSFConfig, {"shift": 1}, ValueError, "`shift` must be one of"),
    (SSFConfig, {"init_weights": "paper"}, ValueError, "`init_weights` must be one of"),
    (SSFConfig, {"init_std": -1.0}, ValueError, "`init_std` must be in"),
    (SSFConfig, {"init_std": float("inf")}, TypeError, "`init_std` must be a finite number"),
]


@pytest.mark.parametrize(("config", "settings", "error", "message"), OWN, ids=lambda v: str(v)[:40])
def test_own_settings(config: type, settings: dict[str, object], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        config(**settings)


# -- layers -----------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Layers that can be adapted beside such that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Linear(24, 24)
        self.heads = nn.MultiheadAttention(24, 3, batch_first=True)
        self.both = nn.Bilinear(24, 24, 4)
        self.weightless = nn.LayerNorm(24, elementwise_affine=False)
        self.wide = nn.LayerNorm((3, 24))
        self.computed = nn.utils.parametrizations.weight_norm(nn.Linear(24, 8))
        self.renormed = nn.Embedding(24, 24, max_norm=1.0)
        self.once = self.again = nn.Linear(24, 24)
        self.classifier = nn.Linear(24, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.fine(x))


REFUSED = {
    "nothing": (["nowhere"], ValueError, "No modules were targeted for adaptation"),
    "attention": (["heads"], TypeError, r"'heads' \(MultiheadAttention\) has no weight"),
    "inside attention": (["fine", "out_proj"], TypeError, "'heads.out_proj' belongs to a torch.nn.MultiheadAttention"),
    "a layer of another kind": (
        ["fine", "both"],
        TypeError,
        "'both' is a Bilinear, which cannot be adapted. Supported",
    ),
    "a norm without weights": (["fine", "weightless"], TypeError, "'weightless' .* has no weight of its own"),
    "a norm over two axes": (["fine", "wide"], TypeError, "'wide' normalises over 2 axes"),
    "a computed weight": (r"computed", TypeError, r"'computed' .*computes it"),
    "a layer in two places": (["fine", "once"], TypeError, r"'once' stands in several places .*\(once, again\)"),
    "an embedding that rewrites itself": (["renormed"], TypeError, "'renormed' has max_norm=1.0"),
}


@all_methods
@pytest.mark.parametrize(("targets", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_layers(case: AdapterCase, targets: list[str] | str, error: type, message: str) -> None:
    model = Mixed()
    before = dict(model.named_modules()), [p.requires_grad for p in model.parameters()]
    for attempt in (get_peft_model, lambda model, config: inject_adapter_in_model(config, model)):
        with pytest.raises(error, match=message):
            attempt(model, case.config(target_modules=targets, modules_to_save=["classifier"]))
        assert (dict(model.named_modules()), [p.requires_grad for p in model.parameters()]) == before
        assert not hasattr(model, "peft_config")
    get_peft_model(model, case.config(target_modules=["fine"]))  # and it can still be adapted


@all_methods
def test_a_refused_second_adapter_leaves_the_first_alone(case: AdapterCase) -> None:
    model = adapted(case, "llama")
    before, trained = tiny.run(model), tiny.trainable(model)
    names = list(dict(model.named_parameters()))
    for targets in (["nowhere"], ["q_proj", "rotary_emb"]):
        with pytest.raises((TypeError, ValueError)):
            model.add_adapter("two", case.config(target_modules=targets))
    assert torch.equal(tiny.run(model), before)
    assert (tiny.trainable(model), list(dict(model.named_parameters()))) == (trained, names)
    assert list(model.peft_config) == model.active_adapters == ["default"]
    model.add_adapter("two", case.config())


def test_an_adapter_of_another_type_on_the_same_layer() -> None:
    model = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), tiny.model("llama"))
    with (
        pytest.warns(UserWarning, match="Already found a `peft_config`"),
        pytest.raises(TypeError, match=r"q_proj' already holds adapters of another type \(Linear\)"),
    ):
        inject_adapter_in_model(HUTConfig(target_modules=["q_proj"]), model, "two")
    assert model.model.layers[0].self_attn.q_proj.active_adapters == ["default"]


@all_methods
def test_mamba_layers_that_are_read_by_a_kernel(case: AdapterCase) -> None:
    class Config:
        model_type = "mamba"

        def to_dict(self) -> dict[str, str]:
            return {"model_type": "mamba"}

    model = Mixed()
    model.out_proj, model.config = nn.Linear(24, 24), Config()
    with pytest.raises(ValueError, match="'out_proj' of a mamba model is read by a kernel"):
        get_peft_model(model, case.config(target_modules=["out_proj"]))


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(saved: Make, tmp_path: Path) -> Callable[[AdapterCase], tuple[Saved, Path]]:
    def make(case: AdapterCase) -> tuple[Saved, Path]:
        made = saved(case, "llama")
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (tmp_path / file).write_bytes((made.adapter / file).read_bytes())
        return made, tmp_path

    return make


Copy = Callable[[AdapterCase], tuple[Saved, Path]]


@all_methods
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("change", ["missing", "extra", "foreign"])
def test_a_tensor_too_few_or_too_many(copied: Copy, case: AdapterCase, change: str, low_cpu_mem_usage: bool) -> None:
    """PEFT only warns of the first, and says nothing of the others."""
    made, folder = copied(case)
    tensors = load_file(folder / "adapter_model.safetensors")
    key = sorted(tensors)[0]
    if change == "missing":
        tensors.pop(key)
        message = rf"It lacks 1 tensors \({key.rpartition('.hfm_')[0]}.*holds 0 tensors"
    else:
        strange = key.replace("layers.0", "layers.7") if change == "extra" else "something.else"
        tensors[strange] = torch.zeros(2)
        message = rf"It lacks 0 tensors and holds 1 tensors \({strange}\) too much"
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(made.model(), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    other = adapted(case, "llama", task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=message):
        other.load_adapter(folder, "loaded", low_cpu_mem_usage=low_cpu_mem_usage)


@all_methods
def test_a_tensor_of_another_shape(copied: Copy, case: AdapterCase) -> None:
    made, folder = copied(case)
    tensors = load_file(folder / "adapter_model.safetensors")
    key = sorted(tensors)[0]
    tensors[key] = torch.cat([tensors[key], tensors[key]])
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(made.model(), folder)


@all_methods
def test_a_file_of_a_newer_format(copied: Copy, case: AdapterCase) -> None:
    made, folder = copied(case)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "format_version": 2}))
    for load in (PeftConfig.from_pretrained, lambda folder: PeftModel.from_pretrained(made.model(), folder)):
        with pytest.raises(ValueError, match=r"format_version=2.*Upgrade hf_modular"):
            load(folder)


@all_methods
def test_a_diverged_adapter_is_not_saved(case: AdapterCase, tmp_path: Path) -> None:
    model = adapted(case, "llama")
    next(p for p in model.parameters() if p.requires_grad).data.view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match=r"Tensor '.*hfm_.*' of the adapter holds NaN or infinity"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()


@all_methods
def test_what_was_trained_whole_beside_it_must_be_finite_too(case: AdapterCase, tmp_path: Path) -> None:
    model = adapted(case, "classifier", target_modules=["query", "dense"], modules_to_save=["classifier"])
    model.base_model.model.classifier.modules_to_save["default"].bias.data[1] = torch.inf
    with pytest.raises(
        ValueError, match=r"Tensor '.*classifier.modules_to_save.default.bias' of the adapter holds NaN"
    ):
        model.save_pretrained(tmp_path)
    model.base_model.model.classifier.modules_to_save["default"].bias.data[1] = 0.0
    model.base_model.model.classifier.original_module.bias.data[1] = torch.inf  # which is not saved
    model.save_pretrained(tmp_path)


@all_methods
def test_an_adapter_that_was_not_gathered_is_not_saved(case: AdapterCase, tmp_path: Path) -> None:
    """Sharded training hands out empty tensors."""
    model = adapted(case, "llama")
    state = {name: torch.empty(0) if "hfm_" in name else t for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="is empty; was the sharded model gathered"):
        model.save_pretrained(tmp_path, state_dict=state)
