"""Adapter methods. Importing this package registers them with PEFT."""

from hf_modular.adapters._method import Adapter, AdapterConfig, Site
from hf_modular.adapters._peft import PeftContractError, PeftTypeConflictError, register
from hf_modular.adapters.hut import HUT, HUTConfig
from hf_modular.adapters.ssf import SSF, SSFConfig

# name -> (config, adapter): the one place where a method is entered
METHODS: dict[str, tuple[type[AdapterConfig], type[Adapter]]] = {
    "hut": (HUTConfig, HUT),
    "ssf": (SSFConfig, SSF),
}

HUTModel = register(*METHODS["hut"])
SSFModel = register(*METHODS["ssf"])

__all__ = [
    "HUT",
    "METHODS",
    "SSF",
    "Adapter",
    "AdapterConfig",
    "HUTConfig",
    "HUTModel",
    "PeftContractError",
    "PeftTypeConflictError",
    "SSFConfig",
    "SSFModel",
    "Site",
    "register",
]
