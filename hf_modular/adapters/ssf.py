"""SSF, scaling and shifting your features (Lian, Zhou, Feng, Wang, arXiv 2210.08823, NeurIPS 2022).

    y' = γ ⊙ y + β,   so   W' = γ ⊙ W  (over the output channels),   b' = γ ⊙ b + β

The paper's: the formula, and the start γ ~ N(1, 0.02), β ~ N(0, 0.02). It puts an SSF behind every operation of
a vision transformer (linear layers, convolutions, norms). Ours: no shift where the layer has no bias, so that
the merged model has the parameters of the original one; `shift=True` asks for it all the same. `identity` starts
at exactly γ = 1, β = 0.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_modular.adapters._method import Adapter, AdapterConfig, Convolve, Site, require_between, require_choice


@dataclass
class SSFConfig(AdapterConfig):
    """Settings of SSF (arXiv 2210.08823): a scale and a shift behind each targeted layer.

    Args:
        shift (`bool | str`, defaults to `"auto"`):
            `"auto"` shifts where the layer has a bias, `True` everywhere, `False` nowhere. A shift on a layer
            without a bias cannot be merged: merging then raises and names the layers.
        init_weights (`bool | str`, defaults to `True`):
            `True` is the paper's start, noise of `init_std` around the identity; `"identity"` the exact identity;
            `False` starts far from it, for tests.
        init_std (`float`, defaults to 0.02):
            The standard deviation of the paper's start.
    """

    shift: bool | str = field(default="auto", metadata={"help": "Where to shift: 'auto' (where there is a bias)."})
    init_weights: bool | str = field(default=True, metadata={"help": "True: the paper's start; 'identity': exact."})
    init_std: float = field(default=0.02, metadata={"help": "Standard deviation of the paper's start."})

    type_name: ClassVar[str] = "HFM_SSF"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("shift", self.shift, ["auto", True, False])
        require_choice("init_weights", self.init_weights, [True, False, "identity"])
        require_between("init_std", self.init_std, 0.0, float("inf"), open_high=True)


class SSF(Adapter):
    """One SSF adapter: `scale` (out,) and, if asked for, `shift` (out,)."""

    direct = True

    def __init__(self, config: SSFConfig, site: Site) -> None:
        super().__init__(config, site)
        channels = site.weight_shape[0]
        shifted = site.has_bias if config.shift == "auto" else bool(config.shift)
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels)) if shifted else None
        self.has_bias = site.has_bias
        self._start(config)

    @torch.no_grad()
    def _start(self, config: SSFConfig) -> None:
        if config.init_weights == "identity":
            return
        std = config.init_std if config.init_weights else 0.5
        for parameter in self.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=std)

    def transform(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight = weight * self.scale.reshape(-1, *[1] * (weight.ndim - 1))
        bias = None if bias is None else bias * self.scale
        if self.shift is None:
            return weight, bias
        return weight, self.shift if bias is None else bias + self.shift

    def forward(self, x: Tensor, y: Tensor, convolve: Convolve | None = None) -> Tensor:
        y = y * self.scale
        return y if self.shift is None else y + self.shift

    def unmergeable(self) -> str | None:
        if self.shift is not None and not self.has_bias:
            return "its SSF adapter shifts the output, and the layer has no bias to take the shift (shift=True)"
        return None
