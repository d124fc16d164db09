"""What an adapter method is: a config, and the mathematics of one adapter on one layer.

A method sees a layer only through its `Site`: weights come as (out, in, *kernel) whatever way the layer stores
them, so one formula serves Linear, GPT-2's Conv1D, convolutions, embeddings, norms and quantised layers alike.
Everything else (several adapters, mixed batches, merging, dtypes, saving) is done by `_layer.py` and `_peft.py`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig, PeftType
from torch import Tensor, nn

from hf_modular.adapters._readme import add_loading_note

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Site:
    """The layer, as far as a method may know it."""

    name: str  # its path in the model
    weight_shape: tuple[int, ...]  # (out, in, *kernel); (features,) for a norm
    has_bias: bool

    @property
    def is_norm(self) -> bool:
        return len(self.weight_shape) == 1


@dataclass
class AdapterConfig(PeftConfig):
    """The settings that every adapter method of this package shares.

    Args:
        target_modules (`list[str] | str`, *optional*):
            The modules to adapt: names or suffixes of names, one regular expression, or `"all-linear"`. If not
            given, the modules that are usual for the architecture.
        exclude_modules (`list[str] | str`, *optional*):
            Modules not to adapt, though `target_modules` matches them.
        modules_to_save (`list[str]`, *optional*):
            Modules that are trained and saved whole beside the adapter, for example a new classifier.
        layers_to_transform (`list[int] | int`, *optional*):
            Only these layer indices are adapted. Needs `target_modules` to be a list.
        layers_pattern (`list[str] | str`, *optional*):
            The name of the module list that `layers_to_transform` counts in, if it is not a common one.
        trainable_token_indices (`list[int] | dict[str, list[int]]`, *optional*):
            Tokens whose embeddings are trained beside the adapter.
        format_version (`int`, defaults to 1):
            The version of the saved format. A newer one than this package knows is refused.

    Raises:
        ValueError: If a setting is out of its range, or the adapter was saved by a newer version of this package.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Modules to adapt: names, one regular expression, or 'all-linear'."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules not to adapt, though target_modules matches them."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved whole beside the adapter."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Only these layer indices are adapted."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "The name of the module list that layers_to_transform counts in."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings are trained beside the adapter."}
    )
    format_version: int = field(
        default=FORMAT_VERSION, metadata={"help": "The version of the saved format; set by the package."}
    )

    # `HFM_` keeps the type apart from a method of the same name that PEFT may adopt later in a format of its own.
    type_name: ClassVar[str]
    # model type -> modules to adapt by default; None: those that are usual for LoRA
    default_targets: ClassVar[dict[str, list[str] | str] | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(self.type_name)
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"This adapter was saved in format_version={self.format_version}, and the installed hf_modular reads "
                f"up to {FORMAT_VERSION}. Upgrade hf_modular to load it."
            )
        # PEFT matches against sets; JSON and users give lists
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        self._check_layer_selection()

    def _check_layer_selection(self) -> None:
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` needs `target_modules` to be a list, but got {self.target_modules=} as a regular "
                        "expression. Select the layers in the expression instead."
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` needs `layers_to_transform` to be given, but it is None.")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as PEFT does, and say in the folder's README what to import before loading."""
        super().save_pretrained(save_directory, **kwargs)
        add_loading_note(Path(save_directory), str(self.type_name), self.base_model_name_or_path)


def pattern_value(patterns: dict[str, int], name: str, default: int) -> int:
    """The value that `rank_pattern` gives to the layer `name`; the keys are names or regular expressions."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def require_between(name: str, value: float, low: float, high: float, *, open_high: bool = False) -> None:
    """Refuse a setting outside [low, high], or [low, high) with `open_high`."""
    if not low <= value <= high or (open_high and value == high):
        raise ValueError(f"`{name}` must be in [{low}, {high}{')' if open_high else ']'}, but got {name}={value}.")


def require_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Refuse a setting that is not one of `choices`."""
    if not any(value is c or (value == c and type(value) is type(c)) for c in choices):
        raise ValueError(f"`{name}` must be one of {list(choices)}, but got {name}={value!r}.")


def require_rank(name: str, value: object) -> None:
    """Refuse a rank or a size that is not a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, but got {name}={value!r}.")


class Adapter(nn.Module):
    """One adapter on one layer. Its parameters are plain attributes.

    A subclass is final and defines exactly one of

    - `delta()`, additive: `W' = W + delta()`;
    - `transform(weight, bias)`, rewriting: `W', b' = transform(W, b)`;
    - `forward(x, y)` alone, which acts on the output only and cannot be merged.

    Beside the first two, `forward(x, y)` may be a cheaper equal of the rewritten layer; `direct` says that it is
    to be used. Weights are given in fp32 or better, and changes nothing that it is given.
    """

    # A module class, made once per adapter name as Shared(config, sites) and given to every adapter as `shared`.
    Shared: ClassVar[type[nn.Module] | None] = None
    direct: bool = False

    def __init__(self, config: Any, site: Site, shared: nn.Module | None = None) -> None:
        super().__init__()

    def delta(self) -> Tensor:  # (out, in, *kernel)
        """What is added to the weight."""
        raise NotImplementedError

    def transform(
        self,
        weight: Tensor,  # (out, in, *kernel)
        bias: Tensor | None,  # (out,)
    ) -> tuple[Tensor, Tensor | None]:
        """The weight and bias of the adapted layer."""
        return weight + self.delta(), bias

    def forward(
        self,
        x: Tensor,  # the layer's input
        y: Tensor,  # (*, out): its output, the channels last
    ) -> Tensor:  # (*, out)
        """The output of the adapted layer."""
        raise NotImplementedError

    def unmergeable(self) -> str | None:
        """Why this adapter cannot be merged into its layer; None if it can."""
        cls = type(self)
        rewrites = cls.delta is not Adapter.delta or cls.transform is not Adapter.transform
        return None if rewrites else f"{cls.__name__} acts on the layer's output and has no weight to merge"
