"""merge_adapters: adapters of a model in memory into one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig, PeftModel, PeftType
from torch import Tensor

from hf_modular.adapter_merging._fit import Fitted, can_fit, fit_of
from hf_modular.adapter_merging._live import LiveAdapter, LiveBase, add_adapter
from hf_modular.adapter_merging._matrix import Rank
from hf_modular.adapter_merging._parameters import merge_parameters
from hf_modular.adapter_merging._report import AdapterReport, errors, warn_of
from hf_modular.adapter_merging._result import Result, dressed, in_dtype, named_in_file, notes_on, write
from hf_modular.adapter_merging._rmm import REMEDY as RMM_REMEDY
from hf_modular.adapter_merging._rmm import merge_reversibly
from hf_modular.adapter_merging._rmm_config import RMMConfig
from hf_modular.adapter_merging._running import Settings
from hf_modular.adapter_merging._source import Base, Source
from hf_modular.adapter_merging._weights import WeightMerge
from hf_modular.merging import MergeMethod
from hf_modular.merging.recipes._settings import Resolved

Space = Literal["weights", "parameters"]

WARN_ABOVE = 0.1
REMEDY = "Choose a higher `rank`, or merge into the weights of the model itself."


@dataclass(frozen=True, eq=False)
class Options:
    """How adapters are merged, beside the method."""

    space: Space = "weights"
    rank: Rank = None
    into: PeftConfig | None = None
    seed: int = 0
    warn_above: float = WARN_ABOVE

    def __post_init__(self) -> None:
        if self.space not in ("weights", "parameters"):
            raise ValueError(f"`space` must be 'weights' or 'parameters', but got space={self.space!r}.")
        if isinstance(self.rank, bool) or not (
            self.rank is None or (isinstance(self.rank, int) and self.rank >= 1) or _is_share(self.rank)
        ):
            raise ValueError(
                f"`rank` must be a positive integer, or a share of the squared norm in (0, 1), but got {self.rank!r}."
            )
        if self.space == "parameters" and (self.rank is not None or self.into is not None):
            raise ValueError(
                "With space='parameters' the result is like the adapters, and `rank` and `into` must not be given, "
                f"but got {self.rank=}, {self.into=}."
            )
        if getattr(self.into, "target_modules", None) or getattr(self.into, "modules_to_save", None):
            raise ValueError("`into` says of which type the result is, not where: leave its `target_modules` out.")


def merge_adapters(
    model: PeftModel,
    adapters: Sequence[str],
    config: MergeMethod | RMMConfig,
    *,
    adapter_name: str = "merged",
    weights: Sequence[float] | None = None,
    space: Space = "weights",
    rank: Rank = None,
    into: PeftConfig | None = None,
    seed: int = 0,
    warn_above: float = WARN_ABOVE,
    output_dir: str | Path | None = None,
) -> AdapterReport:
    """Merge adapters of a model into a new one.

    With `space="weights"`, what the adapters add to the weights is merged: rank-stabilised scalings, different ranks,
    DoRA, biases and convolutions all count for what they do. The result is fitted by a LoRA, or another type. It is
    exact where the method only sums up (`LinearConfig`, `TaskArithmeticConfig`), the adapters are of low rank, and no
    `rank` is given: its rank is then the sum of theirs. The method sees the changes with a base of zeros. With
    `space="parameters"` the parameters of adapters of one type are merged one by one, where that means something.

    Args:
        model (`PeftModel`):
            The model that holds the adapters, none of them merged into its weights.
        adapters (`Sequence[str]`):
            Their names.
        config (`MergeMethod | RMMConfig`):
            The merge method and its settings. With `RMMConfig` the result holds all adapters, as tasks of their
            names, and needs an `output_dir`; no other setting has a meaning then.
        adapter_name (`str`, defaults to `"merged"`):
            The name of the new adapter. It is not active.
        weights (`Sequence[float]`, *optional*):
            The weight of each adapter, 1 by default. Negative ones take an adapter's effect away.
        space (`str`, defaults to `"weights"`):
            What is merged: `"weights"` or `"parameters"`.
        rank (`int | float`, *optional*):
            The rank of the LoRA, or the share of each layer's squared norm that it must keep. If not given, the
            sum of the adapters' ranks.
        into (`PeftConfig`, *optional*):
            The type and settings of the result if it is to be no such LoRA: a `LoraConfig`, `FLoRAConfig`,
            `SSFConfig` or `HUTConfig`, without targets.
        seed (`int`, defaults to 0):
            For methods that draw random numbers.
        warn_above (`float`, defaults to 0.1):
            Warn if the relative error of the result is larger.
        output_dir (`str | Path`, *optional*):
            A folder, absent or empty, to write the new adapter to instead of putting it into the model. A model
            whose adapters are of another type than the result cannot hold it.

    Returns:
        `AdapterReport`: what was done, with the relative error of each layer and in total.

    Raises:
        ValueError: If the adapters cannot be merged, or the result cannot be represented. The model is as it was.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"`model` must be a PeftModel, but got a {type(model).__name__}.")
    _check_names(model, adapters, None if output_dir else adapter_name)
    if isinstance(config, RMMConfig):
        _refuse_beside_rmm(output_dir, weights=weights, space=space, rank=rank, into=into)
        return _reversibly(model, adapters, config, Path(str(output_dir)), warn_above)
    if space == "weights" and into is None and output_dir is None:
        into = _own_type(model.peft_config[adapters[0]], rank)
    options = Options(space, rank, into, seed, warn_above)
    each = Resolved(config, _weights(weights, len(adapters)), {})
    sources = [LiveAdapter(model, name) for name in adapters]
    facts = {"weights": list(each.weights)}
    result = compute(sources, LiveBase(model), config, lambda names: dict.fromkeys(names, each), options, facts)
    if output_dir is not None:
        write(result, output_dir)
    else:
        add_adapter(model, adapter_name, result.config, result.tensors)
    warn_of(result.report, warn_above, REMEDY)
    return result.report


def _refuse_beside_rmm(output_dir: str | Path | None, **given: Any) -> None:
    if output_dir is None:
        raise ValueError(
            "A model with adapters of another type cannot hold an RMM adapter beside them: give an `output_dir`, and "
            "load it on the base model."
        )
    if beside := {name: value for name, value in given.items() if value not in (None, "weights")}:
        raise ValueError(f"RMM keeps each adapter as it is, so that {beside} mean nothing: see RMMConfig.")


def _reversibly(
    model: PeftModel, adapters: Sequence[str], config: RMMConfig, output_dir: Path, warn_above: float
) -> AdapterReport:
    sources = [LiveAdapter(model, name) for name in adapters]
    result = merge_reversibly(sources, LiveBase(model), config, adapters, {})
    write(result, output_dir)
    warn_of(result.report, warn_above, RMM_REMEDY)
    return result.report


def compute(
    sources: Sequence[Source],
    base: Base,
    method: MergeMethod,
    settings: Settings,
    options: Options,
    facts: Mapping[str, Any],
) -> Result:
    """The merged adapter, of which nothing is written yet; the facts are for its report."""
    made = _in_weights if options.space == "weights" else _in_parameters
    config, tensors, fitted, notes = made(sources, base, method, settings, options)
    layers, error = errors(fitted)
    report = AdapterReport(
        method=method.name,
        adapters=[source.reference for source in sources],
        peft_type=config.peft_type.value,
        layers=layers,
        error=error,
        settings={**method.to_dict(), "space": options.space, "rank": options.rank, "seed": options.seed, **facts},
        notes=[*notes_on(sources), *notes],
    )
    return Result(config, tensors, report)


_Made = tuple[Any, dict[str, Tensor], dict[str, Fitted], list[str]]  # config, tensors, what was fitted, notes


def _in_weights(
    sources: Sequence[Source], base: Base, method: MergeMethod, settings: Settings, options: Options
) -> _Made:
    fit = fit_of(options.into, options.rank)
    merge = WeightMerge(sources, base, method, settings, fit, options.seed)
    fitted, whole = merge.run()
    config, tensors = fit.adapter(fitted)
    config = dressed(config, sources, merge.sites)
    return config, in_dtype(tensors, sources) | named_in_file(whole, merge.sites), fitted, merge.notes


def _in_parameters(
    sources: Sequence[Source], base: Base, method: MergeMethod, settings: Settings, options: Options
) -> _Made:
    tensors, notes = merge_parameters(sources, base, method, settings, options.seed)
    return replace(sources[0].config, inference_mode=True), tensors, {}, notes


def _check_names(model: PeftModel, adapters: Sequence[str], new: str | None) -> None:
    if isinstance(adapters, str) or not adapters:
        raise ValueError(f"`adapters` must be a list of names, but got {adapters!r}.")
    if unknown := [name for name in adapters if name not in model.peft_config]:
        raise ValueError(f"The model has no adapters {unknown}; it has {[*model.peft_config]}.")
    if len(set(adapters)) < len(adapters):
        raise ValueError(f"Each adapter can be merged once, but got {list(adapters)}: use `weights`.")
    if new in model.peft_config:
        raise ValueError(f"The model has an adapter {new!r} already: choose another `adapter_name`.")


def _weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    weights = [1.0] * count if weights is None else weights
    if len(weights) != count:
        raise ValueError(f"Each of the {count} adapters needs one weight, but got {weights=}.")
    return tuple(map(float, weights))


def _own_type(host: PeftConfig, rank: Rank) -> PeftConfig | None:
    """The type of a result that is put into a model: PEFT allows one type in a model."""
    if host.peft_type == PeftType.LORA:
        return None
    kind = host.peft_type.value
    if not can_fit(host) or rank is not None:
        raise ValueError(
            f"A model with adapters of type {kind} cannot hold a LoRA beside them. Give an `output_dir` to write the "
            "result to"
            + (f", or no `rank` for a result of type {kind}." if can_fit(host) else ", or use space='parameters'.")
        )
    return replace(host, target_modules=None, layers_to_transform=None, modules_to_save=None)


def _is_share(rank: Any) -> bool:
    return isinstance(rank, float) and 0 < rank < 1
