"""The types in PEFT's closed registry: they behave like PEFT's own, and whatever is in the way is named."""

import copy
import importlib
import json
import multiprocessing
import pickle
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum, StrEnum
from typing import Any, ClassVar

import peft
import pytest
from peft import PeftConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

import hf_modular.adapters
from adapters.table import METHODS, TABLE
from hf_modular.adapters import (
    Adapter,
    AdapterConfig,
    PeftContractError,
    PeftTypeConflictError,
    SSFConfig,
    _peft,
    register,
)
from hf_modular.testing import AdapterCase

TYPES = [case.config_class.type_name for case in METHODS]


@pytest.mark.parametrize("name", TYPES)
def test_a_type_is_a_member_like_any_other(name: str) -> None:
    member = PeftType(name)
    assert isinstance(member, PeftType)
    assert member is PeftType[name] is getattr(PeftType, name)
    assert (member.value, member.name, member == name, hash(member) == hash(name)) == (name, name, True, True)
    assert repr(member) == f"<PeftType.{name}: '{name}'>"
    assert str(member) == str(PeftType.LORA).replace("LORA", name)
    assert member in list(PeftType)
    assert name in PeftType.__members__
    assert json.dumps({"type": member}) == f'{{"type": "{name}"}}'
    assert copy.copy(member) is copy.deepcopy(member) is member
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(member, protocol)) is member


@pytest.mark.parametrize("name", TYPES)
def test_a_type_is_in_all_of_pefts_tables(name: str) -> None:
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        assert mapping[name] is mapping[PeftType(name)]
    assert PEFT_TYPE_TO_PREFIX_MAPPING[name] == f"{name.lower()}_"  # transformers takes it for granted


def test_pefts_own_types_are_still_what_they_were() -> None:
    assert all(PeftType(member.value) is member for member in PeftType)
    assert len(set(PeftType)) == len(list(PeftType)) == len(PeftType)
    with pytest.raises(ValueError, match="HFM_NOTHING"):
        PeftType("HFM_NOTHING")


def test_the_table_of_methods_is_what_is_registered_and_tested() -> None:
    configs = {config for config, _ in hf_modular.adapters.METHODS.values()}
    assert {PEFT_TYPE_TO_CONFIG_MAPPING[config.type_name] for config in configs} == configs
    assert {case.config_class for case in METHODS} == configs


# -- what stands in the way -------------------------------------------------------------------------------------------


@dataclass
class NewConfig(AdapterConfig):
    type_name: ClassVar[str] = "HFM_NEW"


class New(Adapter):
    def delta(self) -> Any:
        return 0


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """The registry is afterwards as it was before."""
    mappings = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)
    before = [dict(mapping) for mapping in mappings]
    members = dict(PeftType.__members__)
    yield
    for mapping, kept in zip(mappings, before, strict=True):
        mapping.clear()
        mapping.update(kept)
    for name in PeftType.__members__.keys() - members.keys():
        member = PeftType._member_map_.pop(name)
        PeftType._member_names_.remove(name)
        PeftType._value2member_map_.pop(member.value)
        type.__delattr__(PeftType, name)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(owner, name) for owner, names in _peft._NEEDED.items() for name in names],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_peft_that_lacks_something_is_refused(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    for cls in owner.__mro__:
        if name in vars(cls):
            monkeypatch.delattr(cls, name)
    with pytest.raises(PeftContractError, match=rf"peft {peft.__version__} is installed: .*no {name}.*pip install"):
        register(NewConfig, New)
    assert "HFM_NEW" not in PeftType.__members__


def test_a_peft_with_another_registry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_peft, "register_peft_method", lambda name, config_cls: None)
    with pytest.raises(PeftContractError, match="register_peft_method does not take"):
        register(NewConfig, New)
    monkeypatch.setattr(_peft, "PeftType", Enum("PeftType", "LORA"))
    with pytest.raises(PeftContractError, match="PeftType is no string enum"):
        register(NewConfig, New)


def test_a_python_with_another_enum_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stubborn(StrEnum):
        LORA = "LORA"
        __hash__ = object.__hash__

    monkeypatch.setattr(_peft, "PeftType", Stubborn)
    with pytest.raises(PeftContractError, match="does not take the new member 'HFM_NEW' on this Python"):
        _peft.add_peft_type("HFM_NEW")


def test_a_type_of_somebody_else_is_left_alone() -> None:
    register(NewConfig, New)

    @dataclass
    class TheirConfig(NewConfig):
        pass

    with pytest.raises(PeftTypeConflictError, match=r"HFM_NEW is registered by .*test_registry\.NewConfig"):
        register(TheirConfig, New)
    assert PEFT_TYPE_TO_CONFIG_MAPPING["HFM_NEW"] is NewConfig


@pytest.mark.parametrize("name", ["LORA", "OFT"])
def test_a_type_of_pefts_own_is_left_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before = PEFT_TYPE_TO_CONFIG_MAPPING[name]
    monkeypatch.setattr(NewConfig, "type_name", name)
    with pytest.raises(PeftTypeConflictError, match=f"{name} is registered by peft"):
        register(NewConfig, New)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[name] is before


def test_a_member_that_nobody_has_registered_is_left_alone() -> None:
    """A later PEFT may have the name for a method that needs a package which is not installed."""
    del _peft.add_peft_type("HFM_NEW").added_by
    with pytest.raises(PeftTypeConflictError, match="PEFT has a type HFM_NEW of its own"):
        register(NewConfig, New)


def test_a_first_import_that_failed_half_way_can_be_repeated() -> None:
    _peft.add_peft_type("HFM_NEW")
    register(NewConfig, New)
    assert PEFT_TYPE_TO_CONFIG_MAPPING["HFM_NEW"] is NewConfig


@pytest.mark.parametrize("body", [{}, {"delta": New.delta, "transform": lambda self, w, b: (w, b)}])
def test_a_method_defines_one_thing(body: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="defines one of `delta`, `transform` and `forward`"):
        register(NewConfig, type("Odd", (Adapter,), body))
    assert "HFM_NEW" not in PeftType.__members__


def test_importing_again_is_harmless() -> None:
    member, length = PeftType("HFM_SSF"), len(PeftType)
    old = PEFT_TYPE_TO_CONFIG_MAPPING["HFM_SSF"]
    ssf = importlib.reload(importlib.import_module("hf_modular.adapters.ssf"))
    try:
        model_class = register(ssf.SSFConfig, ssf.SSF)
        assert PeftType("HFM_SSF") is member
        assert len(PeftType) == length
        assert PEFT_TYPE_TO_CONFIG_MAPPING["HFM_SSF"] is ssf.SSFConfig is not old
        assert PEFT_TYPE_TO_TUNER_MAPPING["HFM_SSF"] is model_class
        model = get_peft_model(nn.Sequential(nn.Linear(3, 4)), ssf.SSFConfig(target_modules=["0"]))
        assert type(model.base_model) is model_class
    finally:
        ssf.SSFConfig, ssf.SSF = SSFConfig, hf_modular.adapters.SSF


# -- configs in other processes ---------------------------------------------------------------------------------------


def _in_another_process(blob: bytes) -> tuple[str, dict[str, Any]]:
    config = pickle.loads(blob)
    assert config.peft_type is PeftType(config.type_name)
    return type(config).__name__, asdict(config)


def test_configs_go_to_a_fresh_process_and_back() -> None:
    """Spawned, so that unpickling is the first that the process does with this package."""
    configs = [case.config(target_modules=["a", "b"]) for case in TABLE]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.map(_in_another_process, [pickle.dumps(config) for config in configs])
    assert found == [(type(config).__name__, asdict(config)) for config in configs]


@pytest.mark.parametrize("case", METHODS, ids=str)
def test_a_config_is_written_alike_whatever_the_order_of_its_targets(case: AdapterCase, tmp_path: Any) -> None:
    names = [f"layer_{i}" for i in range(20)]
    for folder, order in (("a", names), ("b", names[::-1])):
        case.config(target_modules=order).save_pretrained(str(tmp_path / folder))
    texts = [(tmp_path / folder / "adapter_config.json").read_text() for folder in "ab"]
    assert texts[0] == texts[1]
    assert json.loads(texts[0])["target_modules"] == sorted(names)
    assert PeftConfig.from_pretrained(tmp_path / "a").target_modules == set(names)


def test_the_tuner_classes_have_names_of_their_own() -> None:
    for name in TYPES:
        model_class = PEFT_TYPE_TO_TUNER_MAPPING[name]
        assert issubclass(model_class, BaseTuner)
        assert pickle.loads(pickle.dumps(model_class)) is model_class
