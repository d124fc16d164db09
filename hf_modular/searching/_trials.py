"""The trials of a search, one line of JSON each, written as they end, so that a broken search goes on from there."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TRIALS = "trials.jsonl"


@dataclass(frozen=True)
class Trial:
    """One merge and what it was worth."""

    number: int
    settings: Mapping[str, Any]
    score: float | None  # None if the recipe cannot be merged
    seconds: float = 0.0  # of merging and evaluating
    refused: str = ""  # why it cannot be merged


@dataclass
class Trials:
    """Those of a search so far; `run` is what must be the same for a search to go on."""

    file: Path
    run: Mapping[str, Any]
    done: list[Trial] = field(default_factory=list)

    @classmethod
    def open(cls, file: Path, run: Mapping[str, Any]) -> "Trials":
        """With what an earlier run has done, if there was one."""
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            _append(file, {"search": run})
            return cls(file, run)
        first, *rest = _lines(file)
        if first != {"search": json.loads(json.dumps(run))}:
            raise ValueError(
                f"{file} is of a search with another recipe, space or seed: remove it, or choose another folder"
            )
        return cls(file, run, [Trial(**line) for line in rest])

    def known(self, number: int, settings: Mapping[str, Any]) -> Trial | None:
        """The trial of that number, or one of the same settings."""
        if number < len(self.done):
            trial = self.done[number]
            if dict(trial.settings) != dict(settings):
                raise ValueError(
                    f"line {number + 2} of {self.file} must have the settings that this search comes to, "
                    f"{dict(settings)}, but has others: another version has made it, or the evaluation does not give "
                    "the same numbers again; remove it, or choose another folder"
                )
            return trial
        return next((trial for trial in self.done if dict(trial.settings) == dict(settings)), None)

    def add(self, trial: Trial) -> None:
        if trial.number >= len(self.done):
            self.done.append(trial)
            _append(self.file, asdict(trial))


def best_of(trials: Sequence[Trial], maximize: bool) -> Trial:
    """The best, of equals the first."""
    scored = [trial for trial in trials if trial.score is not None]
    if not scored:
        raise ValueError(f"none of {len(trials)} trials could be merged; the first: {trials[0].refused}")
    return min(scored, key=lambda trial: _cost(trial, maximize))


def costs_of(trials: Sequence[Trial], maximize: bool) -> list[float]:
    """What is to be small; what could not be merged is worse than all others."""
    found = [_cost(trial, maximize) for trial in trials if trial.score is not None]
    worst = max(found, default=0.0) + 1
    return [worst if trial.score is None else _cost(trial, maximize) for trial in trials]


def _cost(trial: Trial, maximize: bool) -> float:
    score = trial.score or 0.0
    return -score if maximize else score


def _append(file: Path, content: Mapping[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(content, ensure_ascii=False) + "\n")


def _lines(file: Path) -> list[Any]:
    """The whole lines; one that was cut off when a run was killed is taken away."""
    text = file.read_text("utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole, "utf-8")
    return [json.loads(line) for line in whole.splitlines()] or [None]
