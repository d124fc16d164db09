"""All that can be wrong with a merge before it reads a weight, as headers and settings show it."""

from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from shutil import disk_usage

import torch

from hf_modular.checkpoints import refuse_occupied
from hf_modular.merging.engine._companions import companion_problems
from hf_modular.merging.engine._preflight import disagreements, setting_problems, unmergeable
from hf_modular.merging.runs._configs import layout_problems
from hf_modular.merging.runs._job import Job
from hf_modular.merging.sources._sources import Source

_MARGIN = 1 << 24  # bytes of disk space for everything but weights


def problems(job: Job, output: Path, *, overwrite: bool, resume: bool) -> Iterator[str]:
    """All that can be known to be wrong before a weight is read."""
    yield from _output_problems(output, job.sources.values(), overwrite=overwrite or resume)
    state = 2 * 4 * sum(tensor.numel for tensor in job.plan.values()) if job.method.one_by_one else 0
    yield from _space_problems(output, state + sum(tensor.nbytes for tensor in job.plan.values()))
    yield from _device_problems(job.device)
    yield from _config_problems({source.reference: source for source in (job.reference, *job.models)}.values())
    yield from layout_problems(job.reference, job.models)
    yield from (problem for source in job.sources.values() for problem in source.problems)
    yield from job.assembly.problems
    yield from _refusals(lambda: job.beside)
    for part in job.assembly.parts:
        for model in part.models:  # some of which may be other layers of one
            yield from disagreements(part.reference, {model.reference: model.tensors})
    for source in job.sources.values():
        yield from unmergeable(source.tensors, source.reference)
    if job.recipe.state and not job.method.one_by_one:
        yield f"{job.recipe.merge_method!r} takes all models at once and keeps no state: remove the key `state`"
    yield from _setting_problems(job)


def _setting_problems(job: Job) -> Iterator[str]:
    sections = job.recipe.sections
    if job.recipe.method.surveys == "model" and (len(sections) > 1 or sections[0].settings.vary):
        yield f"{job.recipe.merge_method!r} looks at the whole model: its settings must be alike for all tensors"
        return
    for engine in job.engines:
        yield from setting_problems(engine.settings, len(engine.models), engine.base is not None)
        yield from companion_problems(engine.method, engine.plan, len(engine.models), engine.companions)


def _refusals(step: Callable[[], object]) -> Iterator[str]:
    """What a step has against its inputs."""
    try:
        step()
    except ValueError as error:
        yield str(error)


def _output_problems(output: Path, sources: Iterable[Source], *, overwrite: bool) -> Iterator[str]:
    try:
        refuse_occupied(output, overwrite=overwrite)
    except ValueError as error:
        yield str(error)
    if any(output.resolve() == source.folder.resolve() for source in sources):
        yield f"the output folder must not be one of the models, but is {output}"


def _space_problems(output: Path, need: int) -> Iterator[str]:
    there = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if (free := disk_usage(there).free) < need + _MARGIN:
        yield f"the result takes {need:,} bytes, but {there} has only {free:,} free"


def _device_problems(device: torch.device) -> Iterator[str]:
    if device.type == "cuda" and not torch.cuda.is_available():
        yield f"device {str(device)!r} was asked for, but torch finds no CUDA device here"


def _config_problems(sources: Collection[Source]) -> Iterator[str]:
    kinds = {source.reference: str(source.config.get("model_type")) for source in sources if source.config}
    if len(set(kinds.values())) > 1:
        yield f"all models must be of one architecture, but their `model_type` are {kinds}"
    for source in sources:
        if quantization := source.config.get("quantization_config"):
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            yield f"{source.reference} is quantised ({method}) and cannot be merged: dequantise it first"
