"""The adapter methods under test: a new method is one new line in `METHODS`, and lines for its other settings."""

from collections.abc import Sequence
from math import prod

from hf_modular.adapters import (
    CompacterConfig,
    FLoRAConfig,
    HUTConfig,
    MoSConfig,
    RMMAdapterConfig,
    Site,
    SSFConfig,
)
from hf_modular.testing import WEIGHT_MATRICES, AdapterCase


def compacter(sites: Sequence[Site], *, factor: int, n: int, rank: int) -> int:
    widths = [site.weight_shape[0] for site in sites]
    return n**3 + sum(2 * rank * (w + w // factor) + w + w // factor for w in widths)


def phm(sites: Sequence[Site], *, factor: int, n: int) -> int:
    widths = [site.weight_shape[0] for site in sites]
    return sum(2 * w * (w // factor) // n + w + w // factor + 2 * n**3 for w in widths)


def flora(sites: Sequence[Site], ranks: Sequence[int]) -> int:
    shapes = [(in_features, out_features, *kernel) for out_features, in_features, *kernel in shapes_of(sites)]
    clipped = [[min(pair) for pair in zip(shape, ranks, strict=False)] for shape in shapes]
    return sum(
        prod(r) + sum(d * k for d, k in zip(shape, r, strict=True)) for shape, r in zip(shapes, clipped, strict=True)
    )


def hut(sites: Sequence[Site], r: int, *, tiled: bool = True, scaled: bool = True) -> int:
    def one(site: Site) -> int:
        rows, columns = site.weight_shape[:2]
        over_rows, over_columns = (min(r, rows), min(r, columns)) if tiled else (r, r)
        return over_rows * columns + over_columns * rows + (rows * (1 + site.has_bias) if scaled else 0)

    return sum(map(one, sites))


def mos(sites: Sequence[Site], budget_r: int) -> int:
    return sum(budget_r * (out_features + prod(rest)) for out_features, *rest in shapes_of(sites))


def rmm(sites: Sequence[Site], *, n: int, r: int, p: int, by: str = "position") -> int:
    """By position the share (p (r + n) + r) / (r n) of n adapters of rank r; else one basis for all positions."""
    positions = sum(out_features + prod(rest) for out_features, *rest in shapes_of(sites))
    if by == "position":
        return positions * (min(p, r) * (r + n) + r)
    return positions * r * (p + 1) + n * p * len(sites) * (2 if by == "tensor" else 1)


def ssf(sites: Sequence[Site], *, shift: bool | None = None) -> int:
    return sum(site.weight_shape[0] * (1 + (site.has_bias if shift is None else shift)) for site in sites)


def shapes_of(sites: Sequence[Site]) -> list[tuple[int, ...]]:
    return [site.weight_shape for site in sites]


def never(site: Site) -> bool:
    return False


# The main setting of each method, which all the other tests use too.
METHODS = (
    AdapterCase(
        CompacterConfig,
        {"reduction_factor": 2, "phm_rank": 2, "init_weights": True},
        lambda sites: compacter(sites, factor=2, n=4, rank=2),
        mergeable=never,
    ),
    AdapterCase(FLoRAConfig, {"r": 5}, lambda sites: flora(sites, [5] * 5), layers=WEIGHT_MATRICES),
    AdapterCase(HUTConfig, {"r": 5}, lambda sites: hut(sites, 5), layers=WEIGHT_MATRICES),
    AdapterCase(MoSConfig, {"r": 3, "budget_r": 3, "shards": 4}, lambda sites: mos(sites, 3), layers=WEIGHT_MATRICES),
    AdapterCase(
        RMMAdapterConfig,
        {"tasks": ["mrpc", "sst2", "cola", "rte"], "task": "cola", "r": 3, "p": 2},
        lambda sites: rmm(sites, n=4, r=3, p=2),
        layers=WEIGHT_MATRICES,
    ),
    AdapterCase(SSFConfig, {}, ssf, identity=False),
)

MERGEABLE = tuple(case for case in METHODS if case.mergeable is not never)

# What else has a path of its own.
SETTINGS = (
    AdapterCase(
        CompacterConfig,
        {"reduction_factor": 3, "shared_rule": False, "factorized": False},
        lambda sites: phm(sites, factor=3, n=4),
        identity=False,
        mergeable=never,
    ),
    AdapterCase(
        HUTConfig,
        {"form": "row_column", "r": 3},
        lambda sites: hut(sites, 3, tiled=False),
        layers=WEIGHT_MATRICES,
    ),
    AdapterCase(
        HUTConfig,
        {"form": "low_rank", "r": 3, "scale_shift": False},
        lambda sites: hut(sites, 3, tiled=False, scaled=False),
        layers=WEIGHT_MATRICES,
    ),
    AdapterCase(
        MoSConfig,
        {"budget_r": 2, "shards": 3, "private_r": 2},
        lambda sites: mos(sites, 2),
        layers=WEIGHT_MATRICES,
    ),
    AdapterCase(
        RMMAdapterConfig,
        {"tasks": ["mrpc", "sst2", "cola"], "r": 2, "p": 3, "granularity": "tensor"},
        lambda sites: rmm(sites, n=3, r=2, p=3, by="tensor"),
        layers=WEIGHT_MATRICES,
    ),
    AdapterCase(
        RMMAdapterConfig,
        {"tasks": ["mrpc", "sst2"], "r": 2, "granularity": "layer"},
        lambda sites: rmm(sites, n=2, r=2, p=1, by="layer"),
        layers=WEIGHT_MATRICES,
    ),
    AdapterCase(SSFConfig, {"init_weights": "identity", "shift": False}, lambda sites: ssf(sites, shift=False)),
    AdapterCase(
        SSFConfig,
        {"shift": True},
        lambda sites: ssf(sites, shift=True),
        identity=False,
        mergeable=lambda site: site.has_bias,
    ),
)

TABLE = (*METHODS, *SETTINGS)
