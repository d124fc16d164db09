"""What a merge or an extraction of adapters did, and how near its result comes to what was wanted."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_modular._version import __version__
from hf_modular.adapter_merging._fit import Fitted

REPORT = "merge_report.json"


@dataclass(frozen=True)
class AdapterReport:
    """What was done.

    Args:
        method (`str`):
            The merge method, or `"extract"`.
        adapters (`list[str]`):
            What was merged, in order.
        peft_type (`str`):
            The type of the result.
        layers (`dict[str, dict]`):
            For each layer its `rank`, if it has one, and its relative `error`: the norm of what the result's change
            of the layer lacks over the norm of the wanted change, and 1 for a change where none was wanted. Of what
            is fitted it is that before the rounding to its dtype, of RMM that after it.
        error (`float`):
            The relative error of all layers together.
        settings (`dict`):
            How it was done.
        notes (`list[str]`):
            What was decided and may surprise.
        tasks (`dict[str, float]`):
            The relative error of each task that the result holds, if it holds several.
    """

    method: str
    adapters: list[str]
    peft_type: str
    layers: dict[str, dict[str, Any]]
    error: float
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    tasks: dict[str, float] = field(default_factory=dict)
    hf_modular: str = __version__

    def save(self, folder: str | Path) -> None:
        (Path(folder) / REPORT).write_text(self.to_json() + "\n", "utf-8")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    def summary(self) -> str:
        """What was done, in a line, after a line for each note and each task."""
        notes = [f"note: {note}" for note in self.notes]
        tasks = [f"{task}: relative error {error:.3g}" for task, error in self.tasks.items()]
        done = f"Merged {len(self.adapters)} adapters by {self.method} into {self.peft_type}"
        storage = f", {self.settings['storage']:.3g} of their numbers" if "storage" in self.settings else ""
        return "\n".join(
            [*notes, *tasks, f"{done}, {len(self.layers)} layers{storage}, relative error {self.error:.3g}"]
        )

    @classmethod
    def load(cls, folder: str | Path) -> "AdapterReport":
        return cls(**json.loads((Path(folder) / REPORT).read_text("utf-8")))


def errors(fitted: Mapping[str, Fitted]) -> tuple[dict[str, dict[str, Any]], float]:
    """Of each layer, and in total."""
    layers = {
        name: ({} if layer.rank is None else {"rank": layer.rank}) | {"error": relative(layer.error, layer.norm)}
        for name, layer in fitted.items()
    }
    total = [sum(numbers) for numbers in zip(*((layer.error, layer.norm) for layer in fitted.values()), strict=True)]
    return layers, relative(*total) if total else 0.0


def relative(error: float, norm: float) -> float:
    """√(error / norm); where nothing was wanted, 1 for anything else."""
    return (error / norm) ** 0.5 if norm > 0 else float(error > 0)


def warn_of(report: AdapterReport, threshold: float, remedy: str) -> None:
    """Warn if the result is further than the threshold from what was wanted."""
    worst: Sequence[str] = sorted(report.layers, key=lambda name: -report.layers[name]["error"])[:3]
    if report.error > threshold:
        named = ", ".join(f"{name} {report.layers[name]['error']:.2f}" for name in worst)
        warnings.warn(
            f"The result has a relative error of {report.error:.2f}, above {threshold} (worst layers: {named}). "
            f"{remedy}",
            stacklevel=3,
        )
