"""A PEFT adapter in a folder: what its config and its file say, and whether a merged model can do what it does."""

import re
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import PeftConfig

from hf_modular.checkpoints import Checkpoint
from hf_modular.merging.sources._sources import read_object

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every key in the file of an adapter

# PEFT's task types: the class of transformers that the adapter was trained on
TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
# types and settings with which no change of weights does what the adapter does
_TYPES = {
    "ADAPTION_PROMPT": "adds prompts to the attention",
    "CARTRIDGE": "adds keys and values to the attention",
    "CPT": "adds prompts",
    "FROD": "is made of the base weights of several layers at once",
    "MULTITASK_PROMPT_TUNING": "adds prompts",
    "POLY": "mixes its parts by the task of each sample",
    "PREFIX_TUNING": "adds keys and values to the attention",
    "PROMPT_TUNING": "adds prompts",
    "P_TUNING": "adds prompts",
    "SHADOW": "runs a second model beside the layers",
    "XLORA": "mixes adapters by the input",
}
_SETTINGS = {
    "alora_invocation_tokens": "acts on some tokens only",
    "arrow_config": "routes tokens between adapters",
    "layer_replication": "repeats layers of the base model",
    "megatron_config": "belongs to layers of Megatron",
    "use_qalora": "pools its input",
}
_START = re.compile(r"pissa|olora|corda|loftq|lora_ga")  # starts that change the base weights
_REPEATABLE = ("pissa", "olora")  # those of which the same change can be found again from the weights alone
_FROM_WEIGHTS = ("ADAMSS", "OSF", "PSOFT")  # types that are set up from the weights of the layer


class AdapterFolder:
    """An adapter in a folder."""

    def __init__(self, reference: str, folder: Path) -> None:
        self.reference, self.folder = reference, folder
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{reference} is no adapter: it has no {name}")
        self.weights = Checkpoint(folder / ADAPTER_WEIGHTS)
        self.config = _config(reference, folder)

    @property
    def kind(self) -> str:
        return str(self.config.peft_type.value)

    @property
    def model_class(self) -> str | None:
        """The class of transformers that the adapter was trained on, if its config says so."""
        return model_class(self.config)

    @cached_property
    def names(self) -> dict[str, str]:
        """For each tensor in its file: what it is called inside the model."""
        return {stored: stored.removeprefix(PREFIX).replace(".base_layer.", ".") for stored in self.weights.tensors}

    @property
    def start(self) -> str:
        return str(getattr(self.config, "init_lora_weights", ""))

    @property
    def starts_from_weights(self) -> bool:
        """Whether a layer of it is set up from the weights of the base's layer, or changes them at that."""
        kasa = getattr(self.config, "kasa_config", None)
        return self.kind in _FROM_WEIGHTS or self.start in _REPEATABLE or kasa is not None

    def refusal(self) -> str | None:
        """Why no change of weights does what this adapter does."""
        if self.config.is_prompt_learning or self.kind in _TYPES:
            effect = _TYPES.get(self.kind, "adds prompts")
            return f"{self.reference} is of type {self.kind}, which {effect}: it cannot be merged into a model"
        for setting, effect in _SETTINGS.items():
            if value := getattr(self.config, setting, None):
                return f"{self.reference} cannot be merged into a model: with {setting}={value!r:.80} it {effect}"
        if _START.match(self.start) and not self.starts_from_weights:
            return (
                f"{self.reference} belongs to base weights that its start, init_lora_weights={self.start!r}, has "
                "changed in a way that cannot be repeated: save it with `path_initial_model_for_weight_conversion`"
            )
        return None


def model_class(config: Any) -> str | None:
    """The class of transformers that an adapter with this config was trained on, if it says so."""
    named: str | None = (config.auto_mapping or {}).get("base_model_class")
    return named or TASKS.get(str(config.task_type))


def _config(reference: str, folder: Path) -> Any:
    read_object(folder / ADAPTER_CONFIG)  # refuses what is no JSON, by its name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of settings that a later PEFT has
            return PeftConfig.from_pretrained(str(folder))
    except KeyError as error:
        raise ValueError(
            f"{reference} is of type {error.args[0]!r}, which PEFT does not know: import the package that has it"
        ) from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{reference} has an {ADAPTER_CONFIG} that PEFT cannot read: {error}") from None
