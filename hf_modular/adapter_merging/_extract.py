"""extract_adapter: from a fine-tuned model the adapter that comes nearest to it."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor

from hf_modular.adapter_merging._files import BaseFolder
from hf_modular.adapter_merging._fit import Fitted, fit_of, require_fit
from hf_modular.adapter_merging._live import LiveAdapter, kept_whole
from hf_modular.adapter_merging._matrix import Dense
from hf_modular.adapter_merging._report import AdapterReport, errors, relative, warn_of
from hf_modular.adapter_merging._result import TARGETS, Result, named_in_file, write
from hf_modular.adapter_merging._source import Change
from hf_modular.adapters._method import Site
from hf_modular.checkpoints import refuse_occupied

WARN_ABOVE = 0.3
_REMEDY = "Choose a higher rank or more `target_modules`, or name what else has changed in `modules_to_save`."
_SHOWN = 5


def extract_adapter(
    base: str | Path,
    fine_tuned: str | Path,
    config: PeftConfig,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    warn_above: float = WARN_ABOVE,
) -> AdapterReport:
    """Write the adapter that comes nearest to what fine-tuning a whole model has changed.

    The checkpoints are read layer by layer and never loaded. LoRA is found by the truncated SVD, FLoRA by HOOI, SSF
    and HUT by least squares. What is in `modules_to_save` of the config is saved as the fine-tuned model has it. All
    else that has changed is lost: it is named in the report's notes, and counts in the total error.

    Args:
        base (`str | Path`):
            The model that was fine-tuned: a folder, or a repository of the Hub as `name` or `name@revision`.
        fine_tuned (`str | Path`):
            The fine-tuned model.
        config (`PeftConfig`):
            The type and settings of the adapter, with its targets: a `LoraConfig`, `FLoRAConfig`, `SSFConfig` or
            `HUTConfig`.
        output_dir (`str | Path`):
            A folder that is absent or empty.
        overwrite (`bool`, defaults to `False`):
            Replace an adapter that is in the folder.
        warn_above (`float`, defaults to 0.3):
            Warn if the relative error is larger.

    Returns:
        `AdapterReport`: the relative error of each layer and in total.
    """
    require_fit(config)
    refuse_occupied(Path(output_dir), overwrite=overwrite)
    source = FineTuned.of(str(base), str(fine_tuned), config)
    fit = fit_of(replace(config, modules_to_save=None, **dict.fromkeys(TARGETS)), None)
    fitted = {
        name: fit(site, source.change(name), lambda name=name: source.base.layer(name), None)  # type: ignore[misc]
        for name, site in source.sites.items()
    }
    made, tensors = fit.adapter(fitted)
    report = _report(source, fitted)
    tensors = {name: tensor.to(source.dtype) for name, tensor in tensors.items()}
    write(
        Result(_dressed(made, source), tensors | named_in_file(source.whole), report), output_dir, overwrite=overwrite
    )
    warn_of(report, warn_above, _REMEDY)
    return report


@dataclass(frozen=True, eq=False)
class FineTuned:
    """A fine-tuned model as what it adds to the layers that a config targets."""

    reference: str
    base: BaseFolder
    tuned: BaseFolder
    config: Any

    @classmethod
    def of(cls, base: str, fine_tuned: str, config: PeftConfig) -> "FineTuned":
        tuned = BaseFolder.located(fine_tuned, config)
        return cls(fine_tuned, BaseFolder.located(base, config), tuned, config)

    @cached_property
    def model(self) -> PeftModel:
        """The adapter on a model without memory, which says what its targets are."""
        config = copy.deepcopy(self.config)
        config.inference_mode = True
        return get_peft_model(copy.deepcopy(self.base.model), config)

    @cached_property
    def live(self) -> LiveAdapter:
        return LiveAdapter(self.model, "default", self.reference)

    @property
    def sites(self) -> Mapping[str, Site]:
        return self.live.sites

    @property
    def transposed(self) -> bool:
        return self.live.transposed

    @property
    def dtype(self) -> torch.dtype:
        name = next(iter(self.sites))
        stored = self.tuned.find(f"{name}.weight")
        return self.tuned.weights.tensors[stored].dtype if stored else torch.float32

    @cached_property
    def whole(self) -> dict[str, Tensor]:
        names = [name for wrapped in kept_whole(self.model, "default").values() for name in wrapped]
        return {name: self.tuned.read(name) for name in names}

    def change(self, name: str) -> Change:
        (weight, bias), (before, old) = self.tuned.layer(name), self.base.layer(name)
        if weight.shape != before.shape:
            raise ValueError(
                f"A layer must keep its shape, but '{name}' is {tuple(before.shape)} in {self.base.reference} and "
                f"{tuple(weight.shape)} in {self.reference}. Name it in `modules_to_save` instead."
            )
        delta = Dense((weight - before).reshape(len(weight), -1))
        if bias is None or old is None or torch.equal(bias, old):
            return Change(delta)
        return Change(delta, bias - old)

    def tensors(self) -> dict[str, Tensor]:
        raise ValueError(f"{self.reference} is a model and has no parameters of an adapter.")

    def lost(self) -> dict[str, float]:
        """The squared norms of what has changed elsewhere."""
        covered = {f"{name}.{part}" for name in self.sites for part in ("weight", "bias")} | self.whole.keys()
        stored = {self.tuned.find(name) for name in covered}
        found = {}
        for name, info in self.tuned.weights.tensors.items():
            if name in stored or not info.dtype.is_floating_point:
                continue
            before = self.base.tensor(name)
            if before is None or tuple(before.shape) != info.shape:
                raise ValueError(
                    f"'{name}' of {self.reference} has no counterpart of its shape {info.shape} in "
                    f"{self.base.reference}: name its module in `modules_to_save`."
                )
            difference = float((self.tuned.weights.read(name).double() - before.double()).square().sum())
            if difference:
                found[name] = difference
        return found


def lost_note(lost: Mapping[str, float], wanted: float) -> str:
    """What is not in the adapter, where `wanted` is the squared norm of the whole change."""
    largest = sorted(lost, key=lambda name: -lost[name])
    named = ", ".join(largest[:_SHOWN]) + (f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else "")
    return f"not in the adapter, {relative(sum(lost.values()), wanted):.3g} of the change: {named}"


def _report(source: FineTuned, fitted: Mapping[str, Fitted]) -> AdapterReport:
    layers, _ = errors(fitted)
    lost = source.lost()
    missed = sum(layer.error for layer in fitted.values()) + sum(lost.values())
    wanted = sum(layer.norm for layer in fitted.values()) + sum(lost.values())
    return AdapterReport(
        method="extract",
        adapters=[source.reference],
        peft_type=source.config.peft_type.value,
        layers=layers,
        error=relative(missed, wanted),
        settings={"base": source.base.reference},
        notes=[lost_note(lost, wanted)] if lost else [],
    )


def _dressed(config: Any, source: FineTuned) -> Any:
    """The config with the targets that were found, and the base model."""
    resolved = source.model.peft_config["default"]
    for name in (*TARGETS, "modules_to_save"):
        setattr(config, name, getattr(resolved, name))
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = source.transposed
    config.base_model_name_or_path = source.base.reference
    config.task_type, config.auto_mapping = resolved.task_type, resolved.auto_mapping
    config.inference_mode = True
    return config
