"""RMM, Reversible Model Merging (arXiv 2510.14163): LoRA adapters of many tasks in one, any of them back at will.

    W' = W + Bₜ Aₜ,   Aₜ = μ + Σₖ cₜₖ ⊙ Uₖ   for the task t, and Bₜ in the same way

`hf_modular._reversible` has the mathematics, and what is the paper's and what is ours. To use a task is to build its
factors, p multiplications for each of their numbers; those of the task in use are kept while nothing is trained. A
batch may hold samples of different tasks. Beside the paper's: what adapters have trained whole, such as heads, is kept
whole for each task.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_modular._reversible import GRANULARITIES, Granularity, projected, restored
from hf_modular.adapters._kept import Kept
from hf_modular.adapters._method import (
    Adapter,
    AdapterConfig,
    Factors,
    LowRank,
    Site,
    pattern_value,
    require_between,
    require_choice,
    require_rank,
)


@dataclass
class RMMAdapterConfig(AdapterConfig):
    """Settings of RMM adapters (arXiv 2510.14163): the LoRA adapters of many tasks, stored in common.

    Args:
        tasks (`list[str]`, defaults to `["task"]`):
            The names of the tasks.
        task (`str`, *optional*):
            The task that is used until another one is set; the first by default.
        r (`int`, defaults to 8):
            The rank of the adapters.
        p (`int`, defaults to 1):
            The number of directions in which the tasks differ, at a position at most its rank.
        granularity (`str`, defaults to `"position"`):
            What has a basis of its own: each `"position"`, each `"tensor"`, or each `"layer"`.
        canonicalize (`bool`, defaults to `False`):
            Whether the factors were balanced before they were stored in common, as a task that is added must be then.
        errors (`dict[str, float]`, defaults to `{}`):
            The relative error of each task that was found when it was stored.
        whole (`dict[str, list[int]]`, defaults to `{}`):
            The layers that each task has whole, and how many outputs they have for each.
        dropout (`float`, defaults to 0.0):
            The probability of dropping an entry of the input in training, on the way through the adapter only.
        init_weights (`bool`, defaults to `True`):
            Start at exactly the identity. `False` starts at random, for tests.
        rank_pattern (`dict[str, int]`, defaults to `{}`):
            The `r` of single layers, by name or regular expression.
    """

    tasks: list[str] = field(default_factory=lambda: ["task"], metadata={"help": "The names of the tasks."})
    task: str | None = field(default=None, metadata={"help": "The task that is used at first; None: the first."})
    r: int = field(default=8, metadata={"help": "Rank of the adapters."})
    p: int = field(default=1, metadata={"help": "Number of directions in which the tasks differ."})
    granularity: str = field(default="position", metadata={"help": "What has a basis: position, tensor or layer."})
    canonicalize: bool = field(default=False, metadata={"help": "Whether the factors were balanced before."})
    errors: Mapping[str, float] = field(default_factory=dict, metadata={"help": "Relative error of each task."})
    whole: dict[str, list[int]] = field(
        default_factory=dict, metadata={"help": "Layers that each task has whole, and their outputs for each."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the adapter in training."})
    init_weights: bool = field(default=True, metadata={"help": "Start at the identity; False: at random."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "The r of single layers, by name."})

    type_name: ClassVar[str] = "HFM_RMM"

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks = {f"rank_pattern[{name!r}]": rank for name, rank in self.rank_pattern.items()}
        for name, value in {"r": self.r, "p": self.p, **ranks}.items():
            require_rank(name, value)
        require_choice("granularity", self.granularity, GRANULARITIES)
        require_between("dropout", self.dropout, 0.0, 1.0, open_high=True)
        require_choice("init_weights", self.init_weights, [True, False])
        self._check_tasks()

    def _check_tasks(self) -> None:
        names = self.tasks
        if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
            raise TypeError(f"`tasks` must be a list of names, but got tasks={names!r}.")
        if len(set(names)) < len(names) or "__base__" in names:
            raise ValueError(f"Each task must have a name of its own, and '__base__' is taken, but got tasks={names}.")
        if self.task is not None and self.task not in names:
            raise ValueError(f"`task` must be one of the tasks {names}, but got task={self.task!r}.")
        if uneven := {layer: rows for layer, rows in self.whole.items() if len(rows) != len(names)}:
            raise ValueError(f"`whole` must say the outputs for each of {len(names)} tasks, but got {uneven}.")


class Stored(nn.Module):
    """One factor of all tasks: `mean` (r, positions), `basis` (p, r, positions), `coefficients` (n, p, positions)."""

    def __init__(self, config: RMMAdapterConfig, r: int, positions: int) -> None:
        super().__init__()
        own = config.granularity == "position"
        p = min(config.p, r) if own else config.p
        self.mean = nn.Parameter(torch.zeros(r, positions))
        self.basis = nn.Parameter(torch.randn(p, r, positions) / (r * (1 if own else positions)) ** 0.5)
        shape = (len(config.tasks), p, positions if own else 1)
        self.coefficients = nn.Parameter(torch.zeros(shape)) if config.granularity != "layer" else None

    def at(self, task: int, coefficients: Tensor | None) -> Tensor:  # (r, positions)
        """The factor of a task; the coefficients if they are the layer's."""
        chosen = self.coefficients if coefficients is None else coefficients
        return self.restored(chosen[task])  # type: ignore[index]

    def restored(self, coefficients: Tensor) -> Tensor:  # (p, positions or 1) -> (r, positions)
        return restored(self.mean, self.basis, coefficients)

    def for_each(self, tasks: list[int], coefficients: Tensor | None) -> Tensor:  # (p, n, 1, positions or 1)
        """The coefficients of n samples."""
        chosen = self.coefficients if coefficients is None else coefficients
        return chosen[tasks].transpose(0, 1).unsqueeze(2)  # type: ignore[index]


class RMM(LowRank):
    """One RMM adapter: the factors `A` (positions: in · kernel) and `B` (positions: out), transposed.

    `coefficients` (n, p, 1) are here where they are one for the whole layer.
    """

    def __init__(self, config: RMMAdapterConfig, site: Site) -> None:
        super().__init__(config, site, 1.0)
        r = pattern_value(config.rank_pattern, site.name, config.r)
        self.columns, self.granularity = site.weight_shape[1:], cast(Granularity, config.granularity)
        self.A = Stored(config, r, torch.Size(self.columns).numel())
        self.B = Stored(config, r, site.weight_shape[0])
        shared = torch.zeros(len(config.tasks), config.p, 1)
        self.coefficients = nn.Parameter(shared) if config.granularity == "layer" else None
        self.tasks = tuple(config.tasks)
        self.task = self.tasks.index(config.task or self.tasks[0])
        self.mixes = self.direct and site.kind == "Linear"
        self._kept = Kept[Factors]()  # of the task in use
        self._start(config)

    @classmethod
    def made(cls, config: RMMAdapterConfig, site: Site, *shared: Any) -> Adapter:
        return Whole(config, site) if site.name in config.whole else cls(config, site)

    @torch.no_grad()
    def _start(self, config: RMMAdapterConfig) -> None:
        bound = self.A.mean.shape[1] ** -0.5
        self.A.mean.uniform_(-bound, bound)  # as LoRA; B is nothing
        if not config.init_weights:
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)

    def factors(self) -> Factors:
        modules = (self, *self._modules.values())  # A and B
        own = [p for module in modules for p in module._parameters.values() if p is not None]  # type: ignore[union-attr]
        return self._kept.get(self.task, own, self._built)

    def _built(self) -> Factors:
        A = self.A.at(self.task, self.coefficients).unflatten(1, self.columns)
        B = self.B.at(self.task, self.coefficients).t()
        return Factors(B, None, A) if A.ndim == 2 else Factors(B, A, None)

    def scaled(self) -> Factors:
        return self.factors()  # the scaling of each adapter is in its B

    def _looked_up(self, x: Tensor) -> Tensor:
        if self.sample_tasks is None:
            return super()._looked_up(x)
        flat = self._drop(x).flatten(1, -2) if x.ndim > 2 else self._drop(x).unsqueeze(1)  # (n, tokens, in)
        each = [part.for_each(self.sample_tasks, self.coefficients) for part in (self.A, self.B)]
        way = self._by_scaling if flat.shape[1] < self.rank else self._by_building
        return way(flat, *each).view(*x.shape[:-1], -1)

    def _by_building(self, x: Tensor, for_A: Tensor, for_B: Tensor) -> Tensor:
        """With the factors of each sample, (n, r, positions)."""
        return x @ self.A.restored(for_A).mT @ self.B.restored(for_B)

    def _by_scaling(self, x: Tensor, for_A: Tensor, for_B: Tensor) -> Tensor:
        """With the coefficients put to the input and to the output, which for few tokens is less than the factors."""
        low = F.linear(x, self.A.mean)
        for direction, number in zip(self.A.basis, for_A, strict=True):
            low = low + F.linear(x * number, direction)
        y = low @ self.B.mean
        for direction, number in zip(self.B.basis, for_B, strict=True):
            y = torch.addcmul(y, low @ direction, number)
        return y

    def _apply(self, fn: Any, recurse: bool = True) -> Self:  # casts and moves
        self._kept.clear()
        return super()._apply(fn, recurse)

    @property
    def rank(self) -> int:
        return len(self.A.mean)

    def nearest(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:  # both (r, positions)
        """What would be stored of the factors of another task."""
        found = self._coefficients(A, B)
        return self.A.restored(found[0]), self.B.restored(found[1])

    @torch.no_grad()
    def extended(self, task: str, A: Tensor, B: Tensor) -> None:
        """Store another task, of which this is nearest to its factors."""
        for module, new in zip((self.A, self.B), self._coefficients(A, B), strict=True):
            if module.coefficients is not None:
                module.coefficients = _with(module.coefficients, new)
        if self.coefficients is not None:
            self.coefficients = _with(self.coefficients, new)
        self.tasks = (*self.tasks, task)

    @torch.no_grad()
    def _coefficients(self, A: Tensor, B: Tensor) -> list[Tensor]:
        given = [A.to(self.A.mean), B.to(self.B.mean)]
        return projected(given, [self.A.mean, self.B.mean], [self.A.basis, self.B.basis], self.granularity)

    def resized(self, names: list[str], rows: Tensor) -> None:
        """Other tasks, which are `rows` of those that there are."""
        for module in (self, self.A, self.B):
            if module.coefficients is not None:
                module.coefficients = _chosen(module.coefficients, rows)
        self.tasks = tuple(names)


class Whole(Adapter):
    """What each task has whole of one layer: `weights` (outputs, in, *kernel), and `biases` if the layer has one."""

    def __init__(self, config: RMMAdapterConfig, site: Site) -> None:
        super().__init__(config, site)
        shapes = [(rows, *site.weight_shape[1:]) for rows in config.whole[site.name]]
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in shapes)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(shape[0])) for shape in shapes if site.has_bias)
        self.tasks = tuple(config.tasks)
        self.task = self.tasks.index(config.task or self.tasks[0])

    def transform(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        own = self.replacement()
        return own[0].to(weight), None if own[1] is None else own[1].to(weight)

    def replacement(self) -> tuple[Tensor, Tensor | None]:
        return self.weights[self.task], self.biases[self.task] if len(self.biases) else None

    @torch.no_grad()
    def extended(self, task: str, weight: Tensor, bias: Tensor | None) -> None:
        """Store another task."""
        like = self.weights[0]
        self.weights.append(nn.Parameter(weight.to(like), requires_grad=like.requires_grad))
        if bias is not None and len(self.biases):
            self.biases.append(nn.Parameter(bias.to(like), requires_grad=like.requires_grad))
        self.tasks = (*self.tasks, task)

    def resized(self, names: list[str], rows: Tensor) -> None:
        """Other tasks, which are `rows` of those that there are."""
        self.weights = nn.ParameterList(self.weights[int(row)] for row in rows)
        self.biases = nn.ParameterList(self.biases[int(row)] for row in rows if len(self.biases))
        self.tasks = tuple(names)


def _with(coefficients: Tensor, new: Tensor) -> nn.Parameter:
    joined = torch.cat([coefficients, new.unsqueeze(0).to(coefficients)])
    return nn.Parameter(joined, requires_grad=coefficients.requires_grad)


def _chosen(coefficients: Tensor, rows: Tensor) -> nn.Parameter:
    return nn.Parameter(coefficients.detach()[rows].clone(), requires_grad=coefficients.requires_grad)
