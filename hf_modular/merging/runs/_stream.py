"""Merging checkpoints that need not fit in memory, from folders and repositories into a folder.

Everything that can be wrong is looked for in headers and settings before a weight is read, and reported together.
"""

import time
import warnings
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_modular.checkpoints import CheckpointWriter
from hf_modular.merging._method import Parts
from hf_modular.merging.engine._preflight import refuse
from hf_modular.merging.engine._processes import Processes, processes
from hf_modular.merging.engine._workers import Pool, Workers
from hf_modular.merging.recipes._recipe import MergeRecipe
from hf_modular.merging.runs._checks import problems
from hf_modular.merging.runs._crew import crew
from hf_modular.merging.runs._job import Job, opened
from hf_modular.merging.runs._one_by_one import one_by_one
from hf_modular.merging.runs._report import MergeReport

if TYPE_CHECKING:
    from hf_modular.merging.runs._plan import MergePlan


def merge(
    recipe: str | Path | Mapping[str, object] | MergeRecipe,
    output_dir: str | Path,
    *,
    seed: int | None = None,
    device: str = "cpu",
    workers: int | None = None,
    progress: bool = True,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    hashes: bool = True,
    resume: bool = False,
    verify: bool = False,
) -> MergeReport:
    """Merge checkpoints into a folder that transformers loads.

    Where `accelerate launch --multi_gpu --num_processes N -m hf_modular.cli merge ...` has started several processes
    (on CPUs too), or `torchrun` or MPI, each merges a part of the tensors; the result is the same.

    Args:
        recipe: A recipe file, or what it would hold.
        output_dir: A folder that is absent or empty. Until the merge is complete there is no checkpoint in it.
        seed: For methods that draw random numbers; the recipe's by default.
        device: Where the arithmetic is done: "cpu", "cuda", "cuda:1", ...
        workers: How many work at a time; as many as there are cores by default. They are processes, started by
            `fork`, where threads would wait for each other, else threads. The result is the same.
        progress: Show a progress bar on a terminal.
        overwrite: Replace a checkpoint that is in the folder. Other files in it stay.
        max_shard_size: The largest file of weights, such as "5GB".
        hashes: Note the SHA-256 of all files of weights in the report.
        resume: Go on where the same merge was killed, if it was; the result is the same. The recipe, the versions,
            the shard size and the input files (by size, time of change and header) must be too.
        verify: Read the result again before it is made visible: compute a sample of tensors anew, load the model in
            transformers if it fits in memory, and compare it with the adapter that it was made of, if it was. What is
            not as it must be is an error, and then nothing is kept. The command line does it by default.

    Returns:
        What was done. It is saved in the folder as `merge_report.json`, beside `merge_recipe.yaml`, which gives the
        same result bit for bit.
    """
    started = time.perf_counter()
    recipe = _with_seed(MergeRecipe.load(recipe), seed)
    with ExitStack() as stack:
        ranks = processes()
        job = Job(recipe, opened(recipe, stack), ranks.device(_device(device)))
        ranks.together(lambda: refuse(problems(job, Path(output_dir), overwrite=overwrite, resume=resume)))
        if parts := job.method.one_by_one:
            given: Any = {"device": device, "workers": workers, "progress": progress, "overwrite": overwrite}
            given |= {"max_shard_size": max_shard_size, "hashes": hashes, "resume": resume, "verify": verify}
            run = partial(merge, **given)
            return _run_parts(job, parts, Path(output_dir), run, ranks, hashes=hashes, resume=resume, started=started)
        options = {
            "max_shard_size": max_shard_size,
            "overwrite": overwrite,
            "identity": job.identity,
            "resume": resume,
        }
        writer = CheckpointWriter(output_dir, job.plan, join=not ranks.first, **options)  # type: ignore[arg-type]
        finished = _entered(writer, stack, ranks)
        if not writer.committed:
            # after the writer: ends before the files are closed
            pool = stack.enter_context(crew(job.engines, job.sources.values(), workers, ranks.local_count))
            notes = ranks.together(lambda: _run(job, writer, pool, ranks, finished, progress=progress))
            finish = partial(_finish, job, hashes=hashes, verified=verify, started=started)
            ranks.together(lambda: finish(writer, pool, ranks, notes))
    report = MergeReport.load(output_dir)
    for note in report.notes if ranks.first else []:
        warnings.warn(note, stacklevel=2)
    return report


def plan_merge(
    recipe: str | Path | Mapping[str, object] | MergeRecipe,
    output_dir: str | Path,
    *,
    seed: int | None = None,
    device: str = "cpu",
    workers: int | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
) -> "MergePlan":
    """What `merge` would do with the same arguments: sizes, memory and time. Nothing is written.

    All that would stop the merge before it reads weights is an error here, too.
    """
    from hf_modular.merging.runs._plan import make_plan

    recipe = _with_seed(MergeRecipe.load(recipe), seed)
    with ExitStack() as stack:
        job = Job(recipe, opened(recipe, stack), _device(device))
        refuse(problems(job, Path(output_dir), overwrite=overwrite, resume=False))
        return make_plan(
            job.engines,
            [*job.sources.values()],
            notes=job.notes,
            workers=workers,
            max_shard_size=max_shard_size,
            one_by_one=job.method.one_by_one is not None,
        )


def _with_seed(recipe: MergeRecipe, seed: int | None) -> MergeRecipe:
    return recipe if seed is None else MergeRecipe.load(recipe.model_dump(exclude_unset=True) | {"seed": seed})


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"`device` must be such as 'cpu' or 'cuda', but got {name!r}: {error}") from None


def _entered(writer: CheckpointWriter, stack: ExitStack, ranks: Processes) -> set[str]:
    """Open the output, in the first process before the others; returns what an earlier run has finished."""
    [(finished, committed), *_] = ranks.together(
        lambda: (stack.enter_context(writer).finished, writer.committed) if ranks.first else (set(), False)
    )
    writer.committed = committed
    if not committed:
        ranks.together(lambda: None if ranks.first else stack.enter_context(writer) and None)
    return finished


def _run(
    job: Job, writer: CheckpointWriter, pool: Pool, ranks: Processes, finished: Container[str], *, progress: bool
) -> list[str]:
    """Merge this process's part of what is not finished; returns what was noted on the way."""
    from huggingface_hub.utils.tqdm import tqdm

    left = {name: tensor.nbytes for name, tensor in job.plan.items() if name not in finished}
    mine = ranks.share(left)
    total, quiet = sum(left[name] for name in mine), not (progress and ranks.first)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Merging", disable=quiet or None) as bar:

        def written(name: str, size: int) -> None:
            writer.count(name, size)
            bar.update(size)

        for engine in job.engines:
            engine.run(writer, pool, written, only=mine)
    writer.sync()
    return [note for engine in job.engines for note in engine.notes]


def _finish(
    job: Job,
    writer: CheckpointWriter,
    pool: Pool,
    ranks: Processes,
    notes: Iterable[list[str]],
    *,
    hashes: bool,
    verified: bool,
    started: float,
) -> None:
    """Add to the weights what belongs beside them and make all visible; the first process does it."""
    if not ranks.first:
        return
    job.engines[0].notes.update(dict.fromkeys(note for noted in notes for note in noted))
    job.add_settings(writer.staging)
    report = job.report(writer.files, pool, hashes=hashes, started=started)
    if verified:
        report = replace(report, verification=_verified(job, writer))
    report.save(writer.staging)
    writer.commit()


def _verified(job: Job, writer: CheckpointWriter) -> dict[str, Any]:
    """Whether the files, which nobody sees yet, hold what they must."""
    from hf_modular.merging.runs._verify import Subject, verify

    writer.sync()
    writer.write_index()
    sources = job.reference, [*job.sources.values()]
    return verify(Subject(writer.staging, job.engines, *sources, seed=job.recipe.seed))


def _run_parts(
    job: Job,
    parts: Parts,
    output: Path,
    run: Callable[..., MergeReport],
    ranks: Processes,
    *,
    hashes: bool,
    resume: bool,
    started: float,
) -> MergeReport:
    """Take one model after the other, and report on the whole in the place of the last part."""
    state, last = one_by_one(job.pinned, job.method, parts, job.reference.weights, output, run, resume)
    with Workers(last.workers) as pool:
        report = job.report([], pool, hashes=hashes, started=started)
    facts = {"models": state.models, "steps": state.facts, **last.facts}
    report = replace(
        report,
        outputs=last.outputs,
        notes=[*dict.fromkeys([*report.notes, *last.notes])],
        facts=facts,
        verification=last.verification,
    )
    if ranks.first:
        job.add_settings(output)
        report.save(output)
    ranks.together(lambda: None)
    return report
