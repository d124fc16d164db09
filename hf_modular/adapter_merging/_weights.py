"""Merging in weight space: what the adapters add to the weights is merged, and the result fitted by an adapter.

The merge method sees the changes as task vectors, with a base of zeros. If it only sums them up, changes of low rank
are never built; otherwise the merge engine gets their elements row by row, and a layer is fitted once it is complete.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from threading import Lock

import torch
from peft import PeftType
from torch import Tensor

from hf_modular.adapter_merging._fit import Fit, Fitted
from hf_modular.adapter_merging._matrix import Dense, summed
from hf_modular.adapter_merging._running import Settings, call_problems, run
from hf_modular.adapter_merging._source import Base, Change, Source, all_sites
from hf_modular.adapters._method import Site
from hf_modular.checkpoints import TensorInfo
from hf_modular.merging import LinearConfig, MergeMethod, TaskArithmeticConfig
from hf_modular.merging._method import total_weight
from hf_modular.merging.engine._preflight import refuse
from hf_modular.merging.recipes._settings import Resolved

_KEPT = 4  # layers whose changes an adapter remembers while the engine works on them


def coefficients(settings: Resolved) -> list[float] | None:
    """The cᵢ if all that the method does is Σ cᵢ dᵢ; None if it does anything else."""
    method, weights = settings.method, torch.tensor(settings.weights, dtype=torch.float64)
    if not isinstance(method, (LinearConfig, TaskArithmeticConfig)):
        return None
    scale = method.scale if isinstance(method, TaskArithmeticConfig) else 1.0
    return (weights * scale / (total_weight(weights) if method.normalize else 1.0)).tolist()


@dataclass(frozen=True, eq=False)
class WeightMerge:
    """One merge of adapters in weight space."""

    sources: Sequence[Source]
    base: Base
    method: MergeMethod
    settings: Settings
    fit: Fit
    seed: int = 0
    notes: list[str] = field(default_factory=list)

    @cached_property
    def sites(self) -> dict[str, Site]:
        return all_sites(self.sources)

    @cached_property
    def beside(self) -> "Beside":
        return Beside(self.sources, self.base)

    @cached_property
    def plan(self) -> dict[str, TensorInfo]:
        """Every tensor that is merged."""
        found = {}
        for name, site in self.sites.items():
            found[f"{name}.weight"] = TensorInfo(torch.float32, site.weight_shape)
            if any(_may_shift(source, name) for source in self.sources):
                found[f"{name}.bias"] = TensorInfo(torch.float32, site.weight_shape[:1])
        return found | self.beside.plan

    @cached_property
    def resolved(self) -> Mapping[str, Resolved]:
        return self.settings([*self.plan])

    @property
    def has_base(self) -> bool:
        """Whether the method sees the zeros: one that can do without has the changes alone, which are the same."""
        return self.method.base_model == "required"

    def run(self) -> tuple[dict[str, Fitted], dict[str, Tensor]]:
        """The layers of the result, and what was trained whole."""
        _refuse_rewritten_biases(self.sources)
        refuse(call_problems(self.method, self.resolved, len(self.sources), self.has_base))
        sums = {name: coefficients(settings) for name, settings in self.resolved.items()}
        linear = {name: c for name, c in sums.items() if c is not None}
        fitted, whole = self._summed(linear) if len(linear) == len(sums) else self._merged()
        return fitted, whole | self.beside.carried

    # -- methods that only sum up ----------------------------------------------------------------------------

    def _summed(self, sums: Mapping[str, list[float]]) -> tuple[dict[str, Fitted], dict[str, Tensor]]:
        fitted = {name: self._sum_layer(name, sums) for name in self.sites}
        return fitted, {name: self.beside.summed(name, sums[name]) for name in self.beside.plan}

    def _sum_layer(self, name: str, sums: Mapping[str, list[float]]) -> Fitted:
        given = [source.change(name) if name in source.sites else None for source in self.sources]
        terms = [(change, i) for i, change in enumerate(given) if change is not None]
        weight = summed([change.weight for change, _ in terms], [sums[f"{name}.weight"][i] for _, i in terms])
        biases = [change.bias * sums[f"{name}.bias"][i] for change, i in terms if change.bias is not None]
        bias = torch.stack(biases).sum(0) if biases else None
        return self._fitted(name, Change(weight, bias), None)

    # -- all other methods -----------------------------------------------------------------------------------

    def _merged(self) -> tuple[dict[str, Fitted], dict[str, Tensor]]:
        self.beside.require_base(self.has_base, self.method.name)
        models = [_Deltas(source, self) for source in self.sources]
        collected = _Collected(self, models)
        zeros = _Zeros("the base model", self) if self.has_base else None
        self.notes.extend(run(self.method, self.resolved, self.plan, zeros, models, collected, self.seed))
        return {name: collected.fitted[name] for name in self.sites}, collected.whole

    def _fitted(self, name: str, change: Change, exact_rank: int | None) -> Fitted:
        return self.fit(self.sites[name], change, lambda: self.base.layer(name), exact_rank)


@dataclass(frozen=True, eq=False)
class Beside:
    """What was trained whole beside the adapters."""

    sources: Sequence[Source]
    base: Base

    @cached_property
    def plan(self) -> dict[str, TensorInfo]:
        found: dict[str, TensorInfo] = {}
        for source in self.sources:
            for name, tensor in source.whole.items():
                if name in self.carried:
                    continue
                info = found.setdefault(name, TensorInfo(tensor.dtype, tuple(tensor.shape)))
                if info.shape != tuple(tensor.shape):
                    raise ValueError(
                        f"What is trained whole must have one shape to be merged, but '{name}' is {info.shape} and, "
                        f"in {source.reference}, {tuple(tensor.shape)}. Keep the adapters' heads apart."
                    )
        return found

    @cached_property
    def carried(self) -> dict[str, Tensor]:
        """Base weights that PEFT saves with adapters on embeddings: not trained, and so the same everywhere."""
        found: dict[str, Tensor] = {}
        for source in self.sources:
            for name, tensor in source.whole.items():
                if ".base_layer." in name and not torch.equal(found.setdefault(name, tensor), tensor):
                    raise ValueError(
                        f"The adapters must have one base model, but '{name}' differs between their files."
                    )
        return found

    def values(self, name: str) -> list[Tensor | None]:
        """Of each adapter."""
        return [source.whole.get(name) for source in self.sources]

    def summed(self, name: str, factors: Sequence[float]) -> Tensor:
        """W₀ + Σ cᵢ (Wᵢ - W₀), for which W₀ need not be known if all adapters have the tensor and Σ cᵢ = 1."""
        values, base = self.values(name), self.base.tensor(name)
        known = [(value, c) for value, c in zip(values, factors, strict=True) if value is not None]
        if not known[0][0].is_floating_point():
            return self._equal(name, [value for value, _ in known])
        if base is None and (len(known) < len(values) or not math.isclose(sum(factors), 1.0, rel_tol=1e-9)):
            raise ValueError(self._unknown(name))
        dtype = known[0][0].dtype
        total = torch.zeros(known[0][0].shape, dtype=torch.float64)
        for value, factor in known:
            total += value.double().cpu() * factor
        if base is not None:
            total += base.double().cpu() * (1 - sum(factor for _, factor in known))
        return total.to(dtype)

    def _equal(self, name: str, values: Sequence[Tensor]) -> Tensor:
        if not all(torch.equal(value, values[0]) for value in values):
            raise ValueError(f"'{name}' ({values[0].dtype}) differs between the adapters and cannot be merged.")
        return values[0]

    def require_base(self, uses_base: bool, method: str) -> None:
        for name in self.plan:
            lacking = any(value is None for value in self.values(name))
            if self.base.tensor(name) is None and (uses_base or lacking):
                raise ValueError(self._unknown(name))

    def _unknown(self, name: str) -> str:
        holders = [source.reference for source in self.sources if name in source.whole]
        return (
            f"'{name}' was trained whole by {holders}, and what the merge makes of it depends on the base model's, "
            "which is not at hand. State the `base_model`, or use `linear` on adapters that all have it."
        )


@dataclass(frozen=True, eq=False)
class _Zeros:
    """The base as the engine reads it: changes begin at nothing, what is trained whole at the base model's."""

    reference: str
    merge: WeightMerge

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.merge.plan

    def fill(self, name: str, start: int, out: Tensor) -> None:
        base = self.merge.base.tensor(name) if name in self.merge.beside.plan else None
        out.zero_() if base is None else out.copy_(base.reshape(-1)[start : start + out.numel()])


class _Deltas:
    """One adapter as the engine reads it."""

    def __init__(self, source: Source, merge: WeightMerge) -> None:
        self.reference, self.tensors = source.reference, merge.plan
        self.ranks: dict[str, int | None] = {}  # of the changes that have been read
        self._source, self._merge = source, merge
        self._read = lru_cache(maxsize=_KEPT)(self._change)
        self._lock = Lock()

    def fill(self, name: str, start: int, out: Tensor) -> None:
        if name in self._merge.beside.plan:
            value = self._source.whole.get(name)
            value = self._merge.base.tensor(name) if value is None else value
            out.copy_(value.reshape(-1)[start : start + out.numel()])  # type: ignore[union-attr]
            return
        layer, _, part = name.rpartition(".")
        with self._lock:
            change = self._read(layer)
        if change is None or (part == "bias" and change.bias is None):
            out.zero_()
        elif part == "bias":
            out.copy_(change.bias[start : start + out.numel()])  # type: ignore[index]
        else:
            columns = change.weight.shape[1]
            first, last = start // columns, -(-(start + out.numel()) // columns)
            rows = change.weight.rows(first, last).reshape(-1)
            out.copy_(rows[start - first * columns :][: out.numel()])

    def _change(self, layer: str) -> Change | None:
        change = self._source.change(layer) if layer in self._source.sites else None
        self.ranks[layer] = 0 if change is None else getattr(change.weight, "rank", None)
        return change


class _Collected:
    """The merged changes as the engine writes them; a layer is fitted by the thread that completes it."""

    def __init__(self, merge: WeightMerge, models: Sequence[_Deltas]) -> None:
        self.fitted: dict[str, Fitted] = {}
        self.whole: dict[str, Tensor] = {}
        self._merge, self._models = merge, models
        self._parts: dict[str, Tensor] = {}
        self._missing = {name: math.prod(info.shape) for name, info in merge.plan.items()}
        self._lock = Lock()

    def write(self, name: str, data: Tensor, start: int) -> None:
        info = self._merge.plan[name]
        with self._lock:
            part = self._parts.setdefault(name, torch.empty(math.prod(info.shape), dtype=info.dtype))
        part[start : start + data.numel()] = data
        with self._lock:
            self._missing[name] -= data.numel()
            complete = self._taken(name)
        if complete:
            self._finish(name, complete)

    def _taken(self, name: str) -> dict[str, Tensor]:
        """The parts of the layer or of the tensor, if all are there; they leave the list then."""
        layer = name.rpartition(".")[0]
        beside = name in self._merge.beside.plan
        names = [name] if beside else [n for n in (f"{layer}.weight", f"{layer}.bias") if n in self._merge.plan]
        if any(self._missing[n] for n in names):
            return {}
        return {n: self._parts.pop(n) for n in names}

    def _finish(self, name: str, parts: Mapping[str, Tensor]) -> None:
        if name in self._merge.beside.plan:
            self.whole[name] = parts[name].view(self._merge.plan[name].shape)
            return
        layer = name.rpartition(".")[0]
        weight = parts[f"{layer}.weight"].view(self._merge.sites[layer].weight_shape[0], -1)
        ranks = [model.ranks.get(layer) for model in self._models]
        exact = None if None in ranks else min(max(sum(ranks), 1), *weight.shape)  # type: ignore[arg-type]
        self.fitted[layer] = self._merge._fitted(layer, Change(Dense(weight), parts.get(f"{layer}.bias")), exact)


def _refuse_rewritten_biases(sources: Sequence[Source]) -> None:
    """What LoRA adds is the same whatever the biases are, but other types may multiply them."""
    for source in sources:
        twice = [layer for layer in source.sites if f"{layer}.bias" in source.whole]
        if twice and source.config.peft_type != PeftType.LORA:
            raise ValueError(
                f"{source.reference} ({source.config.peft_type.value}) has trained the biases of layers that it "
                f"adapts, {twice[:3]}, and its effect depends on them. Use space='parameters', or merge it into the "
                "model."
            )


def _may_shift(source: Source, name: str) -> bool:
    """Whether the adapter may change the layer's bias."""
    site = source.sites.get(name)
    return site is not None and bool(getattr(source.config, "lora_bias", site.has_bias)) and site.kind != "Embedding"
