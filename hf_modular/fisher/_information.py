"""The diagonal of a model's Fisher information over a data set (Matena and Raffel, arXiv 2111.09832, section 3.2).

    F = 1/N Σₓ E_{y ~ p(y|x)} [ (∂ log p(y|x) / ∂θ)² ]

for each parameter θ: how much the model's output depends on it. Each example's gradient is squared on its own. The
expectation is exact where the labels of an example are few (classes, numbers), and one sample of them where each place
has a vocabulary of its own. With labels="given" it is the empirical Fisher information, of the labels in the data.
"""

import json
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_modular._batches import evaluating
from hf_modular.checkpoints import CheckpointWriter, TensorInfo, refuse_occupied
from hf_modular.fisher._examples import Reader, Rows
from hf_modular.fisher._likelihood import Problem
from hf_modular.fisher._over_data import Store, sums_over
from hf_modular.fisher._per_example import SquaredGradients
from hf_modular.merging._method import check_setting

CONFIG = "fisher_config.json"

_WINDOW = 16  # batches among which examples of one shape are put together


def fisher_information(
    model: nn.Module,
    dataset: Rows,
    output_dir: str | Path | None = None,
    *,
    labels: Literal["auto", "expected", "sampled", "given"] = "auto",
    problem: Problem | None = None,
    include: str = "",
    merged: bool = False,
    batch_size: int = 4,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16"] = "float32",
    save_every: float = 600,
    progress: bool = True,
    overwrite: bool = False,
) -> dict[str, Tensor]:
    """The diagonal of the model's Fisher information, as a state dict and as a checkpoint for `FisherConfig`.

    Under `accelerate launch` the processes share the examples. Each of them has the model, and each gets the result.

    Args:
        model: A model that returns logits. Of a PEFT model the adapter's parameters count.
        dataset: Examples without padding: what the model takes, without a batch axis, and labels if there are any.
        output_dir: A folder that is absent or empty. What is done is saved beside it now and then, and a run that was
            broken goes on from there.
        labels: "expected" takes all labels by their probability, "sampled" one drawn from the model, "given" those of
            the data, which is the empirical Fisher information. By default classes are expected and tokens sampled.
        problem: What the logits are, if the model's config does not say it.
        include: A regular expression that the names of the parameters must match somewhere.
        merged: Of a PEFT model take the whole model with the adapter merged into it. Needs the memory of a copy.
        batch_size: How many examples are taken at once; each needs twice the memory of the parameters.
        seed: For sampled labels. Those of an example do not depend on the number of processes.
        dtype: What the checkpoint holds: "float32", or square roots in "bfloat16" for half the space.
        save_every: Seconds between savings of what is done.
        progress: Show a progress bar on a terminal.
        overwrite: Replace a checkpoint that is in the folder.
    """
    check_setting("labels", labels, Literal["auto", "expected", "sampled", "given"])
    check_setting("dtype", dtype, Literal["float32", "bfloat16"])
    if len(dataset) == 0:
        raise ValueError("Fisher information needs at least one example, but the data set is empty")
    if output_dir is not None:
        refuse_occupied(Path(output_dir), overwrite=overwrite)
    whole = _with_adapter_merged(model) if merged else model
    chosen, names = _chosen(whole, include)
    reader = Reader(whole, labels, problem, seed)
    settings = {"labels": labels, "problem": problem, "include": include, "merged": merged, "seed": seed}
    run = settings | {
        "examples": len(dataset),
        "model": _sample(chosen),
        "data": [repr(dataset[i]) for i in (0, len(dataset) - 1)],
    }
    folder = None if output_dir is None else Path(output_dir)
    store = None if folder is None else Store.beside(folder, run, save_every)
    squares = SquaredGradients(whole, chosen, reader.scores, reader.inputs)

    def work(numbers: Sequence[int], sums: dict[str, Tensor]) -> None:
        squares.add([reader.example(dataset[i], i) for i in numbers], sums, batch_size)

    zeros = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in chosen.items()}
    with evaluating(whole):
        sums = sums_over(len(dataset), _WINDOW * batch_size, work, zeros, store, "Fisher information", progress)
    fisher = {stored: sums[name] / len(dataset) for name, all_names in names.items() for stored in all_names}
    _check_finite(fisher)
    if store is not None and folder is not None:
        described = settings | {"examples": len(dataset)}
        store.finish(lambda: _save(fisher, folder, dtype, described, overwrite))
    return fisher


def _with_adapter_merged(model: nn.Module) -> nn.Module:
    if not hasattr(model, "merge_and_unload"):
        raise ValueError(f"merged=True is for PEFT models, but got a {type(model).__name__}")
    copied: Any = deepcopy(model)
    return copied.merge_and_unload()


def _chosen(model: nn.Module, include: str) -> tuple[dict[str, nn.Parameter], dict[str, list[str]]]:
    """The parameters to take, and the names of each in a checkpoint: tied ones have several, frozen ones of a PEFT
    model none.
    """
    stored: dict[object, list[str]] = {}
    for name, tensor in _state_dict(model).items():
        stored.setdefault((tensor.data_ptr(), tensor.shape), []).append(name)
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and parameter.numel() and re.search(include, name)
    }
    names = {name: stored.get((p.data_ptr(), p.shape), []) for name, p in parameters.items()}
    if not any(names.values()):
        raise ValueError(f"there must be parameters to take, but none of the model's matches {include=}")
    return {name: p for name, p in parameters.items() if names[name]}, names


def _state_dict(model: nn.Module) -> Mapping[str, Tensor]:
    """What is saved of the model: of a PEFT model the adapter."""
    if not hasattr(model, "peft_config"):
        return model.state_dict()
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


def _sample(parameters: Mapping[str, nn.Parameter]) -> dict[str, list[float]]:
    """A few numbers of each parameter, by which the model is known again."""
    return {name: p.detach().flatten()[:: p.numel() // 8 + 1].tolist() for name, p in parameters.items()}


def _check_finite(fisher: Mapping[str, Tensor]) -> None:
    if bad := [name for name, tensor in fisher.items() if not bool(tensor.isfinite().all())]:
        raise ValueError(f"the Fisher information must be finite, but that of {bad[0]} is not: use a wider dtype")


def _save(
    fisher: Mapping[str, Tensor],
    folder: Path,
    dtype: Literal["float32", "bfloat16"],
    described: Mapping[str, Any],
    overwrite: bool,
) -> None:
    root = dtype == "bfloat16"
    kept = torch.bfloat16 if root else torch.float32
    plan = {name: TensorInfo(kept, tuple(tensor.shape)) for name, tensor in fisher.items()}
    with CheckpointWriter(folder, plan, overwrite=overwrite) as writer:
        for name, tensor in fisher.items():
            writer.write(name, (tensor.sqrt() if root else tensor).to(kept))
        text = json.dumps({**described, "root": root}, indent=2)
        (writer.staging / CONFIG).write_text(text + "\n", "utf-8")
        writer.commit()
