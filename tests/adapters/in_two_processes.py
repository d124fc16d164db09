"""Trains an adapter of every method on the halves of each batch, as one of several processes; run by a test.

    accelerate launch --multi_gpu --num_processes 2 in_two_processes.py FOLDER

Writes the losses into FOLDER/losses.json, and the adapters into folders beside it.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW, Optimizer

from adapters.conftest import adapted
from adapters.table import METHODS
from hf_modular.testing import AdapterCase

STEPS = 4
BATCHES = [torch.arange(i, i + 28).reshape(4, 7) * 3 % 50 for i in range(STEPS)]


def made(case: AdapterCase) -> PeftModel:
    return adapted(case, "llama", target_modules=["q_proj", "down_proj"]).train()


def optimizer_of(model: nn.Module) -> Optimizer:
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def losses_of(model: nn.Module, optimizer: Optimizer, batches: Iterable[Tensor], backward: Callable) -> list[Tensor]:
    losses = []
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        losses.append(loss.detach())
    return losses


def mean(losses: list[Tensor]) -> list[float]:
    """Over the processes."""
    both = torch.stack(losses)
    distributed.all_reduce(both)
    return (both / distributed.get_world_size()).tolist()


def my_part(batch: Tensor) -> Tensor:
    return batch.chunk(distributed.get_world_size())[distributed.get_rank()]


def with_accelerate(case: AdapterCase, folder: Path) -> list[float]:
    """What `Trainer` does: `DistributedDataParallel` around the model."""
    accelerator = Accelerator(cpu=True)
    model = made(case)
    prepared, optimizer = accelerator.prepare(model, optimizer_of(model))
    assert type(prepared).__name__ == "DistributedDataParallel"
    losses = losses_of(prepared, optimizer, map(my_part, BATCHES), accelerator.backward)
    if accelerator.is_main_process:
        accelerator.unwrap_model(prepared).save_pretrained(folder)
    return mean(losses)


def with_fsdp_2(case: AdapterCase, folder: Path) -> list[float]:
    """Every parameter in two halves."""
    model = made(case)
    # what the layers share belongs to no block of its own, and FSDP 2 refuses that: then the model is one group
    shares = any(name.endswith(".shared") for name, _ in model.named_modules())
    for block in [] if shares else model.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(model)
    losses = losses_of(model, optimizer_of(model), map(my_part, BATCHES), Tensor.backward)
    refused = ""
    try:
        model.save_pretrained(folder)
    except ValueError as error:
        refused = str(error)
    assert "is split over the processes" in refused
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if distributed.get_rank() == 0:
        model.save_pretrained(folder, state_dict=whole)
    return mean(losses)


WAYS = {"accelerate": with_accelerate, "fsdp 2": with_fsdp_2}


def main(folder: Path) -> None:
    assert Accelerator(cpu=True).num_processes == 2
    found = {
        w: {str(case): way(case, folder / w / str(i)) for i, case in enumerate(METHODS)} for w, way in WAYS.items()
    }
    if distributed.get_rank() == 0:
        (folder / "losses.json").write_text(json.dumps(found))
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # gloo's threads may outlive the objects that own them, and an interpreter that ends in order then aborts
    sys.stdout.flush()
    os._exit(0)
