"""What a merge did: saved beside its result, to be read by people, cards and later checks."""

import json
import platform
import resource
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import file_digest
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

REPORT = "merge_report.json"
RECIPE = "merge_recipe.yaml"


class VerificationError(ValueError):
    """A result is not what it must be."""

    exit_code = 1  # of the command line: a check failed


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Args:
        merge_method: The method's name.
        recipe: What was merged and how, with the commits of repositories that were read.
        seed: The seed of the run.
        inputs: Each model and the `files` that hold its weights: their size and, unless turned off, SHA-256.
        outputs: The files of the result in the same way.
        tensors: How many tensors were written.
        parameters: How many numbers they hold.
        bytes_written: What the result's tensors take.
        seconds: How long it took.
        peak_memory: The most memory, in bytes, that the process and its workers held at any time.
        workers: How many worked at a time. The result does not depend on it.
        device: Where the arithmetic was done.
        notes: What was decided and may surprise.
        versions: Of the software that the result may depend on.
        distances: How far models are from the base, or else the first model, as parts of that one's norm, on a sample.
        facts: What the method found out of the whole models, such as norms and quantiles.
        verification: What was found when the result was read again; empty if it was not.
    """

    merge_method: str
    recipe: dict[str, Any]
    seed: int
    inputs: list[dict[str, Any]]
    outputs: dict[str, dict[str, Any]]
    tensors: int
    parameters: int
    bytes_written: int
    seconds: float
    peak_memory: int
    workers: int
    device: str
    notes: list[str]
    versions: dict[str, str] = field(default_factory=lambda: versions())
    distances: dict[str, dict[str, float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    verification: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        (Path(folder) / REPORT).write_text(self.to_json() + "\n", "utf-8")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    def summary(self) -> str:
        """What was done, in a line, and a line for each note."""
        sizes = f"{self.tensors} tensors, {self.parameters:,} parameters, {self.bytes_written / 1e6:,.1f} MB"
        notes = "".join(f"note: {note}\n" for note in self.notes)
        models = len({*listed_models(self.recipe)})
        return (
            f"{notes}Merged {models} models by {self.merge_method} in {self.seconds:.1f} s ({sizes}{self._verified()})"
        )

    def _verified(self) -> str:
        """What a verification found, in a few words."""
        found = self.verification
        if not found:
            return ""
        words = [f"{found['tensors_compared']} tensors computed again"]
        if "loads" in found:
            words.append("loads in transformers")
        if missing := found.get("missing_or_unexpected_as_in_the_reference"):
            words.append(f"missing or left over as in the reference model: {', '.join(missing[:3])}")
        if adapter := found.get("adapter"):
            words.append(f"outputs within {adapter['largest_difference']:.2g} of the adapter's")
            words += [] if adapter["adapter_effect"] else ["the adapter changes none of them"]
        return "; verified: " + ", ".join([*words, *(f"not {skipped}" for skipped in found.get("skipped", []))])

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        return cls(**json.loads((Path(folder) / REPORT).read_text("utf-8")))


def listed_models(recipe: Mapping[str, Any]) -> Iterator[str]:
    """The models that a recipe merges: its own, those of slices, and those of modules."""
    yield from (entry["model"] for entry in recipe.get("models") or ())
    yield from (source["model"] for part in recipe.get("slices") or () for source in part["sources"])
    for module in (recipe.get("modules") or {}).values():
        yield from listed_models(module)


def describe(path: Path, *, hashes: bool) -> dict[str, Any]:
    """A file's size and, if wanted, its hash."""
    found: dict[str, Any] = {"bytes": path.stat().st_size}
    return found | {"sha256": sha256(path)} if hashes else found


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes."""
    if sys.platform == "linux":  # where `getrusage` counts the process that started this one, too
        status = Path("/proc/self/status").read_text("utf-8").splitlines()
        return 1024 * next((int(line.split()[1]) for line in status if line.startswith("VmHWM:")), 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, kilobytes elsewhere


def versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("hf_modular", "torch", "numpy")}
    return {**packages, "python": platform.python_version()}
