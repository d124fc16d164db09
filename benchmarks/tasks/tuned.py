"""Encoders that were fine-tuned on the tasks of a suite, once each and kept: what merges are measured on."""

import hashlib
import json
import re
import sys
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_modular import AdamR, merge
from hf_modular.demo.training import train
from tasks import Suite

PACKAGES = ("peft", "torch", "transformers")
State = dict[str, Tensor]


@dataclass(frozen=True)
class Training:
    """How an encoder is fine-tuned."""

    rate: float
    epochs: float
    rank: int | None = None  # of a LoRA on all linear layers; None is the encoder itself
    pull: float = 0.0  # of AdamR towards the base; without one it is AdamW
    frozen: str | None = None  # what names begin with that stay as they are


@dataclass(frozen=True, eq=False)
class FineTunes:
    """The encoders of a suite that were fine-tuned in one way."""

    suite: Suite
    training: Training
    cache: Path

    def state(self, task: str, seed: int) -> State:
        """What fine-tuning has changed of the encoder; of a LoRA with the adapter merged into it."""
        file = self._path(task, seed).with_suffix(".safetensors")
        if not file.is_file():
            whole = self._with_adapter(task, seed) if self.training.rank else self._trained(task, seed)
            base = self.suite.new_encoder().state_dict()
            save_state({name: tensor for name, tensor in whole.items() if not torch.equal(tensor, base[name])}, file)
        return load_file(file)

    def adapter(self, task: str, seed: int) -> Path:
        """The folder of a LoRA."""
        folder = self._path(task, seed)
        if not (folder / "adapter_model.safetensors").is_file():
            model = self.suite.model(task)
            torch.manual_seed(seed + zlib.crc32(task.encode()))  # nobody agrees on where the matrices begin
            # by their full names, as one expression, of which PEFT makes no shorter ones: a pooling layer, which the
            # saved base has and this encoder has not, is no target
            linear = [name for name, layer in model.encoder.named_modules() if isinstance(layer, nn.Linear)]
            config = LoraConfig(r=self.training.rank, target_modules="|".join(map(re.escape, linear)))
            model.encoder = get_peft_model(model.encoder, config)
            self._train(model, task, seed)
            model.encoder.save_pretrained(folder)
        return folder

    def _with_adapter(self, task: str, seed: int) -> State:
        """As merges see it to which a base and an adapter are given as a model."""
        source = f"{self.suite.base}+{self.adapter(task, seed)}"
        with tempfile.TemporaryDirectory() as folder:
            merge({"merge_method": "linear", "models": [{"model": source}]}, Path(folder) / "merged")
            return (
                type(self.suite.new_encoder())
                .from_pretrained(Path(folder) / "merged", add_pooling_layer=False)
                .state_dict()
            )

    def _trained(self, task: str, seed: int) -> State:
        model = self.suite.model(task)
        for name, parameter in model.encoder.named_parameters():
            parameter.requires_grad_(self.training.frozen is None or not name.startswith(self.training.frozen))
        torch.manual_seed(seed)
        self._train(model, task, seed)
        return model.encoder.state_dict()

    def _train(self, model: Any, task: str, seed: int) -> None:
        how = self.training
        optimizer = AdamR.for_model(model, lr=how.rate, pull=how.pull) if how.pull else None
        options = {"rate": how.rate, "epochs": how.epochs, "seed": seed, "optimizer": optimizer}
        with tempfile.TemporaryDirectory() as folder:
            rows = self.suite.tasks[task].train.rows()
            options |= {"remove_unused_columns": False, "bf16": self.suite.in_bf16}
            seconds = train(model, rows, Path(folder), **options)
        say("fine-tuned", self.suite.name, asdict(how), task, seed, f"{seconds:.1f} s")

    def _path(self, task: str, seed: int) -> Path:
        facts = [self.suite.base_sha256, self.suite.tasks[task].sha256, asdict(self.training), self.suite.in_bf16]
        facts += [seed, [version(name) for name in PACKAGES]]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        return self.cache / f"tuned-{self.suite.name}-{task.replace(' ', '-')}-{seed}-{digest}"


def save_state(state: Mapping[str, Tensor], file: Path) -> None:
    """Write a file that appears when it is whole."""
    part = file.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, part)
    part.replace(file)


def say(*words: object) -> None:
    print(*words, flush=True, file=sys.stderr)
