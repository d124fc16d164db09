"""The base model, and one fine-tuning per method and task with `transformers.Trainer`."""

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)
from transformers.utils import logging

from hf_modular.adapters import HUTConfig, SSFConfig
from hf_modular.demo.digits import VIEWS, Part, load

BASE_EPOCHS, BASE_RATE, BASE_BATCH, VIEW_BATCH = 110, 1e-3, 64, 8
EPOCHS, BATCH = 10, 32

# Every linear layer of the encoder. The head is left out: it is shared by all tasks, so it stays as the base has it.
EVERYWHERE: dict[str, Any] = {"target_modules": "all-linear", "exclude_modules": ["classifier"]}


@dataclass(frozen=True)
class Method:
    """One row of the table: what is trained, and how fast.

    The rates were chosen once, by mean validation accuracy with seed 0 among 1e-3, 3e-3, 1e-2, ...: each is better
    than the one below and the one above it. But full fine-tuning has 1e-3 where 3e-3 was 0.8 points better, since its
    models are merged, which needs them near the base.
    """

    name: str
    folder: str  # where its models are kept, in the output folder
    rate: float
    prepare: Callable[[Any], Any]  # the base -> the same model with what is to be trained


def adapter(config: Any) -> Callable[[Any], Any]:
    return lambda base: get_peft_model(base, deepcopy(config))  # PEFT writes the base's name and targets into it


def only_head(base: Any) -> Any:
    base.requires_grad_(False)
    base.classifier.requires_grad_(True)
    return base


def all_but_head(base: Any) -> Any:
    base.classifier.requires_grad_(False)
    return base


# In this ViT a scale and a shift cost as much as LoRA's rank 1, and HUT's r=8 as much as LoRA's r=9: equals meet.
METHODS = (
    Method("linear probe", "models/probe", 1e-1, only_head),
    Method("LoRA r=1", "adapters/lora-r1", 1e-2, adapter(LoraConfig(r=1, lora_alpha=2, **EVERYWHERE))),
    Method("SSF", "adapters/ssf", 1e-1, adapter(SSFConfig(init_weights="identity", **EVERYWHERE))),
    Method("LoRA r=9", "adapters/lora-r9", 1e-2, adapter(LoraConfig(r=9, lora_alpha=18, **EVERYWHERE))),
    Method("HUT r=8", "adapters/hut-r8", 1e-1, adapter(HUTConfig(r=8, **EVERYWHERE))),
    Method("full fine-tuning", "models/full", 1e-3, all_but_head),
)
BY_NAME = {method.name: method for method in METHODS}


@dataclass(frozen=True)
class Job:
    """One fine-tuning."""

    method: str
    task: str
    base: Path
    output: Path
    epochs: float = EPOCHS
    seed: int = 0

    @property
    def folder(self) -> Path:
        return self.output / f"{BY_NAME[self.method].folder}-{self.task}"


@dataclass(frozen=True)
class Outcome:
    """What came of a job."""

    parameters: int
    seconds: float  # of training, CPU time
    val: float
    correct: list[bool]  # one for each test image


@contextmanager
def calm() -> Iterator[None]:
    """One thread, so that the number of cores changes no bit, and no progress bars for what takes milliseconds."""
    threads, shown = torch.get_num_threads(), logging.is_progress_bar_enabled()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    gc.freeze()  # Trainer collects garbage after every run: let it not look through all that was imported
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT asks transformers
            yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)
        if shown:
            logging.enable_progress_bar()


def ready() -> None:
    """Nothing; asking a new process for it makes the process import this module."""


def new_model() -> ViTForImageClassification:
    sizes: dict[str, Any] = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    labels: dict[str, Any] = {"id2label": {i: str(i) for i in range(10)}, "label2id": {str(i): i for i in range(10)}}
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, intermediate_size=192, **sizes, **labels)
    return ViTForImageClassification(config)


@calm()
def train_base(folder: Path, *, epochs: int = BASE_EPOCHS, seed: int = 0) -> float:
    """Train a ViT on a few hundred images in all views, save it, and return the CPU seconds."""
    set_seed(seed)
    started = time.process_time()
    part, model = load()["base"], new_model()
    steps = epochs * -(-len(part) // BASE_BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), BASE_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, BASE_RATE, total_steps=steps, pct_start=0.1)
    for _ in range(epochs):
        for index in torch.randperm(len(part)).split(BASE_BATCH):
            logits = model(pixel_values=_mixed_views(part.images[index])).logits
            F.cross_entropy(logits, part.labels[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval().save_pretrained(folder)
    return time.process_time() - started


def _mixed_views(images: Tensor) -> Tensor:  # (n, 1, 8, 8)
    """Every few of the images in a view drawn for them."""
    views = list(VIEWS.values())
    groups = images.split(VIEW_BATCH)
    return torch.cat([views[int(torch.randint(len(views), ()))](group) for group in groups])


@calm()
def fine_tune(job: Job) -> Outcome:
    """Train the base on one task by one method, save what was trained, and evaluate it."""
    set_seed(job.seed)
    data = {name: part.seen_as(job.task) for name, part in load().items()}
    base = AutoModelForImageClassification.from_pretrained(job.base)
    model = BY_NAME[job.method].prepare(base)
    rows = [{"pixel_values": x, "labels": y} for x, y in zip(data["train"].images, data["train"].labels, strict=True)]
    seconds = train(model, rows, job.folder, rate=BY_NAME[job.method].rate, epochs=job.epochs, seed=job.seed)
    model.save_pretrained(job.folder)
    val, test = (is_correct(model, data[name]) for name in ("val", "test"))
    return Outcome(trainable(model), seconds, share(val), test.tolist())


def train(
    model: Any,
    rows: Sequence[dict[str, Tensor]],
    folder: Path,
    *,
    rate: float,
    epochs: float,
    seed: int,
    optimizer: torch.optim.Optimizer | None = None,  # AdamW if it is not given
    **options: Any,  # of `TrainingArguments`
) -> float:
    """Train what wants gradients, with cosine decay after a warm-up, and return the CPU seconds."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        learning_rate=rate,
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,  # a share of the steps
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
    trainer.remove_callback(PrinterCallback)
    started = time.process_time()
    trainer.train()
    return time.process_time() - started


def trainable(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def is_correct(model: Any, part: Part) -> Tensor:  # (n,), bool
    model.eval()
    return model(pixel_values=part.images).logits.argmax(-1) == part.labels


def share(correct: Tensor) -> float:
    """Accuracy."""
    return float(correct.float().mean())
