"""The q of DAREx-q (Deng et al., arXiv 2410.09344): what to divide a thinned task vector by, found by a model on data.

What dropping a share p changes in the output of a neuron, of which c₁, c₂, ... are the inputs times their change, has
the mean square (1 - (1 - p)/q)² S² + p (1 - p) Q/q² with S = Σⱼ cⱼ and Q = Σⱼ cⱼ². The ways to choose q:

    closed_form   its minimum, (1 - p) + p ΣQ/ΣS², summed over a layer's outputs and all inputs, for each layer (ours)
    analytical    the paper's rule for each layer: with c of the mean input, for each output k the q that is nearest to
                  a zero of η (1 - (1 - p)/q) Σc + η² Φ(p) Σc²/(4 q²) + ln(2/(1 - γ)), where γ = 0.95 and
                  Φ(p) = (1 - 2p)/ln((1 - p)/p), and the mean over the outputs; η is given, or chosen by `evaluate`
    search        one q for all, with which the output changes least on unlabelled data: the mean |change| of the last
                  hidden state, or of a language model the mean square change of the fine-tuned model's top 5 logits
    validation    one q for all, with which `evaluate` is greatest

The last two and η are looked for as in the authors' code: up a coarse grid until it has not become better for more
than three steps, then on a grid ten times finer around the best. They draw several masks and take the mean.
Departures: nothing is taken for an outlier, neither masks nor outputs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_modular._batches import Rows
from hf_modular.calibration._layers import as_rows, inputs, linear_layers, run_through, state_of
from hf_modular.merging import DAREConfig, merge_state_dicts

How = Literal["closed_form", "analytical", "search", "validation"]
Evaluate = Callable[[nn.Module], float]

_TOP = 5  # logits of a language model
_PATIENCE = 3
_FINER = 0.1
_CONFIDENCE = math.log(2 / (1 - 0.95))
_QS = 1e-3  # steps of q in the analytical rule, up to 0.998


@dataclass(frozen=True)
class DAREScale:
    """What was found.

    Args:
        config: The settings with q filled in, one number for all tensors.
        layers: For each linear layer, by its path, its own q, if that was asked for.
        tried: The numbers that were tried, q or η, and the cost of each: the change, or minus what `evaluate` gave.
    """

    config: DAREConfig
    layers: Mapping[str, float] = field(default_factory=dict)
    tried: Sequence[tuple[float, float]] = ()

    def parameters(self) -> dict[str, Any]:
        """The `parameters` of the model in a recipe whose method has `rescale: q`."""
        longest_first = sorted(self.layers.items(), key=lambda item: -len(item[0]))  # a path may be part of another
        cases: list[dict[str, Any]] = [{"filter": f"{path}.", "value": q} for path, q in longest_first]
        return {"q": [*cases, {"value": self.config.q}] if cases else self.config.q}


def dare_q(
    base: nn.Module | Mapping[str, Tensor],
    model: nn.Module,
    config: DAREConfig,
    dataset: Rows | None = None,
    *,
    how: How = "closed_form",
    evaluate: Evaluate | None = None,
    eta: float | None = None,
    step: float = 0.05,
    high: float = 1.0,
    masks: int = 4,
    seed: int = 0,
    batch_size: int = 8,
) -> DAREScale:
    """Find q for `DAREConfig(rescale="q")`, so that the merge needs neither data nor the model to run.

    Args:
        base: What the model was fine-tuned from, as a model or a state dict.
        model: The fine-tuned model. For "search" and "validation" a copy of it is made.
        config: The method with its `drop`; what it says of `rescale` and `q` is replaced.
        dataset: Examples without padding for all but "validation". Labels are passed over.
        how: "closed_form" and "analytical" give each layer its own q, "search" and "validation" one for all.
        evaluate: For "validation", and for η: gives a number for a model, the greater the better.
        eta: For "analytical"; by default it is chosen by `evaluate`.
        step: Of the coarse grid of q, or of η.
        high: Up to which q, or η, it is looked for.
        masks: How many masks are drawn for each number that is tried.
        seed: Of the first of them.
        batch_size: How many examples are taken at once.
    """
    _check(how, evaluate, eta, dataset, config)
    trial = _Trial(state_of(base), model, replace(config, rescale="q", q=1.0), dataset, masks, seed, batch_size)
    if how == "closed_form":
        return trial.closed_form()
    if how == "analytical" and eta is not None:
        return trial.analytical(eta)
    if how == "search":
        return _searched(lambda scale: trial.mean(trial.change, scale), trial.config, (1 - config.drop, high, step))
    score = evaluate or trial.change  # which `_check` has seen to
    if how == "validation":
        return _searched(lambda scale: -trial.mean(score, scale), trial.config, (1 - config.drop, high, step))
    best, tried = two_grids(lambda x: -trial.mean(score, trial.analytical(x)), step, high, step)
    return replace(trial.analytical(best), tried=tried)


def _searched(cost: Callable[[DAREScale], float], config: DAREConfig, grid: tuple[float, float, float]) -> DAREScale:
    """One q for all tensors."""
    best, tried = two_grids(lambda q: cost(DAREScale(replace(config, q=q))), *grid)
    return DAREScale(replace(config, q=best), tried=tried)


def two_grids(
    cost: Callable[[float], float], low: float, high: float, step: float
) -> tuple[float, list[tuple[float, float]]]:
    """The number with the least cost, of a coarse grid and a finer one around its best; and all that were tried."""
    tried: dict[float, float] = {}

    def walk(numbers: Sequence[float]) -> None:
        worse = 0
        for number in numbers:
            best = min(tried.values(), default=math.inf)
            if number not in tried:
                tried[number] = cost(number)
            worse = 0 if tried[number] < best else worse + 1
            if worse > _PATIENCE:
                return

    walk(_grid(low, high, step))
    best = min(tried, key=lambda number: tried[number])
    for number in _grid(max(low, best - step * (1 - _FINER)), min(high, best + step * (1 - _FINER)), step * _FINER):
        if number not in tried:
            tried[number] = cost(number)
    return min(tried, key=lambda number: tried[number]), sorted(tried.items())


def _grid(low: float, high: float, step: float) -> list[float]:
    return [round(low + i * step, 6) for i in range(math.floor((high - low) / step + 1e-9) + 1)]


def _check(how: str, evaluate: Evaluate | None, eta: float | None, dataset: Rows | None, config: DAREConfig) -> None:
    if how not in ("closed_form", "analytical", "search", "validation"):
        raise ValueError(f"`how` must be closed_form, analytical, search or validation, but got {how=}")
    if config.drop == 0:
        raise ValueError("with drop=0 nothing is dropped, so there is no q to find")
    if config.mask not in ("random", "columns"):
        raise ValueError(f"q makes up for what is dropped at random, but got mask={config.mask!r}")
    if dataset is None and how != "validation":
        raise ValueError(f"how={how!r} needs a `dataset`, but there is none")
    if evaluate is None and (how == "validation" or (how == "analytical" and eta is None)):
        raise ValueError(
            f"how={how!r} needs `evaluate`{' or `eta`' if how == 'analytical' else ''}, but there is none"
        )


@dataclass(eq=False)
class _Trial:
    """A fine-tuned model, its base, and what is to be dropped."""

    whole_base: Mapping[str, Tensor]
    model: nn.Module
    config: DAREConfig
    dataset: Any
    masks: int
    seed: int
    batch_size: int

    @cached_property
    def tuned(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.model.state_dict().items()}

    @cached_property
    def base(self) -> dict[str, Tensor]:
        if missing := [name for name in self.tuned if name not in self.whole_base]:
            raise ValueError(f"the base must have the tensors of the model, but lacks {missing[0]}")
        return {name: self.whole_base[name].to(tensor.device) for name, tensor in self.tuned.items()}

    @cached_property
    def working(self) -> nn.Module:
        return deepcopy(self.model).eval()

    @cached_property
    def thinned(self) -> list[dict[str, Tensor]]:
        """The model with each of the masks, before what is kept is rescaled."""
        config = replace(self.config, rescale="none", q=None)
        seeds = range(self.seed, self.seed + self.masks)
        return [merge_state_dicts(self.base, [self.tuned], config, seed=seed) for seed in seeds]

    def closed_form(self) -> DAREScale:
        changes = {path: self._change(path, layer) for path, layer in linear_layers(self.model).items()}
        sums: dict[str, tuple[float, float]] = {}

        def see(path: str, layer: nn.Module, x: Tensor) -> None:
            d, b = changes[path]
            squares, squared_sums = sums.get(path, (0.0, 0.0))
            own = (x.square() @ d.square().T).double().sum() + len(x) * b.double().square().sum()
            sums[path] = squares + float(own), squared_sums + float((x @ d.T + b).double().square().sum())

        run_through(self.model, self.dataset, self.batch_size, see)
        layers = {path: _optimum(self.config.drop, *pair) for path, pair in sums.items()}
        squares, squared_sums = (math.fsum(parts) for parts in zip(*sums.values(), strict=True))
        return DAREScale(replace(self.config, q=_optimum(self.config.drop, squares, squared_sums)), layers)

    @cached_property
    def coefficients(self) -> dict[str, Tensor]:  # path -> (out, in + 1)
        """The change of each layer times its mean input, that of the bias at last."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}

        def see(path: str, layer: nn.Module, x: Tensor) -> None:
            sums[path] = sums.get(path, torch.zeros((), dtype=torch.float64, device=x.device)) + x.double().sum(0)
            counts[path] = counts.get(path, 0) + len(x)

        run_through(self.model, self.dataset, self.batch_size, see)
        layers = {path: layer for path, layer in linear_layers(self.model).items() if path in sums}
        changes = {path: self._change(path, layer) for path, layer in layers.items()}
        return {path: torch.cat([d * (sums[path] / counts[path]), b[:, None]], 1) for path, (d, b) in changes.items()}

    def analytical(self, eta: float) -> DAREScale:
        layers = {path: _by_the_rule(c, self.config.drop, eta) for path, c in self.coefficients.items()}
        return DAREScale(replace(self.config, q=fmean(layers.values())), layers)

    def mean(self, measure: Evaluate, scale: DAREScale) -> float:
        """What is measured of a model thinned in so many ways."""
        return fmean(measure(self._rescaled(thin, scale)) for thin in self.thinned)

    @torch.no_grad()
    def change(self, thinned: nn.Module) -> float:
        """How far the outputs are from the fine-tuned model's."""
        self.model.eval()
        total = count = 0.0
        for batch in inputs(self.model, self.dataset, self.batch_size):
            difference = _difference(self.model, thinned, batch)
            total, count = total + float(difference.double().sum()), count + difference.numel()
        return total / count

    def _rescaled(self, thin: Mapping[str, Tensor], scale: DAREScale) -> nn.Module:
        state = {}
        for name, base in self.base.items():
            state[name] = thin[name]
            if base.is_floating_point():
                q = scale.layers.get(name.rpartition(".")[0], scale.config.q)
                state[name] = ((thin[name].float() - base.float()) / float(q or 1) + base.float()).to(base.dtype)
        self.working.load_state_dict(state)
        return self.working

    def _change(self, path: str, layer: nn.Module) -> tuple[Tensor, Tensor]:  # (out, in), (out,)
        """What fine-tuning has added to a layer's weight and bias."""
        weight, bias = f"{path}.weight", f"{path}.bias"
        d = as_rows(layer, self.tuned[weight].float() - self.base[weight].float())
        return d, self.tuned[bias].float() - self.base[bias].float() if bias in self.tuned else d.new_zeros(len(d))


def _optimum(drop: float, squares: float, squared_sums: float) -> float:
    """(1 - p) + p ΣQ/ΣS², at most 1."""
    return 1.0 if squares >= squared_sums else 1 - drop + drop * squares / squared_sums


def _by_the_rule(c: Tensor, drop: float, eta: float) -> float:  # (out, in + 1)
    """The analytical q of a layer."""
    phi = 0.5 if drop == 0.5 else (1 - 2 * drop) / math.log((1 - drop) / drop)
    qs = torch.arange(1 - drop, 0.998 + _QS / 2, _QS, dtype=torch.float64, device=c.device)
    sums, squares = c.double().sum(1, keepdim=True), c.double().square().sum(1, keepdim=True)  # (out, 1)
    bounds = eta * (1 - (1 - drop) / qs) * sums + eta**2 * phi * squares / (4 * qs**2) + _CONFIDENCE
    return float(qs[bounds.abs().argmin(1)].mean())


def _difference(tuned: nn.Module, thinned: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    if getattr(tuned, "can_generate", lambda: False)():
        wanted, found = (model(**batch).logits for model in (tuned, thinned))
        top = wanted.topk(min(_TOP, wanted.shape[-1]), -1).indices
        return (wanted.gather(-1, top) - found.gather(-1, top)).square()
    wanted, found = (model(**batch, output_hidden_states=True).hidden_states[-1] for model in (tuned, thinned))
    return (wanted - found).abs()
