"""Merging the fine-tuned models: recipes on saved checkpoints, coefficients chosen on the validation images."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean

from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from hf_modular.checkpoints import WEIGHTS
from hf_modular.demo.digits import Part
from hf_modular.demo.training import calm, is_correct, share
from hf_modular.merging import (
    DAREConfig,
    LinearConfig,
    MergeMethod,
    MergeRecipe,
    TaskArithmeticConfig,
    merge,
    merge_state_dicts,
)

SCALES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6, 1.0)


@dataclass(frozen=True)
class Plan:
    """One way to merge, and the settings to choose from."""

    name: str
    folder: str
    candidates: Sequence[MergeMethod]
    random: bool = False  # the seed moves the result: it is run with several


PLANS = (
    Plan("merge: average", "average", [LinearConfig()]),
    Plan("merge: task arithmetic", "task-arithmetic", [TaskArithmeticConfig(scale=s) for s in SCALES]),
    Plan("merge: DARE, p=0.9", "dare", [DAREConfig(drop=0.9, scale=s) for s in SCALES], random=True),
)


@dataclass(frozen=True)
class Merged:
    """What came of a plan."""

    chosen: MergeMethod
    tried: list[float]  # mean validation accuracy of each candidate
    correct: list[dict[str, Tensor]]  # per seed: task -> (test images,), bool
    seconds: float  # of one merge, CPU time


@dataclass(frozen=True)
class Bench:
    """The base, the models that were fine-tuned from it, and the images to judge a merge by."""

    base: Path
    models: Sequence[Path]
    val: Mapping[str, Part]  # per task
    test: Mapping[str, Part]

    def carry_out(self, plan: Plan, output: Path, seeds: Sequence[int]) -> Merged:
        """Choose the coefficient, merge by it with every seed, keep the first result, and evaluate them all."""
        seeds = seeds if plan.random else seeds[:1]
        with calm():
            tried = [self._validate(candidate, seeds) for candidate in plan.candidates]
            chosen = plan.candidates[tried.index(max(tried))]
            started = time.process_time()
            self._merge(chosen, output, seeds[0])
            seconds = time.process_time() - started
            correct = [self._test(output), *(self._merge_and_test(chosen, seed) for seed in seeds[1:])]
        return Merged(chosen, tried, correct, seconds)

    def _validate(self, candidate: MergeMethod, seeds: Sequence[int]) -> float:
        """Mean accuracy over tasks and seeds, the weights staying in memory."""
        base, *models = self._weights
        base_or_none = None if candidate.base_model == "unused" else base
        accuracies = []
        for seed in seeds:
            merged = merge_state_dicts(base_or_none, models, candidate, seed=seed)
            model = ViTForImageClassification.from_pretrained(None, config=self._config, state_dict=merged)
            accuracies += [share(is_correct(model, part)) for part in self.val.values()]
        return fmean(accuracies)

    @cached_property
    def _weights(self) -> list[dict[str, Tensor]]:
        """As they are in the files, the base's first: random masks depend on a tensor's name."""
        return [load_file(folder / WEIGHTS) for folder in (self.base, *self.models)]

    @cached_property
    def _config(self) -> ViTConfig:
        return ViTConfig.from_pretrained(self.base)

    def _merge(self, chosen: MergeMethod, output: Path, seed: int) -> None:
        base = None if chosen.base_model == "unused" else self.base
        merge(MergeRecipe.of(chosen, self.models, base), output, seed=seed, progress=False)

    def _merge_and_test(self, chosen: MergeMethod, seed: int) -> dict[str, Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            self._merge(chosen, Path(folder) / "merged", seed)
            return self._test(Path(folder) / "merged")

    def _test(self, folder: Path) -> dict[str, Tensor]:
        model = AutoModelForImageClassification.from_pretrained(folder)
        return {task: is_correct(model, part) for task, part in self.test.items()}
