"""Every method keeps the contract."""

import torch

from adapters.table import METHODS, SETTINGS
from hf_modular.testing import AdapterContract


class TestMethods(AdapterContract):
    cases = METHODS


class TestSettings(AdapterContract):
    cases = SETTINGS
    dtypes = (torch.float32,)
    kinds = ("Linear", "Linear-no-bias", "Conv2d", "Embedding", "OffsetNorm")
