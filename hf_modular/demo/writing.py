"""What is written beside the models: their cards, and the results for programs."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from sklearn.datasets import load_digits

from hf_modular.cards import save_card
from hf_modular.demo.digits import SIZES
from hf_modular.demo.report import Row, notes
from hf_modular.demo.training import Job

DATA = "digits (scikit-learn)"
LIMITS = "A demonstration on scans of 8 x 8 pixels. It is meant for nothing else."
PACKAGES = ("hf_modular", "peft", "torch", "transformers", "scikit-learn")


def write_adapter_cards(jobs: Sequence[Job], row: Row) -> None:
    """The cards of one method's adapters, if adapters are what it has."""
    for job in jobs:
        if (job.folder / "adapter_config.json").is_file():
            settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in row.settings.items())
            save_card(
                job.folder,
                summary=f"{job.method} for handwritten digits, {job.task}; trained by the demo of hf_modular.",
                training_data=f"{SIZES['train']} images of {DATA}, {job.task}.",
                training_procedure=f"`transformers.Trainer`, {settings}, seed {job.seed}.",
                metrics=[_metric(job.task, row)],
                limits=LIMITS,
            )


def write_merged_card(folder: Path, row: Row) -> None:
    """Metrics of the model that is in the folder, which is that of the first seed."""
    save_card(folder, metrics=[_metric(task, row) for task in row.accuracy], limits=LIMITS)


def _metric(task: str, row: Row) -> EvalResult:
    return EvalResult(
        task_type="image-classification",
        dataset_type="digits",
        dataset_name=f"{DATA}, {task}",
        dataset_config=task,
        dataset_split="test",
        metric_type="accuracy",
        metric_value=round(row.first_accuracy[task], 4),
    )


def write_results(path: Path, rows: Sequence[Row], settings: Mapping[str, Any]) -> None:
    """Everything that is in the table and more, unrounded."""
    images = load_digits().images.tobytes()
    results = {
        "settings": settings,
        "data": {"name": DATA, "sizes": SIZES, "sha256": hashlib.sha256(images).hexdigest()},
        "versions": {name: version(name) for name in PACKAGES},
        "rows": [row.to_dict() for row in rows],
        "notes": notes(rows),
    }
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
