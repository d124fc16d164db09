"""Whether what lies on the disk is what was meant: checked before a merge makes its result visible.

A sample of tensors is computed again, in memory and from whole tensors, and must have the same bits. The checkpoint
must load in transformers with no name missing or left over. And where the result is one model with one adapter, it
must answer as the model with the adapter does; both run in fp32, so that what differs is the rounding of the weights.
"""

import gc
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hf_modular.checkpoints import Checkpoint, TensorInfo
from hf_modular.merging._method import Stack
from hf_modular.merging.engine._engine import Engine, Inputs
from hf_modular.merging.engine._preflight import listed
from hf_modular.merging.engine._workers import Workers
from hf_modular.merging.runs._memory import InMemory, Merged
from hf_modular.merging.runs._report import VerificationError
from hf_modular.merging.runs._sampled import infos, part_of, sample
from hf_modular.merging.sources._sources import Source, read_object

_NUMBER = re.compile(r"\d+")
_TENSORS = 24  # that are computed again
_ELEMENTS = 1 << 24  # of them together, in each model
_PROBES, _TOKENS = 4, 16  # inputs, and the length of a text
_SHARE = 0.5  # of the free memory that a loaded model may take

# the result's dtype -> how far outputs may be apart, as a share of the largest, and how far predictions, in nats
TOLERANCES = {
    torch.float64: (1e-4, 1e-5),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (2e-2, 1e-3),
    torch.bfloat16: (1e-1, 1e-2),
}
_LOST = 0.5  # of what the adapter does to the outputs may be lost by rounding
_NOISE = 1e-5  # of the largest output: what an adapter does must be more, to be looked for
_QUANTISED = (2e-1, 5e-2)  # where the base is a quantised model, which rounds what goes through its layers


@dataclass(frozen=True)
class Subject:
    """What is verified.

    Args:
        folder: The complete checkpoint.
        engines: What made it.
        reference: The model that it is shaped after.
        sources: All models.
    """

    folder: Path
    engines: Sequence[Engine]
    reference: Source
    sources: Sequence[Source]
    seed: int

    @cached_property
    def adapted(self) -> Source | None:
        """The model with an adapter that the result must be equal to, if it is made of that alone."""
        [source, *others] = self.sources
        if others or source.parts is None or len(self.engines) > 1 or self.engines[0].models != [source]:
            return None
        return source if _keeps_one_model(self.engines[0]) else None


@dataclass
class Verification:
    """What was found.

    Args:
        figures: By the name of the check.
        skipped: What was not checked, and why.
        failures: What was not as it must be.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {**self.figures, **({"skipped": self.skipped} if self.skipped else {})}


def verify(subject: Subject) -> dict[str, Any]:
    """Check a result; returns the figures.

    Raises:
        VerificationError: If the result is not what it must be; the message has the figures.
    """
    found = Verification()
    with Checkpoint(subject.folder) as written:
        _check_sample(subject, written, found)
    if (subject.folder / "config.json").is_file():
        _check_model(subject, found)
    else:
        found.skipped.append("loading: there is no config.json")
    if found.failures:
        raise VerificationError(
            "the result is not what it must be, and was not kept:\n" + "\n".join(f"  - {f}" for f in found.failures)
        )
    return found.to_dict()


def _keeps_one_model(engine: Engine) -> bool:
    """Whether the method makes of a single model that model."""
    numbers = torch.linspace(-2, 3, 7)
    for resolved in {repr(settings): settings for settings in engine.settings.values()}.values():
        stack = Stack(
            "", numbers, numbers[None], torch.tensor(resolved.weights), has_base=False, settings=resolved.each
        )
        if resolved.method.surveys == "model" or not torch.equal(resolved.method.merge(stack, None), numbers):
            return False
    return True


# ---- a sample of tensors, computed again


def _check_sample(subject: Subject, written: Checkpoint, found: Verification) -> None:
    sizes = {name: info.numel for engine in subject.engines for name, info in infos(engine).items()}
    names = sample(sizes, subject.seed, _ELEMENTS, _TENSORS)
    differing, compared = [], 0
    for engine in subject.engines:
        mine = [name for name in names if name in engine.plan]
        surveyed = engine.method.surveys == "model"
        if surveyed and sum(sizes[name] for name in engine.plan) > _ELEMENTS:
            found.skipped.append(f"computing tensors again: {engine.method.name!r} looks at the whole model")
            continue
        if surveyed:
            mine = [*engine.plan]
        again = _computed_again(engine, mine) if mine else {}
        compared += len(again)
        differing += [name for name in again if not _same(again[name], written.read(name), engine.device)]
    found.figures["tensors_compared"] = compared
    if differing:
        found.failures.append(f"of {compared} tensors that were computed again, differing are {listed(differing)}")


def _computed_again(engine: Engine, names: Collection[str]) -> dict[str, Tensor]:
    """Some tensors of the result from whole tensors in memory."""
    again = part_of(engine, names, _in_memory, torch.device("cpu"))
    merged = Merged({name: torch.empty(info.shape, dtype=info.dtype) for name, info in infos(again).items()})
    with Workers(1) as pool:
        again.run(merged, pool, lambda name, size: None)
    return merged.tensors


def _in_memory(model: Inputs, plan: Mapping[str, TensorInfo]) -> InMemory:
    return InMemory(model.reference, {name: _read(model, name, info.shape) for name, info in plan.items()})


def _read(model: Inputs, name: str, shape: Sequence[int]) -> Tensor:
    """A whole tensor; by the safetensors library if it is stored as it is."""
    weights = getattr(model, "weights", None)
    if type(weights) is Checkpoint and name in weights.tensors:
        with safe_open(weights.tensors[name].file, "pt") as file:
            return file.get_tensor(name)
    dtype = model.tensors[name].dtype
    wide = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
    out = torch.empty(tuple(shape), dtype=wide)
    model.fill(name, 0, out.view(-1))
    return out


def _same(one: Tensor, other: Tensor, device: torch.device) -> bool:
    """Whether they have the same bits, or if an accelerator made one of them, nearly the same numbers."""
    if device.type != "cpu" and one.is_floating_point():
        return torch.allclose(one.float(), other.float(), rtol=4 * torch.finfo(one.dtype).eps, atol=1e-6)
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


# ---- loading, and answers


def _check_model(subject: Subject, found: Verification) -> None:
    config = read_object(subject.folder / "config.json")
    import transformers

    names = config.get("architectures") or [None]
    kind = getattr(transformers, str(names[0]), None)
    if kind is None:
        found.skipped.append(f"loading: transformers has no class {names[0]}")
        return
    numbers = sum(info.numel for engine in subject.engines for info in infos(engine).values())
    if (need := 4 * numbers) > (room := int(_SHARE * free_memory())):
        found.skipped.append(
            f"loading: it takes {need / 1e9:.1f} GB in fp32, and there is room for {room / 1e9:.1f} GB"
        )
        return
    with _quiet():
        wanted = _adapter_answers(subject.adapted, found) if subject.adapted else None
        model, info = kind.from_pretrained(subject.folder, dtype=torch.float32, output_loading_info=True, **_STRICT)
        _check_names(info, subject.reference, found)
        if wanted is not None and subject.adapted is not None:
            answering = type(model).__name__ == subject.adapted.about["adapter"]["model_class"]
            model = (
                model
                if answering
                else _other_class(subject.adapted).from_pretrained(subject.folder, dtype=torch.float32, **_STRICT)
            )
            _compare(subject, wanted, _answers(model), found)


_STRICT: dict[str, Any] = {"trust_remote_code": False, "use_safetensors": True}


def _check_names(info: Mapping[str, Any], reference: Source, found: Verification) -> None:
    """What is missing or left over must be so in the reference model, too."""
    known = reference.weights.tensors.keys()
    kinds = {_NUMBER.sub("#", name) for name in known}  # a stack has layers that the reference has not
    missing = [name for name in sorted(info["missing_keys"]) if _NUMBER.sub("#", name) in kinds]
    unexpected = [name for name in sorted(info["unexpected_keys"]) if name not in known]
    mismatched = sorted(map(str, info["mismatched_keys"]))
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched)):
        if names:
            found.failures.append(f"transformers finds {listed(names)} {what} when it loads the result")
    found.figures["loads"] = True
    if others := (set(info["missing_keys"]) | set(info["unexpected_keys"])) - {*missing, *unexpected}:
        found.figures["missing_or_unexpected_as_in_the_reference"] = sorted(others)


def _adapter_answers(adapted: Source, found: Verification) -> tuple[list[Tensor], list[Tensor]] | None:
    """What the base answers with the adapter and without; None if it cannot be asked."""
    import transformers
    from peft import PeftModel

    base, folder = adapted.parts  # type: ignore[misc]
    changes = {key: value for key, value in adapted.changes.items() if key in ("vocab_size", "id2label", "label2id")}
    try:
        config = transformers.AutoConfig.from_pretrained(base.folder, trust_remote_code=False, **changes)
        model = _other_class(adapted).from_pretrained(
            base.folder, config=config, dtype=torch.float32, ignore_mismatched_sizes=bool(changes), **_STRICT
        )
        model = PeftModel.from_pretrained(model, folder)
        answers = _answers(model)
        with model.disable_adapter():
            return answers, _answers(model)
    except (ValueError, TypeError, RuntimeError, ImportError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        found.skipped.append(f"answers: the base with the adapter could not be run ({type(error).__name__}: {reason})")
        return None
    finally:
        gc.collect()


def _other_class(adapted: Source) -> Any:
    import transformers

    return getattr(transformers, adapted.about["adapter"]["model_class"])


@torch.no_grad()
def _answers(model: Any) -> list[Tensor]:
    """The first output on each probe, in fp32."""
    model.eval()
    outputs = (model(**probe) for probe in _probes(model))
    return [(out.logits if "logits" in out else out[0]).float() for out in outputs]


def _probes(model: Any) -> Iterator[dict[str, Tensor]]:
    """Inputs, one sample each: random tokens, or random pixels."""
    rng = torch.Generator().manual_seed(0)
    name, config = model.main_input_name, model.config
    for _ in range(_PROBES):
        if name == "pixel_values":
            size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
            yield {name: torch.randn(1, getattr(config, "num_channels", 3), size, size, generator=rng)}
        elif name == "input_ids":
            count = model.get_input_embeddings().weight.shape[0]
            tokens = torch.randint(count, (1, _TOKENS), generator=rng)
            yield {name: tokens, **({"decoder_input_ids": tokens} if config.is_encoder_decoder else {})}
        else:
            raise ValueError(f"there are no probes for a model that takes {name!r}")


def _compare(
    subject: Subject, wanted: tuple[list[Tensor], list[Tensor]], got: Sequence[Tensor], found: Verification
) -> None:
    """Largest difference, KL divergence of the predictions, and how often the first choice is the same."""
    dtypes = [info.dtype for engine in subject.engines for info in infos(engine).values() if info.dtype in TOLERANCES]
    coarsest = max(dtypes, key=lambda dtype: TOLERANCES[dtype][0])
    quantised = subject.adapted is not None and "quantised_by" in subject.adapted.about
    far, diverging = _QUANTISED if quantised else TOLERANCES[coarsest]
    with_adapter, without = wanted
    figures, largest = compare(with_adapter, got), float(max(answer.abs().max() for answer in with_adapter))
    figures |= {"adapter_effect": compare(with_adapter, without)["largest_difference"]}
    figures |= {"tolerance": far * largest, "kl_tolerance": diverging}
    found.figures["adapter"] = figures
    apart, effect = figures["largest_difference"], figures["adapter_effect"]
    if not (apart <= figures["tolerance"] and figures["kl"] <= diverging):
        found.failures.append(
            "the merged model must answer as the model with the adapter, but their outputs differ by up to "
            f"{apart:.3g} (tolerance {figures['tolerance']:.3g}), with a KL divergence of "
            f"{figures['kl']:.3g} (tolerance {diverging:g}) and the same first choice for {figures['top1']:.1%}"
        )
    elif effect > _NOISE * largest and apart > _LOST * effect:
        found.failures.append(
            f"the adapter changes outputs by up to {effect:.3g}, but the merged model is {apart:.3g} away from that: "
            f"what the adapter does is lost in {str(coarsest).removeprefix('torch.')}; choose a wider `dtype`"
        )


def compare(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> dict[str, float]:
    """How far outputs are apart."""
    one, other = (torch.cat([each.reshape(-1, each.shape[-1]) for each in those]).double() for those in (wanted, got))
    there, here = one.log_softmax(-1), other.log_softmax(-1)
    kl = (there.exp() * (there - here)).sum(-1).mean()
    return {
        "largest_difference": float((one - other).abs().max()),
        "kl": float(kl),
        "top1": float((one.argmax(-1) == other.argmax(-1)).double().mean()),
    }


def free_memory() -> int:
    """Bytes that can be had without writing other memory to the disk."""
    import psutil  # type: ignore[import-untyped]  # what peft needs, too

    return int(psutil.virtual_memory().available)


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no reports of transformers; what matters of them is checked."""
    import warnings

    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
