"""What a merge is made of, and what it says of itself: all that follows from a recipe and its open models."""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path

import torch

from hf_modular import merging
from hf_modular.checkpoints import TensorInfo
from hf_modular.merging._method import MergeMethod
from hf_modular.merging.assembly._assembly import Assembly, Part, assemble
from hf_modular.merging.assembly._settings_files import Beside, chat_template, config_changes, token_numbers
from hf_modular.merging.engine._companions import Companion, is_root, without
from hf_modular.merging.engine._engine import Engine
from hf_modular.merging.engine._preflight import refuse
from hf_modular.merging.engine._workers import Pool
from hf_modular.merging.recipes._recipe import MergeRecipe
from hf_modular.merging.recipes._settings import Resolved
from hf_modular.merging.runs._configs import beside_notes, config_notes
from hf_modular.merging.runs._descent import distances, strangers
from hf_modular.merging.runs._report import RECIPE, MergeReport, describe, peak_memory, versions
from hf_modular.merging.sources._sources import Source, open_source


@dataclass(frozen=True, eq=False)
class Job:
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


def opened(recipe: MergeRecipe, stack: ExitStack) -> dict[str, Source]:
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


def _glance(file: Path) -> list[object]:
    status = file.stat()
    with file.open("rb") as stream:
        header = stream.read(int.from_bytes(stream.read(8), "little"))
    return [file.name, status.st_size, status.st_mtime_ns, sha256(header).hexdigest()]


def _code_notes(source: Source) -> list[str]:
    if "auto_map" not in source.config:
        return []
    return [f"the config of {source.reference} refers to Python files (`auto_map`), which are not copied"]
