"""Reversible Model Merging of adapters (arXiv 2510.14163): many of them in one adapter of type RMM.

`hf_modular._reversible` has the mathematics. What goes in are LoRA adapters, others whose changes are of low rank, and
anything else after it was reduced to a `rank` by the truncated SVD, as the paper does with fine-tuned models.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_modular._reversible import Granularity, Parts, decomposed, restored
from hf_modular.adapter_merging._extract import FineTuned, lost_note
from hf_modular.adapter_merging._heads import Head, heads_of
from hf_modular.adapter_merging._matrix import LowRank, Matrix, balanced, squared_distance, truncated
from hf_modular.adapter_merging._report import AdapterReport, relative
from hf_modular.adapter_merging._result import Result, dressed, in_dtype, notes_on
from hf_modular.adapter_merging._rmm_config import RMMConfig
from hf_modular.adapter_merging._source import PREFIX, Base, Source, all_sites, widest
from hf_modular.adapters import RMMAdapterConfig
from hf_modular.adapters._method import Site
from hf_modular.merging.sources._adapter_folder import TASKS

REMEDY = "Choose a higher `p`: at the number of adapters less one, each is as it was."
_SLOT = "hfm_rmm_adapter"


def merge_reversibly(
    sources: Sequence[Source], base: Base, config: RMMConfig, tasks: Sequence[str], facts: Mapping[str, Any]
) -> Result:
    """The adapter of type RMM; nothing is written yet. The facts are for its report."""
    low, _ = config.model_counts
    if len(sources) < low:
        raise ValueError(f"{config.name!r} stores at least {low} adapters in common, but got {len(sources)}.")
    return _Reversible(sources, base, config, _checked(tasks), facts).result()


def _checked(tasks: Sequence[str]) -> list[str]:
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"Each task needs a name of its own, but got {list(tasks)}: state them as `task`.")
    return list(tasks)


@dataclass(frozen=True, eq=False)
class _Reversible:
    """One merge."""

    sources: Sequence[Source]
    base: Base
    config: RMMConfig
    tasks: list[str]
    facts: Mapping[str, Any]

    @property
    def p(self) -> int:
        return min(self.config.p, len(self.sources) - 1)

    @cached_property
    def sites(self) -> dict[str, Site]:
        return all_sites(self.sources)

    @cached_property
    def heads(self) -> dict[str, Head]:
        return heads_of(self.sources, self.base, self.sites)

    def result(self) -> Result:
        heads = self.heads  # first, since they may be refused
        layers = {name: self._layer(site) for name, site in self.sites.items()}
        tensors = {f"{PREFIX}{n}.{_SLOT}.{end}": t for n, layer in layers.items() for end, t in layer.tensors.items()}
        for name, head in heads.items():
            tensors.update({f"{PREFIX}{name}.{_SLOT}.{end}": t for end, t in head.tensors().items()})
        report = self._report(layers)
        return Result(self._adapter_config(layers, report), in_dtype(tensors, self.sources), report)

    @cached_property
    def dtype(self) -> torch.dtype:
        return widest(source.dtype for source in self.sources)

    def _layer(self, site: Site) -> "_Layer":
        given = {
            i: LayerChange.of(s, site, self.config.rank) for i, s in enumerate(self.sources) if site.name in s.sites
        }
        nothing = LayerChange.nothing(site, next(iter(given.values())).kept)
        changes = [given.get(i, nothing) for i in range(len(self.sources))]
        r = max(1, *(change.kept.rank for change in changes))
        pairs = [change.factors(r, canonical=self.config.canonicalize) for change in changes]
        A, B = (torch.stack(factors) for factors in zip(*pairs, strict=True))  # (n, r, positions)
        by = self.config.granularity
        parts = decomposed([A, B], min(self.p, r) if by == "position" else self.p, by)
        parts = [Parts(*(tensor.to(self.dtype) for tensor in part)) for part in parts]
        own = sum(change.kept.rank * sum(change.kept.shape) for change in changes)
        return _Layer(r, own, parts, by, [*_distances(parts, changes)])

    @cached_property
    def lost(self) -> list[dict[str, float]]:
        """For each task the squared norms of what fine-tuning has changed where no adapter is."""
        return [source.lost() if isinstance(source, FineTuned) else {} for source in self.sources]

    def _report(self, layers: Mapping[str, "_Layer"]) -> AdapterReport:
        beside = [(sum(lost.values()),) * 2 for lost in self.lost]
        each = [[pair, *(layer.distances[i] for layer in layers.values())] for i, pair in enumerate(beside)]
        sums = [[sum(numbers) for numbers in zip(*pairs, strict=True)] for pairs in each]  # (error, norm) of each task
        held = sum(tensor.numel() for layer in layers.values() for tensor in layer.tensors.values())
        given = sum(layer.own for layer in layers.values())
        return AdapterReport(
            method=self.config.name,
            adapters=[source.reference for source in self.sources],
            peft_type=RMMAdapterConfig.type_name,
            layers={
                name: {"rank": layer.r, "error": relative(*(sum(d) for d in zip(*layer.distances, strict=True)))}
                for name, layer in layers.items()
            },
            error=relative(*(sum(numbers) for numbers in zip(*sums, strict=True))),
            settings={**self.config.to_dict(), "storage": held / max(given, 1), **self.facts},
            notes=[*notes_on(self.sources), *self._notes([norm for _, norm in sums])],
            tasks={task: relative(*numbers) for task, numbers in zip(self.tasks, sums, strict=True)},
        )

    def _notes(self, norms: Sequence[float]) -> Iterator[str]:
        if self.config.p > self.p:
            yield f"{len(self.tasks)} adapters differ in {self.p} directions at most: p={self.config.p} is not needed"
        if self.heads:
            yield f"kept whole for each task: {', '.join(self.heads)}"
        for task, lost, norm in zip(self.tasks, self.lost, norms, strict=True):
            if lost:
                yield f"{task}: {lost_note(lost, norm)}"

    def _adapter_config(self, layers: Mapping[str, "_Layer"], report: AdapterReport) -> RMMAdapterConfig:
        ranks = {name: layer.r for name, layer in layers.items()}
        r = max(set(ranks.values()), key=lambda rank: (list(ranks.values()).count(rank), rank))
        config = RMMAdapterConfig(
            tasks=self.tasks,
            r=r,
            p=self.p,
            granularity=self.config.granularity,
            canonicalize=self.config.canonicalize,
            errors=report.tasks,
            rank_pattern={f"^{name}": rank for name, rank in ranks.items() if rank != r},
            whole={name: head.rows for name, head in self.heads.items()},
        )
        config = dressed(config, self.sources, self.sites)
        config.modules_to_save = None  # PEFT keeps one for each adapter, and these tasks are one adapter
        config.bias = "none"  # what the adapters have trained of them is kept whole
        if self.heads:
            config.target_modules = sorted({*self.sites, *self.heads})
            config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
            if config.task_type in TASKS:  # with a type PEFT would keep the head of the base model beside
                config.auto_mapping = {
                    "base_model_class": TASKS[config.task_type],
                    "parent_library": "transformers",
                }
            config.task_type = None
        return config


@dataclass(frozen=True, eq=False)
class _Layer:
    """What is stored of one layer."""

    r: int
    own: int  # the numbers that the adapters have here
    parts: list[Parts]  # of A and of B
    granularity: Granularity
    distances: list[tuple[float, float]]  # of each task: the squared error and the squared norm

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """By the ends of their names."""
        found: dict[str, Tensor] = {}
        for side, part in zip("AB", self.parts, strict=True):
            found |= {f"{side}.mean": part.mean, f"{side}.basis": part.basis}
            found |= {"coefficients" if self.granularity == "layer" else f"{side}.coefficients": part.coefficients}
        return {end: tensor.contiguous() for end, tensor in found.items()}


@dataclass(frozen=True, eq=False)
class LayerChange:
    """What an adapter adds to a layer, and what is kept of it: a product."""

    whole: Matrix
    bias: float  # the squared norm of what it adds to the bias, which is not kept
    kept: LowRank

    @classmethod
    def of(cls, source: Source, site: Site, rank: int | None) -> "LayerChange":
        if site.is_norm:
            raise ValueError(
                f"RMM needs weights with two sides, but {source.reference} changes '{site.name}', which is a norm."
            )
        change = source.change(site.name)
        bias = 0.0 if change.bias is None else float(change.bias.double().square().sum())
        return cls(change.weight, bias, _reduced(source, site, change.weight, rank, has_bias=bool(bias)))

    @classmethod
    def nothing(cls, site: Site, like: LowRank) -> "LayerChange":
        """Of an adapter that is not on the layer."""
        out, *columns = site.weight_shape
        empty = LowRank(like.up.new_zeros(out, 0), like.up.new_zeros(0, torch.Size(columns).numel()))
        return cls(empty, 0.0, empty)

    def factors(self, r: int, *, canonical: bool) -> tuple[Tensor, Tensor]:  # (r, columns), (r, out)
        """Padded with nothing, or truncated, to a rank."""
        kept = truncated(self.kept, r).matrix if self.kept.rank > r else self.kept
        kept = balanced(kept, kept.rank) if canonical and kept.rank else kept
        return _padded(kept.down, r), _padded(kept.up.t(), r)

    def distance(self, A: Tensor, B: Tensor) -> tuple[float, float]:  # (r, columns), (r, out)
        """The squared distance to a product, and the squared norm."""
        nothing = LowRank(B.t()[:, :0], A[:0])
        lost, norm = (squared_distance(product, self.whole) for product in (LowRank(B.t(), A), nothing))
        return lost + self.bias, norm + self.bias


def _reduced(source: Source, site: Site, weight: Matrix, rank: int | None, *, has_bias: bool) -> LowRank:
    if rank is not None:
        return truncated(weight, rank).matrix
    if not isinstance(weight, LowRank):
        raise ValueError(
            f"What {source.reference} adds to '{site.name}' has no low rank of its own: state the `rank` to reduce it "
            "to."
        )
    if has_bias:
        raise ValueError(
            f"RMM holds the weights of layers, but {source.reference} changes the bias of '{site.name}' too. State a "
            "`rank` to reduce the adapters to, and the biases are left out, which the report counts as lost."
        )
    return weight


def _padded(factor: Tensor, r: int) -> Tensor:  # (rank, positions) -> (r, positions)
    return F.pad(factor, (0, 0, 0, r - len(factor)))


def _distances(parts: Sequence[Parts], changes: Sequence[LayerChange]) -> Iterator[tuple[float, float]]:
    for i, change in enumerate(changes):
        stored = ([tensor.to(change.kept.up) for tensor in (p.mean, p.basis, p.coefficients[i])] for p in parts)
        yield change.distance(*(restored(*tensors) for tensors in stored))
