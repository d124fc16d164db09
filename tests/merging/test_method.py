"""Settings: their laws, and config <-> JSON <-> config."""

import json
from dataclasses import fields

import pytest

from hf_modular.merging import METHODS, DAREConfig, LinearConfig, TaskArithmeticConfig


@pytest.mark.parametrize(
    ("config", "settings", "error", "message"),
    [
        (DAREConfig, {"drop": 1.0}, ValueError, r"`drop` must be in \[0, 1\), but got drop=1.0"),
        (DAREConfig, {"drop": -0.1}, ValueError, "drop=-0.1"),
        (DAREConfig, {"drop": "0.5"}, TypeError, "`drop` must be of type float, but got drop='0.5'"),
        (DAREConfig, {"drop": True}, TypeError, "drop=True"),
        (DAREConfig, {"rescale": "l2"}, ValueError, "`rescale` must be one of .*'norm'.*rescale='l2'"),
        (LinearConfig, {"normalize": 1}, TypeError, "`normalize` must be of type bool"),
        (TaskArithmeticConfig, {"scale": float("nan")}, ValueError, "scale=nan"),
        (TaskArithmeticConfig, {"scale": float("inf")}, ValueError, "scale=inf"),
    ],
)
def test_a_setting_outside_its_law_is_refused(config, settings, error, message):
    with pytest.raises(error, match=message):
        config(**settings)


def test_an_int_is_a_float():
    assert TaskArithmeticConfig(scale=2).scale == 2


@pytest.mark.parametrize("config", [method() for method in METHODS.values()] + [DAREConfig(drop=0.25, rescale="norm")])
def test_config_to_json_to_config(config, tmp_path):
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "merge_config.json").read_text())["merge_method"] == config.name
    assert type(config).from_pretrained(tmp_path) == config


def test_foreign_settings_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"merge_config\.json"):
        DAREConfig.from_pretrained(tmp_path)
    LinearConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="settings of 'dare', but got those of 'linear'"):
        DAREConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="densty"):
        DAREConfig.from_dict({"densty": 0.5})


def test_every_setting_explains_itself():
    for method in METHODS.values():
        for field in fields(method):
            assert field.metadata["help"].endswith("."), f"{method.name}.{field.name}"
