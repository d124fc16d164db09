"""What every adapter method must do, as a class of tests to inherit.

    from hf_modular.testing import AdapterCase, AdapterContract

    class TestMine(AdapterContract):
        cases = (AdapterCase(MineConfig, {"r": 3}, parameters=lambda sites: 3 * len(sites)),)

pytest then runs each point of the contract over the cases, the kinds of layers, one and two adapters, and fp32 and
bf16. The sizes are chosen so that errors cannot cancel: no two sides are equal and the batch is odd.
"""

import copy
import json
import pickle
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from hf_modular.adapters._layer import BASE, AdapterLayer, wrap
from hf_modular.adapters._method import AdapterConfig, Site

BATCH, IN, OUT, WIDE = 5, 12, 24, 48
ADAPTERS = ("task_1", "task_2")
TARGETS = ("first.fc", "twin.fc", "wide.fc")


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer: how to make one with a number of output channels, and an input for it."""

    make: Callable[[int], nn.Module]
    input: Callable[[], Tensor]
    channel: int = -1  # the axis of the output that holds the channels


class _OffsetNorm(nn.Module):
    """Multiplies by 1 + weight, as Gemma's norm does."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (normed * (1 + self.weight.float())).to(x.dtype)


def _tokens() -> Tensor:
    return torch.randn(BATCH, 3, IN)


def _features() -> Tensor:
    return torch.randn(BATCH, 3, OUT)


def _images(channels: int = IN, *size: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(BATCH, channels, *size)


LINEAR_LAYERS: Mapping[str, LayerKind] = {
    "Linear": LayerKind(lambda n: nn.Linear(IN, n), _tokens),
    "Linear-no-bias": LayerKind(lambda n: nn.Linear(IN, n, bias=False), _tokens),
    "Conv1D": LayerKind(lambda n: Conv1D(n, IN), _tokens),
}
CONV_LAYERS: Mapping[str, LayerKind] = {
    "Conv1d": LayerKind(lambda n: nn.Conv1d(IN, n, 3, stride=2, padding=1), _images(IN, 9), 1),
    "Conv2d": LayerKind(lambda n: nn.Conv2d(IN, n, (3, 2), padding=1, groups=3), _images(IN, 6, 7), 1),
    "Conv3d": LayerKind(lambda n: nn.Conv3d(IN, n, (1, 2, 3)), _images(IN, 2, 3, 4), 1),
    "ConvTranspose1d": LayerKind(lambda n: nn.ConvTranspose1d(IN, n, 3, stride=2), _images(IN, 4), 1),
    "ConvTranspose2d": LayerKind(lambda n: nn.ConvTranspose2d(IN, n, (3, 2), groups=3), _images(IN, 3, 4), 1),
}
EMBEDDINGS: Mapping[str, LayerKind] = {
    "Embedding": LayerKind(lambda n: nn.Embedding(IN, n), lambda: torch.randint(IN, (BATCH, 7))),
}
NORMS: Mapping[str, LayerKind] = {
    "LayerNorm": LayerKind(lambda n: nn.LayerNorm(OUT), _features),
    "RMSNorm": LayerKind(lambda n: nn.RMSNorm(OUT), _features),
    "OffsetNorm": LayerKind(lambda n: _OffsetNorm(OUT), _features),
    "BatchNorm2d": LayerKind(lambda n: nn.BatchNorm2d(OUT), _images(OUT, 2, 3), 1),
    "GroupNorm": LayerKind(lambda n: nn.GroupNorm(6, OUT), _images(OUT, 2, 3), 1),
}
WEIGHT_MATRICES: Mapping[str, LayerKind] = {**LINEAR_LAYERS, **CONV_LAYERS, **EMBEDDINGS}
ALL_LAYERS: Mapping[str, LayerKind] = {**WEIGHT_MATRICES, **NORMS}

# No method can adapt it, since the package does not know how it uses its weight.
_FOREIGN = {"PReLU": LayerKind(lambda n: nn.PReLU(OUT), _images(OUT, 3), 1)}


class _Block(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.fc = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class _Toy(nn.Module):
    """Three layers of one kind and one name: two of the same shape, which may share something, and a wider one."""

    def __init__(self, kind: LayerKind) -> None:
        super().__init__()
        self.channel = kind.channel
        self.first, self.twin, self.wide = (_Block(kind.make(size)) for size in (OUT, OUT, WIDE))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first(x) * torch.tanh(self.twin(x)), self.wide(x)], self.channel)


@dataclass(frozen=True, eq=False)
class AdapterCase:
    """One setting of a method, and what the method promises for it.

    Args:
        config_class (`type[AdapterConfig]`):
            The method's config, registered with `hf_modular.adapters.register`.
        settings (`Mapping[str, Any]`):
            The arguments of the config, without the targets.
        parameters (`Callable[[Sequence[Site]], int]`):
            The number of trainable parameters of one adapter on these layers, from the method's closed form.
        layers (`Mapping[str, LayerKind]`, defaults to `ALL_LAYERS`):
            The kinds of layers that can be adapted; the others of `ALL_LAYERS` must be refused.
        identity (`bool`, defaults to `True`):
            Whether the adapted model starts as exactly the base model.
        mergeable (`Callable[[Site], bool]`, defaults to all):
            Whether an adapter can be merged into a layer.
        seed (`int`, defaults to 0):
            Of the base model, the inputs and the adapters.
    """

    config_class: type[AdapterConfig]
    settings: Mapping[str, Any]
    parameters: Callable[[Sequence[Site]], int]
    layers: Mapping[str, LayerKind] = field(default_factory=lambda: ALL_LAYERS)
    identity: bool = True
    mergeable: Callable[[Site], bool] = lambda site: True
    seed: int = 0

    def config(self, **targets: Any) -> AdapterConfig:
        """The config with these targets and other common settings."""
        return self.config_class(**copy.deepcopy(dict(self.settings)), **targets)

    def __str__(self) -> str:
        name = self.config_class.type_name.removeprefix("HFM_").lower()
        return "-".join([name, *(f"{key}={value}" for key, value in self.settings.items())])


@dataclass(frozen=True)
class Trial:
    """A case on a kind of layer: makes the models that the contract looks at."""

    case: AdapterCase
    kind: str

    def __str__(self) -> str:
        return f"{self.case}-{self.kind}"

    @property
    def layer_kind(self) -> LayerKind:
        return {**ALL_LAYERS, **_FOREIGN, **self.case.layers}[self.kind]

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The base model; always the same, with no weight at its usual start value."""
        with seeded(self.case.seed):
            model = _Toy(self.layer_kind)
            for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
                tensor.data.add_(torch.rand_like(tensor), alpha=0.5)
        return model.to(dtype).eval()

    def sites(self) -> list[Site]:
        base = self.base()
        return [wrap(base.get_submodule(name), name, "contract_adapter", None).site for name in TARGETS]

    def input(self, dtype: torch.dtype = torch.float32) -> Tensor:
        with seeded(self.case.seed + 1):
            x = self.layer_kind.input()
        return x.to(dtype) if x.is_floating_point() else x

    def adapted(self, dtype: torch.dtype = torch.float32, count: int = 1, *, moved: bool = True) -> PeftModel:
        """The model with `count` adapters, all active; `moved` away from where they start."""
        names = ADAPTERS[:count]
        with seeded(self.case.seed + 2):
            model = get_peft_model(self.base(dtype), self.case.config(target_modules=["fc"]), names[0])
            for name in names[1:]:
                model.add_adapter(name, self.case.config(target_modules=["fc"]))
            model.base_model.set_adapter(list(names))
            for parameter in trainable(model).values() if moved else ():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
        return model.eval()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generator seeded for a while, and then as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _run(model: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(x, **kwargs)


def _layers(model: nn.Module) -> list[AdapterLayer]:
    return [module for module in model.modules() if isinstance(module, AdapterLayer)]


def _base_state(model: nn.Module) -> dict[str, Tensor]:
    """The base model's tensors under their own names, whether it is wrapped or not."""
    slots = {f".{layer.adapter_layer_names[0]}." for layer in _layers(model)}
    state = {name: tensor for name, tensor in model.state_dict().items() if not any(slot in name for slot in slots)}
    return {n.removeprefix("base_model.model.").replace(".base_layer.", "."): t.clone() for n, t in state.items()}


def require(condition: bool, message: str) -> None:
    """Fail the test with a message; unlike `assert` also under `python -O`."""
    if not condition:
        raise AssertionError(message)


def same(actual: Any, expected: Any, message: str) -> None:
    """Equal to the last bit, dtypes and shapes included."""
    assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{message}\n{text}")


def close(actual: Tensor, expected: Tensor, message: str) -> None:
    """Equal up to the rounding of the dtype, beside the largest entry."""
    rounding = 0.04 if torch.bfloat16 in (actual.dtype, expected.dtype) else 1e-5
    atol = rounding * max(1.0, float(expected.detach().abs().max()))
    assert_close(actual, expected, rtol=rounding, atol=atol, msg=lambda text: f"{message}\n{text}")


class AdapterContract:
    """The fifteen points that hold for every adapter method; inherit it and give `cases`.

    `dtypes` and `kinds` may be narrowed for settings that differ from others in one place only.
    """

    cases: Sequence[AdapterCase] = ()
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)
    kinds: Container[str] = (*ALL_LAYERS, *_FOREIGN)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each test over what its arguments name."""
        for argument, values in {"dtype": self.dtypes, "count": (1, 2), "case": self.cases}.items():
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, values, ids=_id)
        for argument, trials in _trials(tuple(self.cases)).items():
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, [t for t in trials if t.kind in self.kinds], ids=_id)

    # 1
    def test_starts_as_the_base_model_where_it_promises_so(self, trial: Trial, dtype: torch.dtype, count: int) -> None:
        x, base = trial.input(dtype), trial.base(dtype)
        start = _run(trial.adapted(dtype, count, moved=False), x)
        if trial.case.identity:
            same(start, _run(base, x), "The model must start as exactly the base model.")
        else:
            require(not torch.equal(start, _run(base, x)), "The model starts as the base model; then promise it.")

    # 2
    def test_every_layer_changes_once_its_parameters_move(self, trial: Trial, count: int) -> None:
        x, base, model = trial.input(), trial.base(), trial.adapted(count=count)
        for name in TARGETS:
            change = _run(model.get_submodule(f"base_model.model.{name}"), x) - _run(base.get_submodule(name), x)
            require(bool(change.abs().max() > 1e-2), f"The adapter on '{name}' does not change its output.")

    # 3
    def test_the_merged_model_equals_the_adapted_one(self, mergeable: Trial, dtype: torch.dtype, count: int) -> None:
        x, model = mergeable.input(dtype), mergeable.adapted(dtype, count)
        expected = _run(model, x)
        model.merge_adapter()
        require(all(layer.merged for layer in _layers(model)), "A layer was not merged.")
        close(_run(model, x), expected, "Merging changes the output.")

    def test_merging_one_by_one_equals_merging_at_once(self, mergeable: Trial, dtype: torch.dtype) -> None:
        x, model = mergeable.input(dtype), mergeable.adapted(dtype, 2)
        model.merge_adapter()
        expected = _run(model, x)
        model.unmerge_adapter()
        model.merge_adapter(adapter_names=[ADAPTERS[0]])
        with pytest.warns(UserWarning, match="additionally merging"):
            model.merge_adapter(adapter_names=[ADAPTERS[1]])
        same(_run(model, x), expected, "The order of merging matters though the order of adapters is the same.")

    # 4
    def test_unmerging_restores_every_bit(self, mergeable: Trial, dtype: torch.dtype, count: int) -> None:
        x, model = mergeable.input(dtype), mergeable.adapted(dtype, count)
        before, output = _base_state(model), _run(model, x)
        model.merge_adapter()
        require(not _equal_states(_base_state(model), before), "Merging writes nothing.")
        model.unmerge_adapter()
        same(_base_state(model), before, "Unmerging does not restore the base weights.")
        same(_run(model, x), output, "Unmerging does not restore the output.")

    # 5
    def test_a_merge_that_gives_nan_is_refused_and_writes_nothing(self, mergeable: Trial, dtype: torch.dtype) -> None:
        model = mergeable.adapted(dtype)
        before = _base_state(model)
        next(_layers(model)[-1].adapters[ADAPTERS[0]].parameters()).data.fill_(torch.nan)
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match=r"'(first|twin|wide)\.fc'.*NaN"):
                merge(safe_merge=True)
            same(_base_state(model), before, "A refused merge has written something.")
            require(not any(layer.merged for layer in _layers(model)), "A refused merge has merged a layer.")

    def test_a_layer_that_cannot_be_merged_is_named_and_nothing_is_written(self, unmergeable: Trial) -> None:
        model, x = unmergeable.adapted(), unmergeable.input()
        before, output = _base_state(model), _run(model, x)
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match=r"cannot be merged(.|\n)*first"):
                merge()
        same(_base_state(model), before, "A refused merge has written something.")
        same(_run(model, x), output, "A refused merge has changed the model.")

    # 6
    def test_disabled_adapters_leave_the_base_model(self, trial: Trial, dtype: torch.dtype, count: int) -> None:
        x, model = trial.input(dtype), trial.adapted(dtype, count)
        adapted = _run(model, x)
        with model.disable_adapter():
            same(_run(model, x), _run(trial.base(dtype), x), "Disabled adapters change the output.")
        same(_run(model, x), adapted, "The adapters do not come back.")

    def test_disabling_merged_adapters_unmerges_them(self, mergeable: Trial) -> None:
        x, model = mergeable.input(), mergeable.adapted()
        model.merge_adapter()
        with model.disable_adapter():
            same(_run(model, x), _run(mergeable.base(), x), "Disabled adapters stay merged.")

    # 7
    def test_the_adapters_and_nothing_else_have_gradients(self, trial: Trial, dtype: torch.dtype, count: int) -> None:
        model = trial.adapted(dtype, count)
        output = model(trial.input(dtype)).float()
        (output * torch.linspace(-1, 2, output.numel()).reshape(output.shape)).sum().backward()
        slot = _layers(model)[0].adapter_layer_names[0]
        for name, parameter in model.named_parameters():
            if f".{slot}." not in name:
                require(not parameter.requires_grad and parameter.grad is None, f"'{name}' of the base is trained.")
            else:
                gradient = parameter.grad
                require(gradient is not None and bool(gradient.any()), f"'{name}' has no gradient.")
                require(bool(torch.isfinite(gradient).all()), f"'{name}' has a broken gradient.")

    def test_an_inactive_adapter_has_no_gradients(self, trial: Trial) -> None:
        model = trial.adapted(count=2)
        model.set_adapter(ADAPTERS[1])
        model(trial.input()).sum().backward()
        touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        require(all(f".{ADAPTERS[1]}." in name for name in touched), f"An inactive adapter is trained: {touched}.")

    # 8
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_a_saved_adapter_loads_under_another_seed_and_name(
        self, trial: Trial, dtype: torch.dtype, low_cpu_mem_usage: bool, tmp_path: Path
    ) -> None:
        x, model = trial.input(dtype), trial.adapted(dtype, 2)
        model.save_pretrained(tmp_path)
        for name in ADAPTERS:
            model.set_adapter(name)
            with seeded(99):
                loaded = PeftModel.from_pretrained(
                    trial.base(dtype), tmp_path / name, adapter_name="loaded", low_cpu_mem_usage=low_cpu_mem_usage
                )
            same(_run(loaded.eval(), x), _run(model, x), f"The loaded adapter is not the saved one ({name}).")

    def test_a_loaded_adapter_joins_another_one(self, trial: Trial, tmp_path: Path) -> None:
        x, model = trial.input(), trial.adapted(count=2)
        model.save_pretrained(tmp_path)
        with seeded(99):
            other = get_peft_model(trial.base(), trial.case.config(target_modules=["fc"]), "mine").eval()
        other.load_adapter(tmp_path / ADAPTERS[1], "theirs")
        other.set_adapter("theirs")
        model.set_adapter(ADAPTERS[1])
        same(_run(other, x), _run(model, x), "The adapter that was loaded beside another is not the saved one.")

    # 9
    def test_the_config_survives_json_and_pickle(self, case: AdapterCase, tmp_path: Path) -> None:
        config = case.config(target_modules=["b", "a"], layers_to_transform=[0], task_type="CAUSAL_LM")
        config.save_pretrained(str(tmp_path))
        saved = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
        require(saved["peft_type"] == case.config_class.type_name, "The saved type is not the registered one.")
        for loaded in (PeftConfig.from_pretrained(tmp_path), pickle.loads(pickle.dumps(config))):
            require(type(loaded) is case.config_class, f"The config comes back as a {type(loaded).__name__}.")
            require(loaded == config, f"The config comes back changed: {loaded} is not {config}.")

    # 10
    def test_a_cheap_forward_equals_the_rewritten_layer(self, mergeable: Trial, count: int) -> None:
        x, model = mergeable.input(), mergeable.adapted(count=count)
        if x.is_floating_point():
            x.requires_grad_()
        wanted = [x] if x.is_floating_point() else []
        for layer in _layers(model):
            adapters = [layer.adapters[name] for name in ADAPTERS[:count]]
            parameters = [*wanted, *(p for adapter in adapters for p in adapter.parameters())]
            rewritten = layer._call_base(layer._fold(adapters), x, (), {})  # type: ignore[arg-type]
            outputs = (layer(x), rewritten)
            slopes = torch.linspace(-1, 2, rewritten.numel()).reshape(rewritten.shape)
            gradients = [torch.autograd.grad((y * slopes).sum(), parameters) for y in outputs]
            close(outputs[0], rewritten, f"The cheap forward of '{layer.site.name}' is another function.")
            for cheap, full in zip(*gradients, strict=True):
                close(cheap, full, f"The cheap forward of '{layer.site.name}' has other gradients.")

    # 11
    def test_dtypes_and_devices_stay(self, trial: Trial, dtype: torch.dtype, count: int) -> None:
        model, base, x = trial.adapted(dtype, count), trial.base(dtype), trial.input(dtype)
        y = _run(model, x)
        require(y.dtype == dtype and y.device == x.device, f"The output is {y.dtype} on {y.device}.")
        for name, tensor in base.state_dict().items():
            require(_base_state(model)[name].dtype == tensor.dtype, f"'{name}' of the base has another dtype.")
        parameters = trainable(model).values()
        require({p.dtype for p in parameters} == {torch.float32}, "Adapters train in fp32, whatever the base is.")

    def test_a_bare_half_precision_adapter_works(self, trial: Trial) -> None:
        """As on the native path of transformers, where adapters keep the dtype of the base model."""
        model, x = trial.adapted(torch.bfloat16).to(torch.bfloat16), trial.input(torch.bfloat16)
        y = model(x)
        y.float().sum().backward()
        require(y.dtype == torch.bfloat16 and bool(torch.isfinite(y).all()), f"The output is {y.dtype}.")

    # 12
    def test_merge_and_unload_gives_the_original_classes_and_keys(self, mergeable: Trial, dtype: torch.dtype) -> None:
        x, base, model = mergeable.input(dtype), mergeable.base(dtype), mergeable.adapted(dtype)
        expected = _run(model, x)
        merged = model.merge_and_unload()
        require([type(m) for m in merged.modules()] == [type(m) for m in base.modules()], "Other classes came out.")
        require(list(merged.state_dict()) == list(base.state_dict()), "Other keys came out.")
        close(_run(merged, x), expected, "The unloaded model is another function.")
        base.load_state_dict(merged.state_dict())
        same(_run(base, x), _run(merged, x), "The state dict alone does not make the merged model.")
        same(base.state_dict(), merged.state_dict(), "Shapes or dtypes have changed.")

    def test_unload_gives_the_base_model(self, trial: Trial) -> None:
        base, unloaded = trial.base(), trial.adapted().unload()
        require([type(m) for m in unloaded.modules()] == [type(m) for m in base.modules()], "Other classes came out.")
        same(unloaded.state_dict(), base.state_dict(), "The base model has changed.")

    # 13
    def test_an_unsupported_layer_is_refused_by_name_and_nothing_changes(self, refused: Trial) -> None:
        base, x = refused.base(), refused.input()
        before = _run(base, x), dict(base.named_modules()), list(trainable(base))
        with pytest.raises((TypeError, ValueError), match=r"'first\.fc'"):
            get_peft_model(base, refused.case.config(target_modules=["fc"]), ADAPTERS[0])
        after = _run(base, x), dict(base.named_modules()), list(trainable(base))
        require(after[1:] == before[1:], "The refused adapter has left something behind.")
        same(after[0], before[0], "The refused adapter has changed the model.")

    # 14
    def test_a_mixed_batch_equals_each_sample_alone(self, trial: Trial, dtype: torch.dtype) -> None:
        x, model = trial.input(dtype), trial.adapted(dtype, 2)
        names = [ADAPTERS[0], BASE, ADAPTERS[1], ADAPTERS[0], BASE]
        mixed = _run(model, x, adapter_names=names)
        for i, name in enumerate(names):
            if name == BASE:
                alone = _run(trial.base(dtype), x[i : i + 1])
            else:
                model.set_adapter(name)
                alone = _run(model, x[i : i + 1])
            close(mixed[i : i + 1], alone, f"Sample {i} of the mixed batch is not what '{name}' gives alone.")

    # 15
    def test_the_trainable_parameters_are_as_many_as_the_formula_says(self, trial: Trial, count: int) -> None:
        found = sum(p.numel() for p in trainable(trial.adapted(count=count)).values())
        expected = trial.case.parameters(trial.sites()) * count
        require(found == expected, f"{found} trainable parameters, and the formula says {expected}.")

    # and what follows from several of them
    def test_a_copy_is_the_same_model_apart(self, trial: Trial) -> None:
        x, model = trial.input(), trial.adapted(count=2)
        before, twin = _run(model, x), copy.deepcopy(model)
        same(_run(twin, x), before, "The copy is another model.")
        require(len(trainable(twin)) == len(trainable(model)), "What the layers share comes apart in a copy.")
        for parameter in trainable(twin).values():
            parameter.data.zero_()
        same(_run(model, x), before, "The copy is tied to the original.")

    def test_a_deleted_adapter_leaves_nothing(self, trial: Trial) -> None:
        x, model = trial.input(), trial.adapted(count=2)
        model.set_adapter(ADAPTERS[1])
        expected = _run(model, x)
        model.delete_adapter(ADAPTERS[0])
        require(not any(ADAPTERS[0] in name for name in model.state_dict()), "Tensors of the deleted adapter remain.")
        same(_run(model, x), expected, "Deleting one adapter changes another.")


@lru_cache
def _trials(cases: tuple[AdapterCase, ...]) -> dict[str, list[Trial]]:
    """The trials of each argument that a test may have."""
    every = [Trial(case, kind) for case in cases for kind in {**ALL_LAYERS, **_FOREIGN, **case.layers}]
    supported = [trial for trial in every if trial.kind in trial.case.layers]
    mergeable = [trial for trial in supported if all(map(trial.case.mergeable, trial.sites()))]
    return {
        "trial": supported,
        "mergeable": mergeable,
        "unmergeable": [trial for trial in supported if trial not in mergeable],
        "refused": [trial for trial in every if trial.kind not in trial.case.layers],
    }


def _equal_states(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def _id(value: object) -> str:
    return str(value).removeprefix("torch.")
