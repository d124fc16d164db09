"""CMA-ES (Hansen, arXiv 1604.00772) by the library `cma`, within the unit cube, made to do the same every time."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_SIGMA = 0.25  # of the first points around the start, in the unit cube
_PATIENT = {"tolfun": 0, "tolfunhist": 0, "tolflatfitness": np.inf, "tolstagnation": np.inf, "tolx": 1e-6}

Costs = Callable[[list[list[float]]], list[float]]  # of points, the smaller the better


def evolve(start: Sequence[float], costs: Costs, budget: int, seed: int) -> None:
    """Ask for the costs of points near better and better ones, `budget` of them at most.

    The points depend on the start, the seed and the costs alone: a search whose first costs are remembered goes on as
    if it had not been interrupted. What is left of the budget but is no whole generation is spent as well.
    """
    strategy = _strategy(start, seed)
    while budget > 0 and not strategy.stop():
        points = [[float(x) for x in point] for point in strategy.ask()]
        asked = points[:budget]
        found = costs(asked)
        budget -= len(asked)
        if len(asked) < len(points):
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own numerics, for whoever develops it
            strategy.tell(points, found)


def _strategy(start: Sequence[float], seed: int) -> Any:
    try:
        import cma
    except ImportError as error:
        raise ImportError('a search needs the library cma: pip install "hf_modular[search]"') from error
    normal = np.random.default_rng(
        seed
    ).standard_normal  # not numpy's global numbers, which an evaluation may draw from
    options: dict[str, Any] = {
        "bounds": [0, 1],
        "seed": np.nan,
        "randn": lambda *shape: normal(shape),
        "verbose": -9,
        "maxiter": np.inf,
        "maxstd_boundrange": np.inf,  # cma 4.5 fails where a standard deviation grows to this limit
    }
    inside = [min(max(x, 0.02), 0.98) for x in start]  # on the edge half of the first points would fall together
    return cma.CMAEvolutionStrategy(inside, _SIGMA, options | _PATIENT)
