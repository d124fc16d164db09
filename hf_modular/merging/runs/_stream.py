"""Merging checkpoints that need not fit in memory, from folders and repositories into a folder.

Everything that can be wrong is looked for in headers and settings before a weight is read, and reported together.
"""

import json
import time
import warnings
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from shutil import disk_usage
from typing import TYPE_CHECKING, Any

import torch

from hf_modular import merging
from hf_modular.checkpoints import CheckpointWriter, TensorInfo, refuse_occupied
from hf_modular.merging._method import MergeMethod, Parts
from hf_modular.merging.assembly._assembly import Assembly, Part, assemble
from hf_modular.merging.assembly._settings_files import Beside, chat_template, config_changes, token_numbers
from hf_modular.merging.engine._companions import Companion, companion_problems, is_root, without
from hf_modular.merging.engine._engine import Engine
from hf_modular.merging.engine._preflight import disagreements, refuse, setting_problems, unmergeable
from hf_modular.merging.engine._processes import Processes, processes
from hf_modular.merging.engine._workers import Pool, Workers
from hf_modular.merging.recipes._recipe import MergeRecipe
from hf_modular.merging.recipes._settings import Resolved
from hf_modular.merging.runs._configs import beside_notes, config_notes, layout_problems
from hf_modular.merging.runs._crew import crew
from hf_modular.merging.runs._descent import distances, strangers
from hf_modular.merging.runs._one_by_one import one_by_one
from hf_modular.merging.runs._report import RECIPE, MergeReport, describe, peak_memory, versions
from hf_modular.merging.sources._sources import Source, open_source

if TYPE_CHECKING:
    from hf_modular.merging.runs._plan import MergePlan

_MARGIN = 1 << 24  # bytes of disk space for everything but weights


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
        job = _Job(recipe, _opened(recipe, stack), ranks.device(_device(device)))
        ranks.together(lambda: refuse(job.problems(Path(output_dir), overwrite=overwrite, resume=resume)))
        if parts := job.method.one_by_one:
            given: Any = {"device": device, "workers": workers, "progress": progress, "overwrite": overwrite}
            given |= {"max_shard_size": max_shard_size, "hashes": hashes, "resume": resume, "verify": verify}
            run = partial(merge, **given)
            return job.run_parts(parts, Path(output_dir), run, ranks, hashes=hashes, resume=resume, started=started)
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
            notes = ranks.together(lambda: job.run(writer, pool, ranks, finished, progress=progress))
            finish = partial(job.finish, hashes=hashes, verified=verify, started=started)
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
        job = _Job(recipe, _opened(recipe, stack), _device(device))
        refuse(job.problems(Path(output_dir), overwrite=overwrite, resume=False))
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


def _entered(writer: CheckpointWriter, stack: ExitStack, ranks: Processes) -> set[str]:
    """Open the output, in the first process before the others; returns what an earlier run has finished."""
    [(finished, committed), *_] = ranks.together(
        lambda: (stack.enter_context(writer).finished, writer.committed) if ranks.first else (set(), False)
    )
    writer.committed = committed
    if not committed:
        ranks.together(lambda: None if ranks.first else stack.enter_context(writer) and None)
    return finished


@dataclass(frozen=True, eq=False)
class _Job:
    """A recipe and its open models."""

    recipe: MergeRecipe
    sources: Mapping[str, Source]
    device: torch.device

    @cached_property
    def reference(self) -> Source:
        return self.sources[self.recipe.reference_model]

    @cached_property
    def models(self) -> list[Source]:
        """The base, if there is one, and all models that are merged."""
        columns = (column for section in self.recipe.sections for column in (section.base, *section.models))
        return [self.sources[name] for name in dict.fromkeys(column.model for column in columns if column)]

    @cached_property
    def method(self) -> MergeMethod:
        """The method with the recipe's settings, those of the first tensor if they vary."""
        return next((resolved.method for resolved in self.settings.values()), self.recipe.method)

    @cached_property
    def assembly(self) -> Assembly:
        return assemble(self.recipe, self.sources)

    @cached_property
    def plan(self) -> dict[str, TensorInfo]:
        """The tensors of the result."""
        return self.assembly.plan

    @cached_property
    def settings(self) -> dict[str, Resolved]:
        return {name: resolved for part in self.assembly.parts for name, resolved in part.settings.items()}

    @cached_property
    def engines(self) -> list[Engine]:
        """One for each part of the result."""
        return [
            Engine(
                plan=part.plan,
                settings=part.settings,
                method=part.method,
                base=part.base,
                models=part.models,
                carrier=part.carrier,
                seed=self.recipe.seed,
                device=self.device,
                companions=self.companions(part),
                arithmetic=torch.float64 if self.recipe.in_fp64 else torch.float32,
            )
            for part in self.assembly.parts
        ]

    def companions(self, part: Part) -> dict[str, list[Companion]]:
        """What there is beside the weights of a part's models."""
        if part.copied:
            return {}
        return {
            kind: [
                Companion(self.sources[name], part.plan, is_root(kind, self.sources[name].folder)) for name in names
            ]
            for kind, names in self.recipe.companions.items()
        }

    @cached_property
    def distances(self) -> dict[str, dict[str, float]]:
        """How far models are from the base, or else the first model, each as a part of that one's norm."""
        found: dict[str, dict[str, float]] = {}
        steps = self.recipe.merge_method in merging.PARTS  # whose state is no model
        for part in [] if steps else self.assembly.parts:
            origin = part.base or part.models[0]
            apart = found.setdefault(origin.reference, {})
            for model, distance in distances(origin, part.models, part.plan).items():
                apart[model] = max(distance, apart.get(model, 0.0))
        return found

    @property
    def notes(self) -> list[str]:
        """What was decided and may surprise."""
        engines = self.engines
        return [
            *(note for source in self.sources.values() for note in source.notes),
            *self.assembly.notes,
            *(note for origin, apart in self.distances.items() for note in strangers(origin, apart)),
            *dict.fromkeys(note for engine in engines for note in engine.notes),
            *(note for engine in engines for note in without(engine.plan, engine.companions)),
            *config_notes(self.reference, self.models),
            *beside_notes(self.beside, self.models, chosen=self.recipe.chat_template is not None),
            *_code_notes(self.reference),
        ]

    @cached_property
    def identity(self) -> str:
        """All that the result depends on: the recipe, the software, and the input files as far as a glance shows."""
        files = [file for source in self.sources.values() for file in source.weights.files]
        return json.dumps([self.pinned.model_dump(mode="json"), versions(), [_glance(file) for file in files]])

    def problems(self, output: Path, *, overwrite: bool, resume: bool) -> Iterator[str]:
        """All that can be known to be wrong before a weight is read."""
        yield from _output_problems(output, self.sources.values(), overwrite=overwrite or resume)
        state = 2 * 4 * sum(tensor.numel for tensor in self.plan.values()) if self.method.one_by_one else 0
        yield from _space_problems(output, state + sum(tensor.nbytes for tensor in self.plan.values()))
        yield from _device_problems(self.device)
        yield from _config_problems({source.reference: source for source in (self.reference, *self.models)}.values())
        yield from layout_problems(self.reference, self.models)
        yield from (problem for source in self.sources.values() for problem in source.problems)
        yield from self.assembly.problems
        yield from _refusals(lambda: self.beside)
        for part in self.assembly.parts:
            for model in part.models:  # some of which may be other layers of one
                yield from disagreements(part.reference, {model.reference: model.tensors})
        for source in self.sources.values():
            yield from unmergeable(source.tensors, source.reference)
        if self.recipe.state and not self.method.one_by_one:
            yield f"{self.recipe.merge_method!r} takes all models at once and keeps no state: remove the key `state`"
        yield from self.setting_problems()

    def setting_problems(self) -> Iterator[str]:
        sections = self.recipe.sections
        if _surveys_model(self.recipe.method) and (len(sections) > 1 or sections[0].settings.vary):
            yield f"{self.recipe.merge_method!r} looks at the whole model: its settings must be alike for all tensors"
            return
        for engine in self.engines:
            yield from setting_problems(engine.settings, len(engine.models), engine.base is not None)
            yield from companion_problems(engine.method, engine.plan, len(engine.models), engine.companions)

    def run_parts(
        self,
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
        state, last = one_by_one(self.pinned, self.method, parts, self.reference.weights, output, run, resume)
        with Workers(last.workers) as pool:
            report = self.report([], pool, hashes=hashes, started=started)
        facts = {"models": state.models, "steps": state.facts, **last.facts}
        report = replace(
            report,
            outputs=last.outputs,
            notes=[*dict.fromkeys([*report.notes, *last.notes])],
            facts=facts,
            verification=last.verification,
        )
        if ranks.first:
            self.add_settings(output)
            report.save(output)
        ranks.together(lambda: None)
        return report

    def run(
        self, writer: CheckpointWriter, pool: Pool, ranks: Processes, finished: Container[str], *, progress: bool
    ) -> list[str]:
        """Merge this process's part of what is not finished; returns what was noted on the way."""
        from huggingface_hub.utils.tqdm import tqdm

        left = {name: tensor.nbytes for name, tensor in self.plan.items() if name not in finished}
        mine = ranks.share(left)
        total, quiet = sum(left[name] for name in mine), not (progress and ranks.first)
        with tqdm(total=total, unit="B", unit_scale=True, desc="Merging", disable=quiet or None) as bar:

            def written(name: str, size: int) -> None:
                writer.count(name, size)
                bar.update(size)

            for engine in self.engines:
                engine.run(writer, pool, written, only=mine)
        writer.sync()
        return [note for engine in self.engines for note in engine.notes]

    def finish(
        self,
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
        self.engines[0].notes.update(dict.fromkeys(note for noted in notes for note in noted))
        self.add_settings(writer.staging)
        report = self.report(writer.files, pool, hashes=hashes, started=started)
        if verified:
            report = replace(report, verification=self.verify(writer))
        report.save(writer.staging)
        writer.commit()

    def verify(self, writer: CheckpointWriter) -> dict[str, Any]:
        """Whether the files, which nobody sees yet, hold what they must."""
        from hf_modular.merging.runs._verify import Subject, verify

        writer.sync()
        writer.write_index()
        sources = self.reference, [*self.sources.values()]
        return verify(Subject(writer.staging, self.engines, *sources, seed=self.recipe.seed))

    def add_settings(self, folder: Path) -> None:
        """Write what the model needs beside its weights, and the recipe with the commits that were read."""
        self.beside.save(folder)
        (folder / RECIPE).write_text(self.pinned.to_yaml(), "utf-8")

    @cached_property
    def beside(self) -> Beside:
        """What belongs beside the weights: special tokens have the numbers that the tokenizer gives them."""
        recipe, reference = self.recipe, self.reference.folder
        tokenizer = self.sources[recipe.tokenizer_model].processing
        other = tokenizer != reference
        return Beside(
            model=reference,
            tokenizer=tokenizer,
            config=self.reference.changes
            | config_changes(self.reference.config, recipe.result_dtype)
            | self.assembly.config
            | (token_numbers(tokenizer, generation=False) if other else {}),
            generation=token_numbers(tokenizer, generation=True) if other else {},
            chat_template=chat_template(recipe.chat_template, {s.reference: s.processing for s in self.models}),
            united=self.assembly.tokenizer,
        )

    @cached_property
    def pinned(self) -> MergeRecipe:
        return self.recipe.renamed({reference: source.pinned for reference, source in self.sources.items()})

    def report(self, weights: Sequence[Path], pool: Pool, *, hashes: bool, started: float) -> MergeReport:
        """What was done; `weights` are the files of the result."""
        files = [*dict.fromkeys(file for source in self.sources.values() for file in source.weights.files), *weights]
        described = dict(zip(files, pool.map(partial(describe, hashes=hashes), files), strict=True))
        inputs = [
            {"model": source.pinned, "files": {f.name: described[f] for f in source.weights.files}, **source.about}
            for source in self.sources.values()
        ]
        return MergeReport(
            merge_method=self.recipe.method.name,
            recipe=self.pinned.model_dump(exclude_defaults=True),
            seed=self.recipe.seed,
            inputs=inputs,
            outputs={file.name: described[file] for file in weights},
            tensors=len(self.plan),
            parameters=sum(tensor.numel for tensor in self.plan.values()),
            bytes_written=sum(tensor.nbytes for tensor in self.plan.values()),
            seconds=time.perf_counter() - started,
            peak_memory=peak_memory() + pool.memory,
            workers=pool.count,
            device=str(self.device),
            notes=self.notes,
            distances=self.distances,
            facts={key: fact for engine in self.engines for key, fact in engine.facts.items()},
        )


def _opened(recipe: MergeRecipe, stack: ExitStack) -> dict[str, Source]:
    """All models of the recipe; what is wrong with any of them is reported together."""
    sources: dict[str, Source] = {}
    problems: list[Exception] = []
    for reference in recipe.references:
        try:
            sources[reference] = open_source(reference, recipe.base_precision, any_base=recipe.adapter_base == "any")
            stack.callback(sources[reference].weights.close)
        except (ValueError, FileNotFoundError) as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    refuse(str(problem) for problem in problems)
    return sources


def _refusals(step: Callable[[], object]) -> Iterator[str]:
    """What a step has against its inputs."""
    try:
        step()
    except ValueError as error:
        yield str(error)


def _glance(file: Path) -> list[object]:
    status = file.stat()
    with file.open("rb") as stream:
        header = stream.read(int.from_bytes(stream.read(8), "little"))
    return [file.name, status.st_size, status.st_mtime_ns, sha256(header).hexdigest()]


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"`device` must be such as 'cpu' or 'cuda', but got {name!r}: {error}") from None


def _surveys_model(method: MergeMethod) -> bool:
    return method.survey_scope == "model" and type(method).survey is not MergeMethod.survey


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


def _code_notes(source: Source) -> list[str]:
    if "auto_map" not in source.config:
        return []
    return [f"the config of {source.reference} refers to Python files (`auto_map`), which are not copied"]
