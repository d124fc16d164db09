"""Compacter, Compacter++ and PHM-adapter (Mahabadi, Henderson, Ruder, arXiv 2106.04647, NeurIPS 2021).

    y' = y + up(act(down(y))),   where down and up are PHM layers:  x ↦ x H + b,   H = Σᵢ Aᵢ ⊗ Wᵢ  (i = 1..n)

A bottleneck of width m = d // reduction_factor behind a linear layer, the last one of a sub-layer. The rule Aᵢ
(n, n) is one for all PHM layers of the model; Wᵢ = Sᵢ Tᵢ has rank `phm_rank`, with S (n, in/n, rank) and
T (n, rank, out/n). H itself is built only where that is cheaper (`fast`): with x as a matrix X (n, in/n) and the
result likewise, x H is Σᵢ Aᵢᵀ X Sᵢ Tᵢ, of which X S and Σᵢ Aᵢᵀ ⊗ Tᵢ are small.

The paper's variants, on T5 and with the layer norms trained too:

- Compacter:    `CompacterConfig(train_layer_norm=True)`
- Compacter++:  `CompacterConfig(train_layer_norm=True, after="feed_forward")`
- PHM-adapter:  `CompacterConfig(train_layer_norm=True, phm_dim=12, factorized=False, shared_rule=False)`

The paper's: the formulas, the places, and the start "paper": A normal with 1e-4 (0.01 where it is not shared), S
and T Xavier-uniform with gain √2, biases zero; close to the identity, but not the identity. Ours: the start `True`,
in which the last factor of `up` is zero and the model exactly what it was.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_modular.adapters._method import (
    Adapter,
    AdapterConfig,
    Convolve,
    Site,
    norm_names,
    pattern_value,
    plus,
    require_choice,
    require_rank,
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}

# (architectures, the last linear layer of attention, that of the feed-forward network); no cross-attention
_PLACES = [
    ("t5 mt5 umt5", r"SelfAttention\.o", r"DenseReluDense\.wo"),
    ("bart mbart pegasus marian blenderbot m2m_100 whisper opt", r"self_attn\.out_proj", r"fc2"),
    (
        "bert roberta xlm-roberta camembert electra deberta deberta-v2 ernie",
        r"attention\.output\.dense",
        r"layer\.\d+\.output\.dense",
    ),
    ("distilbert", r"attention\.out_lin", r"ffn\.lin2"),
    ("modernbert", r"attn\.Wo", r"mlp\.Wo"),
    ("vit deit beit dinov2 swin", r"attention\.o_proj", r"mlp\.fc2"),
    ("clip clip_vision_model clip_text_model siglip_vision_model", r"self_attn\.out_proj", r"layers\.\d+\.mlp\.fc2"),
    ("gpt2", r"attn\.c_proj", r"mlp\.c_proj"),
    ("gptj", r"attn\.out_proj", r"mlp\.fc_out"),
    ("gpt_neo", r"attention\.out_proj", r"mlp\.c_proj"),
    ("gpt_neox", r"attention\.dense", r"mlp\.dense_4h_to_h"),
    ("bloom falcon", r"self_attention\.dense", r"mlp\.dense_4h_to_h"),
    (
        "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi3 olmo olmo2 cohere stablelm granite smollm3",
        r"self_attn\.o_proj",
        r"mlp\.down_proj",
    ),
    ("phi", r"self_attn\.dense", r"mlp\.fc2"),
    ("starcoder2", r"self_attn\.o_proj", r"mlp\.c_proj"),
]


def _targets(after: str) -> dict[str, list[str] | str]:
    """For each architecture, the regular expression of the layers to put adapters behind."""
    targets: dict[str, list[str] | str] = {}
    for names, attention, feed_forward in _PLACES:
        places = {"attention": attention, "feed_forward": feed_forward, "both": f"({attention}|{feed_forward})"}
        targets.update(dict.fromkeys(names.split(), rf"(.*\.)?{places[after]}"))
    return targets


@dataclass
class CompacterConfig(AdapterConfig):
    """Settings of Compacter, Compacter++ and PHM-adapter (arXiv 2106.04647): a small bottleneck behind layers.

    Unless `target_modules` is given, the adapters lie behind attention and feed-forward network (`after`), at the
    last linear layer of each. They are not linear and cannot be merged.

    Args:
        reduction_factor (`int`, defaults to 32):
            The width of the layer divided by the width of the bottleneck.
        phm_dim (`int`, defaults to 4):
            The number of Kronecker products, and the size of the rule. It must divide both widths.
        phm_rank (`int`, defaults to 1):
            The rank of the second factors of the products.
        factorized (`bool`, defaults to `True`):
            Whether the second factors have a low rank at all. `False` in the PHM-adapter.
        shared_rule (`bool`, defaults to `True`):
            Whether all layers share one rule. `False` in the PHM-adapter.
        non_linearity (`str`, defaults to `"gelu_new"`):
            Of the bottleneck: `"gelu_new"`, `"gelu"`, `"relu"`, `"silu"` (or `"swish"`), `"tanh"`.
        init_weights (`bool | str`, defaults to `"paper"`):
            `"paper"` is the published start, close to the identity; `True` the exact identity; `False` starts far
            from it, for tests.
        train_layer_norm (`bool`, defaults to `False`):
            Whether the norms of the model are trained too, as in the paper. They become `modules_to_save`.
        after (`str`, defaults to `"both"`):
            Where adapters lie by default: after `"attention"`, after the `"feed_forward"` network, or `"both"`.
        fast (`bool | str`, defaults to `"auto"`):
            Whether to do without the Kronecker product. `"auto"` chooses by the number of multiplications.
        reduction_pattern (`dict[str, int]`, defaults to `{}`):
            The `reduction_factor` of single layers, by name or regular expression.
    """

    reduction_factor: int = field(default=32, metadata={"help": "Width of the layer over width of the bottleneck."})
    phm_dim: int = field(default=4, metadata={"help": "Number of Kronecker products; must divide both widths."})
    phm_rank: int = field(default=1, metadata={"help": "Rank of the second factors of the products."})
    factorized: bool = field(default=True, metadata={"help": "Whether the second factors have a low rank."})
    shared_rule: bool = field(default=True, metadata={"help": "Whether all layers share one rule."})
    non_linearity: str = field(default="gelu_new", metadata={"help": f"One of {', '.join(ACTIVATIONS)}."})
    init_weights: bool | str = field(default="paper", metadata={"help": "'paper': published start; True: identity."})
    train_layer_norm: bool = field(default=False, metadata={"help": "Train the norms of the model too."})
    after: str = field(default="both", metadata={"help": "Default places: after attention, feed_forward or both."})
    fast: bool | str = field(default="auto", metadata={"help": "Do without the Kronecker product; auto: by cost."})
    reduction_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "The reduction_factor of single layers, by name."}
    )

    type_name: ClassVar[str] = "HFM_COMPACTER"
    default_targets: ClassVar[dict[str, list[str] | str] | None] = _targets("both")

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = {name: getattr(self, name) for name in ("reduction_factor", "phm_dim", "phm_rank")}
        sizes.update({f"reduction_pattern[{name!r}]": value for name, value in self.reduction_pattern.items()})
        for name, value in sizes.items():
            require_rank(name, value)
        require_choice("non_linearity", self.non_linearity, list(ACTIVATIONS))
        require_choice("init_weights", self.init_weights, ["paper", True, False])
        require_choice("after", self.after, ["attention", "feed_forward", "both"])
        require_choice("fast", self.fast, ["auto", True, False])
        if self.fast is True and not self.factorized:
            raise ValueError(
                "`fast=True` needs `factorized=True`: without it nothing is cheaper than the Kronecker product. "
                "Use fast='auto'."
            )

    def targets_for(self, model_type: str | None) -> list[str] | str | None:
        return _targets(self.after).get(str(model_type))

    def modules_to_train(self, model: nn.Module) -> list[str]:
        return norm_names(model) if self.train_layer_norm else []


class CompacterRule(nn.Module):
    """The matrices Aᵢ that all PHM layers share: `A` (n, n, n)."""

    def __init__(self, config: CompacterConfig) -> None:
        super().__init__()
        self.A = _rule(config, 1e-4)

    def forward(self) -> Tensor:
        return self.A.clone()  # what shards a model may take a module's own tensors back after its call


class PHM(nn.Module):
    """x ↦ x Σᵢ Aᵢ ⊗ Wᵢ + b with `S` and `T`, or `W`, the `bias`, and its own rule `A` if it is not shared."""

    def __init__(self, config: CompacterConfig, in_features: int, out_features: int) -> None:
        super().__init__()
        n, rank = config.phm_dim, config.phm_rank
        rows, columns = in_features // n, out_features // n
        self.factorized = config.factorized
        if self.factorized:
            self.S, self.T = _xavier(n, rows, rank), _xavier(n, rank, columns)
        else:
            self.W = _xavier(n, rows, columns)
        self.A = None if config.shared_rule else _rule(config, 0.01)
        self.bias = nn.Parameter(torch.zeros(out_features))
        # twice: to build H costs more small operations, and the wider products are the faster ones
        cost = n * rank * in_features + n**2 * rank * out_features
        cheaper = config.factorized and cost < 2 * in_features * out_features
        self.fast = cheaper if config.fast == "auto" else bool(config.fast)

    def forward(
        self,
        x: Tensor,  # (*, in)
        rule: Tensor | None,  # (n, n, n), the shared one
    ) -> Tensor:  # (*, out)
        A = cast(Tensor, self.A if rule is None else rule)
        x, matrix = self._factors(x, A) if self.fast else (x, self._matrix(A))
        return F.linear(x, matrix.T, self.bias)

    def _factors(self, x: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:  # (*, n·n·rank), (n·n·rank, out)
        """X S, and the rows of all Aᵢ ⊗ Tᵢ."""
        n, rows = len(A), self.S.shape[1]
        S = self.S.mT.reshape(-1, rows)  # few rows and not few columns, which products are several times slower with
        low = F.linear(x.reshape(-1, rows), S).view(*x.shape[:-1], n * len(S))
        matrix = A.transpose(0, 1).view(n, n, 1, n, 1) * self.T.unsqueeze(2)  # (a, i, rank, c, p)
        return low, matrix.reshape(low.shape[-1], -1)

    def _matrix(self, A: Tensor) -> Tensor:  # (in, out)
        """H."""
        W = self.S @ self.T if self.factorized else self.W
        H = A.flatten(1).T @ W.flatten(1)  # (a·c, k·p)
        return H.view(*A.shape[1:], *W.shape[1:]).transpose(1, 2).flatten(2).flatten(0, 1)


class Compacter(Adapter):
    """One bottleneck: the PHM layers `down` and `up`, and the rule as `shared` if it is shared."""

    direct = True

    def __init__(self, config: CompacterConfig, site: Site, shared: CompacterRule | None = None) -> None:
        super().__init__(config, site)
        width = site.weight_shape[0]
        narrow = _bottleneck(config, site)
        self.down, self.up = PHM(config, width, narrow), PHM(config, narrow, width)
        self.shared = shared
        self.activation = config.non_linearity
        if config.init_weights is True:
            nn.init.zeros_(self.up.T if config.factorized else self.up.W)

    @staticmethod
    def share(config: CompacterConfig, sites: list[Site]) -> CompacterRule | None:
        return CompacterRule(config) if config.shared_rule else None

    def forward(self, x: Tensor, y: Tensor, convolve: Convolve | None = None) -> Tensor:
        rule = None if self.shared is None else self.shared().to(y.device)
        # one matrix of all tokens: of other inputs a product takes another path where gradients are wanted
        h = y.reshape(-1, y.shape[-1])
        hidden = ACTIVATIONS[self.activation](self.down(h.to(self.down.bias.dtype), rule))
        return plus(self.up(hidden, rule), h).view(y.shape)


def _bottleneck(config: CompacterConfig, site: Site) -> int:
    """The width of the bottleneck.

    Raises:
        ValueError: If it or the layer's own width is no multiple of `phm_dim`.
    """
    width, n = site.weight_shape[0], config.phm_dim
    factor = pattern_value(config.reduction_pattern, site.name, config.reduction_factor)
    narrow = width // factor
    if narrow == 0 or width % n or narrow % n:
        raise ValueError(
            f"`phm_dim` must divide the widths of a layer and of its bottleneck, but phm_dim={n} does not for layer "
            f"'{site.name}': its width is {width}, and that of its bottleneck, with reduction_factor={factor}, is "
            f"{narrow}. Choose another `phm_dim` or `reduction_factor`, or name the layer in `exclude_modules`."
        )
    return narrow


def _rule(config: CompacterConfig, std: float) -> nn.Parameter:
    n = config.phm_dim
    return nn.Parameter(torch.randn(n, n, n) * (std if config.init_weights else 1.0))


def _xavier(*shape: int) -> nn.Parameter:
    tensor = torch.empty(shape)
    for matrix in tensor:
        nn.init.xavier_uniform_(matrix, gain=2**0.5)
    return nn.Parameter(tensor)
