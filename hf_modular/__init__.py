"""hf_modular: adapter types and merging methods for PEFT and transformers.

Importing this package is cheap: the public names are loaded on first use, and the adapter types are
registered with PEFT as soon as PEFT itself is imported, before or after this package.
"""

from typing import TYPE_CHECKING

from hf_modular import _after_peft
from hf_modular._lazy import attributes
from hf_modular._version import __version__

if TYPE_CHECKING:
    from hf_modular.adapter_merging import (
        AdapterRecipe,
        AdapterReport,
        RMMConfig,
        add_task,
        extract_adapter,
        merge_adapter_files,
        merge_adapters,
    )
    from hf_modular.adapters import (
        CompacterConfig,
        FLoRAConfig,
        HUTConfig,
        MoSConfig,
        SSFConfig,
        hotswap_adapter,
        to_lora,
    )
    from hf_modular.calibration import activation_norms, dare_q
    from hf_modular.fisher import fisher_information
    from hf_modular.hub import push_to_hub
    from hf_modular.merging import (
        ArceeFusionConfig,
        BreadcrumbsConfig,
        DAREConfig,
        DELLAConfig,
        FisherConfig,
        GraftConfig,
        KarcherConfig,
        LinearConfig,
        MergeRecipe,
        MergeReport,
        ModelStockConfig,
        MultiSLERPConfig,
        NearSwapConfig,
        NuSLERPConfig,
        OPCMConfig,
        PassthroughConfig,
        PCBConfig,
        RWSConfig,
        SCEConfig,
        SLERPConfig,
        SSDConfig,
        TaskArithmeticConfig,
        TIESConfig,
        merge,
        merge_state_dicts,
    )
    from hf_modular.optim import AdamR
    from hf_modular.searching import search

_HOME = {
    "AdamR": "optim",
    "AdapterRecipe": "adapter_merging",
    "AdapterReport": "adapter_merging",
    "ArceeFusionConfig": "merging",
    "BreadcrumbsConfig": "merging",
    "CompacterConfig": "adapters",
    "DAREConfig": "merging",
    "DELLAConfig": "merging",
    "FLoRAConfig": "adapters",
    "FisherConfig": "merging",
    "GraftConfig": "merging",
    "HUTConfig": "adapters",
    "KarcherConfig": "merging",
    "LinearConfig": "merging",
    "MergeRecipe": "merging",
    "MergeReport": "merging",
    "MoSConfig": "adapters",
    "ModelStockConfig": "merging",
    "MultiSLERPConfig": "merging",
    "NearSwapConfig": "merging",
    "NuSLERPConfig": "merging",
    "OPCMConfig": "merging",
    "PCBConfig": "merging",
    "PassthroughConfig": "merging",
    "RMMConfig": "adapter_merging",
    "RWSConfig": "merging",
    "SCEConfig": "merging",
    "SLERPConfig": "merging",
    "SSDConfig": "merging",
    "SSFConfig": "adapters",
    "TIESConfig": "merging",
    "TaskArithmeticConfig": "merging",
    "activation_norms": "calibration",
    "add_task": "adapter_merging",
    "dare_q": "calibration",
    "extract_adapter": "adapter_merging",
    "fisher_information": "fisher",
    "hotswap_adapter": "adapters",
    "merge": "merging",
    "merge_adapter_files": "adapter_merging",
    "merge_adapters": "adapter_merging",
    "merge_state_dicts": "merging",
    "push_to_hub": "hub",
    "search": "searching",
    "to_lora": "adapters",
}

__all__ = [
    "AdamR",
    "AdapterRecipe",
    "AdapterReport",
    "ArceeFusionConfig",
    "BreadcrumbsConfig",
    "CompacterConfig",
    "DAREConfig",
    "DELLAConfig",
    "FLoRAConfig",
    "FisherConfig",
    "GraftConfig",
    "HUTConfig",
    "KarcherConfig",
    "LinearConfig",
    "MergeRecipe",
    "MergeReport",
    "MoSConfig",
    "ModelStockConfig",
    "MultiSLERPConfig",
    "NearSwapConfig",
    "NuSLERPConfig",
    "OPCMConfig",
    "PCBConfig",
    "PassthroughConfig",
    "RMMConfig",
    "RWSConfig",
    "SCEConfig",
    "SLERPConfig",
    "SSDConfig",
    "SSFConfig",
    "TIESConfig",
    "TaskArithmeticConfig",
    "__version__",
    "activation_norms",
    "add_task",
    "dare_q",
    "extract_adapter",
    "fisher_information",
    "hotswap_adapter",
    "merge",
    "merge_adapter_files",
    "merge_adapters",
    "merge_state_dicts",
    "push_to_hub",
    "search",
    "to_lora",
]


__getattr__ = attributes(__name__, _HOME)


def __dir__() -> list[str]:
    return __all__


_after_peft.register_after_peft()
