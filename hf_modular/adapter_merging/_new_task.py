"""add_task: one task more for an RMM adapter, without the adapters that it was made of."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from hf_modular.adapter_merging._files import open_adapters
from hf_modular.adapter_merging._fit import Fitted
from hf_modular.adapter_merging._heads import trained_whole, whole_of
from hf_modular.adapter_merging._live import LiveBase
from hf_modular.adapter_merging._matrix import LowRank
from hf_modular.adapter_merging._report import AdapterReport, errors, warn_of
from hf_modular.adapter_merging._rmm import LayerChange
from hf_modular.adapter_merging._source import Base, Source
from hf_modular.adapters import RMMModel
from hf_modular.adapters._method import Site

_REMEDY = "Make the RMM adapter anew from the adapters of all tasks."


def add_task(
    model: PeftModel,
    task: str,
    adapter: str | Path,
    *,
    adapter_name: str | None = None,
    base_model: str | None = None,
    rank: int | None = None,
    warn_above: float = 0.3,
) -> AdapterReport:
    """Add a task to an RMM adapter in memory, without the adapters that it was made of.

    What the task's adapter has in the directions that the RMM adapter has is kept, and the rest is lost: the report
    says how much. Tasks that are like the others lose little; for one that is not, make the RMM adapter anew.

    Args:
        model (`PeftModel`):
            The model that holds the RMM adapter.
        task (`str`):
            The name of the new task.
        adapter (`str | Path`):
            The folder of its adapter, or a repository of the Hub as `name` or `name@revision`.
        adapter_name (`str`, *optional*):
            The RMM adapter; the active one by default.
        base_model (`str`, *optional*):
            The base model's folder or repository, if the adapter is of a type that cannot be read without it.
        rank (`int`, *optional*):
            What the adapter is reduced to first, which one whose change has no low rank needs.
        warn_above (`float`, defaults to 0.3):
            Warn if the relative error of the new task is larger.

    Returns:
        `AdapterReport`: the relative error of each layer, and of the task.

    Raises:
        ValueError: If the RMM adapter cannot hold the task. It is as it was.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, RMMModel):
        raise TypeError(f"`model` must hold an RMM adapter, but got {type(model).__name__} of {type(tuner).__name__}.")
    (source,), _ = open_adapters([str(adapter)], base_model)
    new = _NewTask(tuner, source, LiveBase(model), adapter_name or tuner.active_adapters[0], rank)
    factors, fitted = new.factors()
    report = new.report(task, fitted)
    tuner.store_task(task, factors, report.error, new.name)
    warn_of(report, warn_above, _REMEDY)
    return report


@dataclass(frozen=True, eq=False)
class _NewTask:
    """An adapter in the directions of an RMM adapter."""

    tuner: Any
    source: Source
    base: Base
    name: str
    rank: int | None

    def factors(self) -> tuple[dict[str, tuple[Tensor, Tensor | None]], dict[str, Fitted]]:
        """What each layer of the RMM adapter gets, A and B or weight and bias, and how near it is."""
        config, layers = self.tuner.peft_config[self.name], self.tuner.task_layers(self.name)
        self._require(layers, config.whole)
        found: dict[str, tuple[Tensor, Tensor | None]] = {}
        fitted = {}
        for name, (site, adapter) in layers.items():
            if name in config.whole:
                found[name] = whole_of(self.source, self.base, name)
                continue
            change = self._change(site)
            A, B = found[name] = change.factors(adapter.rank, canonical=config.canonicalize)
            near = (factor.to(change.kept.up) for factor in adapter.nearest(A, B))
            fitted[name] = Fitted({}, adapter.rank, *change.distance(*near))
        return found, fitted

    def _change(self, site: Site) -> LayerChange:
        if site.name in self.source.sites:
            return LayerChange.of(self.source, site, self.rank)
        return LayerChange.nothing(site, LowRank(torch.zeros(1, 1), torch.zeros(1, 1)))

    def report(self, task: str, fitted: Mapping[str, Fitted]) -> AdapterReport:
        layers, error = errors(fitted)
        return AdapterReport(
            method="rmm",
            adapters=[self.source.reference],
            peft_type="HFM_RMM",
            layers=layers,
            error=error,
            tasks={task: error},
        )

    def _require(self, layers: Mapping[str, Any], whole: Mapping[str, Any]) -> None:
        given = {name.rpartition(".")[0] for name in trained_whole(self.source)}
        if unknown := sorted((self.source.sites.keys() - layers.keys()) | (given - whole.keys())):
            raise ValueError(
                f"The RMM adapter must have the layers of {self.source.reference}, but it lacks {unknown}. {_REMEDY}"
            )
