"""Model merging: METHODS, the table of methods, and the ways to run them. Everything is loaded on first use."""

from typing import TYPE_CHECKING, Any

from hf_modular._lazy import attributes

if TYPE_CHECKING:
    from hf_modular.merging._method import MergeMethod
    from hf_modular.merging.arcee_fusion import ArceeFusionConfig
    from hf_modular.merging.breadcrumbs import BreadcrumbsConfig
    from hf_modular.merging.dare import DAREConfig
    from hf_modular.merging.della import DELLAConfig
    from hf_modular.merging.fisher import FisherConfig
    from hf_modular.merging.graft import GraftConfig
    from hf_modular.merging.karcher import KarcherConfig
    from hf_modular.merging.linear import LinearConfig
    from hf_modular.merging.model_stock import ModelStockConfig
    from hf_modular.merging.multislerp import MultiSLERPConfig
    from hf_modular.merging.nearswap import NearSwapConfig
    from hf_modular.merging.nuslerp import NuSLERPConfig
    from hf_modular.merging.opcm import OPCMAddConfig, OPCMConfig, OPCMResultConfig
    from hf_modular.merging.passthrough import PassthroughConfig
    from hf_modular.merging.pcb import PCBConfig
    from hf_modular.merging.recipes._recipe import MergeRecipe
    from hf_modular.merging.runs._memory import merge_state_dicts
    from hf_modular.merging.runs._plan import MergePlan
    from hf_modular.merging.runs._report import MergeReport
    from hf_modular.merging.runs._stream import merge, plan_merge
    from hf_modular.merging.rws import RWSConfig
    from hf_modular.merging.sce import SCEConfig
    from hf_modular.merging.slerp import SLERPConfig
    from hf_modular.merging.ssd import SSDConfig
    from hf_modular.merging.task_arithmetic import TaskArithmeticConfig
    from hf_modular.merging.ties import TIESConfig

    METHODS: dict[str, type[MergeMethod]]
    PARTS: dict[str, type[MergeMethod]]

_METHODS = (
    "LinearConfig",
    "TaskArithmeticConfig",
    "DAREConfig",
    "PCBConfig",
    "FisherConfig",
    "OPCMConfig",
    "TIESConfig",
    "BreadcrumbsConfig",
    "DELLAConfig",
    "SCEConfig",
    "SLERPConfig",
    "NuSLERPConfig",
    "MultiSLERPConfig",
    "KarcherConfig",
    "ModelStockConfig",
    "NearSwapConfig",
    "ArceeFusionConfig",
    "GraftConfig",
    "RWSConfig",
    "SSDConfig",
    "PassthroughConfig",
)  # in the order in which they are listed
_PARTS = ("OPCMAddConfig", "OPCMResultConfig")  # steps of methods that take one model after the other

_HOME = {
    "ArceeFusionConfig": "arcee_fusion",
    "BreadcrumbsConfig": "breadcrumbs",
    "DAREConfig": "dare",
    "DELLAConfig": "della",
    "FisherConfig": "fisher",
    "GraftConfig": "graft",
    "KarcherConfig": "karcher",
    "LinearConfig": "linear",
    "MergeMethod": "_method",
    "MergePlan": "runs._plan",
    "MergeRecipe": "recipes._recipe",
    "MergeReport": "runs._report",
    "ModelStockConfig": "model_stock",
    "MultiSLERPConfig": "multislerp",
    "NearSwapConfig": "nearswap",
    "NuSLERPConfig": "nuslerp",
    "OPCMAddConfig": "opcm",
    "OPCMConfig": "opcm",
    "OPCMResultConfig": "opcm",
    "PCBConfig": "pcb",
    "PassthroughConfig": "passthrough",
    "RWSConfig": "rws",
    "SCEConfig": "sce",
    "SLERPConfig": "slerp",
    "SSDConfig": "ssd",
    "TIESConfig": "ties",
    "TaskArithmeticConfig": "task_arithmetic",
    "merge": "runs._stream",
    "merge_state_dicts": "runs._memory",
    "plan_merge": "runs._stream",
}

__all__ = [
    "METHODS",
    "PARTS",
    "ArceeFusionConfig",
    "BreadcrumbsConfig",
    "DAREConfig",
    "DELLAConfig",
    "FisherConfig",
    "GraftConfig",
    "KarcherConfig",
    "LinearConfig",
    "MergeMethod",
    "MergePlan",
    "MergeRecipe",
    "MergeReport",
    "ModelStockConfig",
    "MultiSLERPConfig",
    "NearSwapConfig",
    "NuSLERPConfig",
    "OPCMAddConfig",
    "OPCMConfig",
    "OPCMResultConfig",
    "PCBConfig",
    "PassthroughConfig",
    "RWSConfig",
    "SCEConfig",
    "SLERPConfig",
    "SSDConfig",
    "TIESConfig",
    "TaskArithmeticConfig",
    "merge",
    "merge_state_dicts",
    "plan_merge",
]


def _table(names: tuple[str, ...]) -> dict[str, Any]:
    return {method.name: method for method in map(__getattr__, names)}


__getattr__ = attributes(__name__, _HOME, {"METHODS": lambda: _table(_METHODS), "PARTS": lambda: _table(_PARTS)})


def __dir__() -> list[str]:
    return __all__
