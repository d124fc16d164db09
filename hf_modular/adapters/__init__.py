"""Adapter methods. Importing this package registers them with PEFT."""

from hf_modular.adapters._convert import to_lora
from hf_modular.adapters._hotswap import hotswap_adapter
from hf_modular.adapters._method import Adapter, AdapterConfig, Site
from hf_modular.adapters._peft import PeftContractError, PeftTypeConflictError, register
from hf_modular.adapters._tasks import TasksModel
from hf_modular.adapters.compacter import Compacter, CompacterConfig
from hf_modular.adapters.flora import FLoRA, FLoRAConfig
from hf_modular.adapters.hut import HUT, HUTConfig
from hf_modular.adapters.mos import MoS, MoSConfig
from hf_modular.adapters.rmm import RMM, RMMAdapterConfig
from hf_modular.adapters.ssf import SSF, SSFConfig

# name -> (config, adapter): the one place where a method is entered
METHODS: dict[str, tuple[type[AdapterConfig], type[Adapter]]] = {
    "compacter": (CompacterConfig, Compacter),
    "flora": (FLoRAConfig, FLoRA),
    "hut": (HUTConfig, HUT),
    "mos": (MoSConfig, MoS),
    "rmm": (RMMAdapterConfig, RMM),
    "ssf": (SSFConfig, SSF),
}

CompacterModel = register(*METHODS["compacter"])
FLoRAModel = register(*METHODS["flora"])
HUTModel = register(*METHODS["hut"])
MoSModel = register(*METHODS["mos"])
RMMModel = register(*METHODS["rmm"], TasksModel)
SSFModel = register(*METHODS["ssf"])

__all__ = [
    "HUT",
    "METHODS",
    "RMM",
    "SSF",
    "Adapter",
    "AdapterConfig",
    "Compacter",
    "CompacterConfig",
    "CompacterModel",
    "FLoRA",
    "FLoRAConfig",
    "FLoRAModel",
    "HUTConfig",
    "HUTModel",
    "MoS",
    "MoSConfig",
    "MoSModel",
    "PeftContractError",
    "PeftTypeConflictError",
    "RMMAdapterConfig",
    "RMMModel",
    "SSFConfig",
    "SSFModel",
    "Site",
    "hotswap_adapter",
    "register",
    "to_lora",
]
