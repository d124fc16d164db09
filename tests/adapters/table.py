"""The adapter methods under test: a new method is one new line in `METHODS`, and lines for its other settings."""

from collections.abc import Sequence

from hf_modular.adapters import HUTConfig, Site, SSFConfig
from hf_modular.testing import WEIGHT_MATRICES, AdapterCase


def hut(site: Site, r: int, *, capped: bool = True, scaled: bool = True) -> int:
    rows, columns = site.weight_shape[:2]
    over_rows, over_columns = (min(r, rows), min(r, columns)) if capped else (r, r)
    return over_rows * columns + over_columns * rows + (rows * (1 + site.has_bias) if scaled else 0)


def ssf(sites: Sequence[Site], *, shift: bool | None = None) -> int:
    return sum(site.weight_shape[0] * (1 + (site.has_bias if shift is None else shift)) for site in sites)


# The main setting of each method, which all the other tests use too.
METHODS = (
    AdapterCase(HUTConfig, {"r": 5}, lambda sites: sum(hut(s, 5) for s in sites), layers=WEIGHT_MATRICES),
    AdapterCase(SSFConfig, {}, ssf, identity=False),
)

# What else has a path of its own.
SETTINGS = (
    AdapterCase(
        HUTConfig,
        {"form": "row_column", "r": 3},
        lambda sites: sum(hut(s, 3, capped=False) for s in sites),
        layers=WEIGHT_MATRICES,
    ),
    AdapterCase(
        HUTConfig,
        {"form": "low_rank", "r": 3, "scale_shift": False},
        lambda sites: sum(hut(s, 3, capped=False, scaled=False) for s in sites),
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
