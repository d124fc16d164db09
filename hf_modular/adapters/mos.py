"""MoS, Mixture of Shards (Wang, Chen, Chen, Wu et al., arXiv 2410.00938, ICLR 2025).

    W' = W + α/r · B A,   A = Route(pool_A, I_A) (r, in),   Bᵀ = Route(pool_B, I_B) (r, out)

All layers of one type (the same leaf name and shape; L of them) share a pool of e·L·l shards of in/l numbers for A
and as many of out/l for B, as many parameters as LoRA has at rank e. Route puts l shards side by side for each of
the r rows. A layer's indices are drawn once and never trained: (r - p)·l public shards without replacement, for A
and B independently (pair dissociation), and then the p·l private shards that no other layer uses. There are enough
public shards for this if (r - p) ≤ (e - p)·L.

The paper's: all of this, the start (A as LoRA's, B zero), and the scaling by the assembled rank r. Ours: indices
from a generator of their own, seeded by `seed` and the layer's name, so that neither the order of the layers nor
other random numbers matter; convolutions, whose A is their kernel (r, in, *kernel), and embeddings.
"""

import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_modular.adapters._method import (
    AdapterConfig,
    Factors,
    LowRank,
    Site,
    pattern_value,
    require_between,
    require_choice,
    require_matrix,
    require_rank,
)

DEFAULT_RANK = 8


@dataclass
class MoSConfig(AdapterConfig):
    """Settings of MoS (arXiv 2410.00938): LoRA whose matrices are assembled from shards that layers share.

    Args:
        r (`int`, *optional*):
            The rank that is assembled for each layer. If not given, the largest one up to 8 (or up to `budget_r`,
            if that is more) that the pool allows.
        budget_r (`int`, defaults to 2):
            The size of the pools: as many parameters as LoRA has at this rank.
        shards (`int`, defaults to 4):
            The number of shards that a row of A or B consists of. It must divide both sides of every layer.
        private_r (`int`, defaults to 1):
            The part of the rank that is a layer's own, made of shards that no other layer uses.
        alpha (`float`, defaults to 16):
            The change of the weight is scaled by `alpha / r`.
        dropout (`float`, defaults to 0.0):
            The probability of dropping an entry of the input in training, on the way through the adapter only.
        seed (`int`, defaults to 0):
            Of the random choice of shards.
        init_weights (`bool`, defaults to `True`):
            Start at exactly the identity. `False` starts at random, for tests.
        rank_pattern (`dict[str, int]`, defaults to `{}`):
            The `r` of single layers, by name or regular expression.
    """

    r: int | None = field(default=None, metadata={"help": "Assembled rank; default: the largest allowed, up to 8."})
    budget_r: int = field(default=2, metadata={"help": "Size of the pools: the parameters of LoRA at this rank."})
    shards: int = field(default=4, metadata={"help": "Shards that a row of A or B consists of."})
    private_r: int = field(default=1, metadata={"help": "Part of the rank whose shards no other layer uses."})
    alpha: float = field(default=16, metadata={"help": "The change of the weight is scaled by alpha / r."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the adapter in training."})
    seed: int = field(default=0, metadata={"help": "Seed of the random choice of shards."})
    init_weights: bool = field(default=True, metadata={"help": "Start at the identity; False: at random."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "The r of single layers, by name."})

    type_name: ClassVar[str] = "HFM_MOS"

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks = {f"rank_pattern[{name!r}]": rank for name, rank in self.rank_pattern.items()}
        if self.r is not None:
            ranks["r"] = self.r
        for name, value in {**ranks, "budget_r": self.budget_r, "shards": self.shards}.items():
            require_rank(name, value)
        require_between("private_r", self.private_r, 0, self.budget_r)
        require_between("dropout", self.dropout, 0.0, 1.0, open_high=True)
        require_choice("init_weights", self.init_weights, [True, False])
        for name, rank in ranks.items():
            self._require_room(name, rank)

    def _require_room(self, name: str, rank: int) -> None:
        if rank < self.private_r:
            raise ValueError(f"`{name}` must not be below `private_r`, but got {name}={rank}, {self.private_r=}.")
        if self.private_r == self.budget_r != rank:
            raise ValueError(
                f"With {self.private_r=} and {self.budget_r=} every shard is private, and `{name}` must be the same, "
                f"but got {name}={rank}. Lower `private_r`, or leave `r` out."
            )


class MoSPool(nn.Module):
    """The shards of all layers of one type: `A` (e·L·l, in·kernel / l) and `B` (e·L·l, out / l)."""

    def __init__(self, config: MoSConfig, site: Site, layers: int) -> None:
        super().__init__()
        require_matrix("MoS", site)
        out_features, columns = _sides(site)
        self._require_whole_shards(config, site)
        shards = config.budget_r * layers * config.shards
        self.private = config.private_r * config.shards  # of each layer
        self.public = shards - self.private * layers
        bound = columns**-0.5
        self.A = nn.Parameter(torch.empty(shards, columns // config.shards).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(shards, out_features // config.shards))
        if not config.init_weights:
            nn.init.uniform_(self.B, -bound, bound)

    def forward(
        self,
        index_A: Tensor,  # (r·l,)
        index_B: Tensor,
    ) -> tuple[Tensor, Tensor]:  # (r·l, in·kernel / l), (r·l, out / l)
        """The shards with these indices; the layers may lie on other devices than the pool."""
        A, B = F.embedding(index_A.to(self.A.device), self.A), F.embedding(index_B.to(self.B.device), self.B)
        return A.to(index_A.device), B.to(index_B.device)

    @staticmethod
    def _require_whole_shards(config: MoSConfig, site: Site) -> None:
        for side, size in zip(("output", "input"), _sides(site), strict=True):
            if size % config.shards:
                raise ValueError(
                    f"`shards` must divide both sides of every layer, but shards={config.shards} does not divide the "
                    f"{side} side of '{site.name}', {size}. Choose a divisor, or name the layer in `exclude_modules`."
                )


class Pools:
    """The pools of all types of layers, and each layer's number among those of its type."""

    def __init__(self, config: MoSConfig, sites: list[Site]) -> None:
        self.layers = Counter(map(_type, sites))
        self.pools: dict[tuple[object, ...], MoSPool] = {}
        self.numbers: dict[str, int] = {}
        seen: Counter[tuple[object, ...]] = Counter()
        for site in sites:
            kind = _type(site)
            if kind not in seen:
                self.pools[kind] = MoSPool(config, site, self.layers[kind])
            self.numbers[site.name] = seen[kind]
            seen[kind] += 1


class MoS(LowRank):
    """One MoS adapter: the pool of its type as `shared`, and the indices of its shards, `index_A` and `index_B`."""

    def __init__(self, config: MoSConfig, site: Site, shared: Pools) -> None:
        rank = _rank(config, site, shared.layers[_type(site)])
        super().__init__(config, site, config.alpha / rank)
        self.shared = shared.pools[_type(site)]
        self.rank, self.columns = rank, site.weight_shape[1:]
        index = _route(self.shared, rank * config.shards, shared.numbers[site.name], f"{config.seed}:{site.name}")
        self.index_A, self.index_B = (nn.Buffer(half) for half in index)

    share = staticmethod(Pools)

    def factors(self) -> Factors:
        shards_A, shards_B = self.shared(self.index_A, self.index_B)
        A, B = shards_A.reshape(self.rank, *self.columns), shards_B.reshape(self.rank, -1).t()
        return Factors(B, None, A) if A.ndim == 2 else Factors(B, A, None)


def _sides(site: Site) -> tuple[int, int]:  # (out, in · kernel)
    return site.weight_shape[0], torch.Size(site.weight_shape[1:]).numel()


def _type(site: Site) -> tuple[object, ...]:
    return site.name.rpartition(".")[2], site.kind, site.weight_shape


def _rank(config: MoSConfig, site: Site, layers: int) -> int:
    """The rank to assemble.

    Raises:
        ValueError: If an explicit one needs more public shards than there are.
    """
    highest = config.private_r + (config.budget_r - config.private_r) * layers
    rank = pattern_value(config.rank_pattern, site.name, config.r or min(highest, max(DEFAULT_RANK, config.budget_r)))
    if rank > highest:
        raise ValueError(
            f"(r - private_r) <= (budget_r - private_r) * layers must hold, but r={rank}, private_r="
            f"{config.private_r}, budget_r={config.budget_r}, and {layers} layer(s) of the type of '{site.name}' "
            f"share a pool. Use r <= {highest}, a larger `budget_r`, or leave `r` out."
        )
    return rank


def _route(pool: MoSPool, count: int, number: int, key: str) -> tuple[Tensor, Tensor]:
    """`count` indices for A and for B: public ones at random, then those that are the layer's own."""
    rng = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    own = pool.public + number * pool.private + torch.arange(pool.private, device="cpu")

    def draw() -> Tensor:
        public = torch.randperm(pool.public, generator=rng, device="cpu")[: count - pool.private]
        return torch.cat([public, own]).to(torch.int32)

    return draw(), draw()
