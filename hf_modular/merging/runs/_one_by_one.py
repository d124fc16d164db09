"""Merging models one after the other, so that memory does not grow with their number and a later run can add more.

What goes from one model to the next is a checkpoint, the state. Each step is a merge of its own: of the base, a model
and the state into the next state, and at last of the base and the state into the result. A state that the recipe names
is kept, and replaced as a whole after each model.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hf_modular.checkpoints import Checkpoint
from hf_modular.merging._method import MergeMethod, Parts
from hf_modular.merging.engine._processes import processes
from hf_modular.merging.recipes._recipe import MergeRecipe
from hf_modular.merging.runs._report import MergeReport

Run = Callable[..., MergeReport]  # one merge: (recipe, folder, **options)

_FILE = "merge_state.json"
_SAMPLED = 4  # numbers of each tensor by which a base is known again


@dataclass(frozen=True)
class State:
    """What is known of the models so far; the numbers are in the checkpoint beside it.

    Args:
        method: The method and its settings.
        base: Some of the base's numbers.
        models: The models that are in it, in their order.
        facts: What the step of each model found.
    """

    method: Mapping[str, Any]
    base: Mapping[str, list[float]]
    models: list[str] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)

    def with_model(self, model: str, facts: dict[str, Any]) -> "State":
        return replace(self, models=[*self.models, model], facts=[*self.facts, facts])


def one_by_one(
    recipe: MergeRecipe, method: MergeMethod, parts: Parts, base: Checkpoint, output: Path, run: Run, resume: bool
) -> tuple[State, MergeReport]:
    """Merge the models of a recipe, and give the state in the end and the report of the last step."""
    with _folder(recipe, output) as folder:
        state = _begun(folder, State(method.to_dict(), _sample(base)))
        models = _new(recipe, state, folder, resume)
        dtype = "float64" if any(t.dtype == torch.float64 for t in base.tensors.values()) else "float32"
        for model in models:
            part = parts.add if state.models else parts.first
            beside = {"state": str(folder)} if state.models else {}
            following = folder.with_name(f"{folder.name}.next")
            step = _step(recipe, part, {"model": model, **beside}, {"out_dtype": dtype})
            state = state.with_model(model, run(step, following, overwrite=True, hashes=False).facts)
            _first_process(lambda state=state, following=following: _replace(folder, following, state))  # type: ignore[misc]
        shape = {"out_dtype": recipe.result_dtype} if recipe.result_dtype else {}
        return state, run(_step(recipe, parts.result(state.facts), {"model": str(folder)}, shape), output)


def _step(recipe: MergeRecipe, part: MergeMethod, entry: Mapping[str, str], more: Mapping[str, Any]) -> dict[str, Any]:
    settings = part.to_dict()
    method = settings.pop("merge_method")
    base = {"base_model": recipe.base_model, "seed": recipe.seed}
    more = {**recipe.model_dump(include={"base_precision", "adapter_base"}, exclude_defaults=True), **more}
    return {"merge_method": method, "models": [dict(entry)], "parameters": settings, **base, **more}


def _new(recipe: MergeRecipe, state: State, folder: Path, resume: bool) -> list[str]:
    """The recipe's models that are not in the state yet."""
    models = [entry.model for entry in recipe.task_models]
    if (there := [model for model in models if model in state.models]) and not resume:
        raise ValueError(
            f"a model may be merged once, but {', '.join(there)} is in {folder} already: remove it from the recipe, "
            "or go on with `resume`"
        )
    return [model for model in models if model not in state.models]


@contextmanager
def _folder(recipe: MergeRecipe, output: Path) -> Iterator[Path]:
    """Where the state is: in the recipe's place, or for a while near the output."""
    if recipe.state is not None:
        yield Path(recipe.state)
        return
    near = next(folder for folder in output.absolute().parents if folder.exists())
    name = _first_process(lambda: tempfile.mkdtemp(prefix=f".{output.name}-", dir=near))
    try:
        yield Path(name) / "state"
    finally:
        _first_process(lambda: shutil.rmtree(name, ignore_errors=True))


def _begun(folder: Path, fresh: State) -> State:
    """The state in a folder, checked, or a new one."""
    _first_process(lambda: _recover(folder))
    if not folder.exists():
        return fresh
    if not (folder / _FILE).is_file():
        raise ValueError(f"{folder} must hold the state of a merge, {_FILE} among it, or not exist")
    found = State(**json.loads((folder / _FILE).read_text("utf-8")))
    if found.method != fresh.method:
        raise ValueError(f"{folder} was made with {found.method}, but the recipe has {fresh.method}")
    if found.base != fresh.base:
        raise ValueError(f"{folder} was made with another base than the recipe's: their numbers differ")
    return found


def _replace(folder: Path, following: Path, state: State) -> None:
    """Put the next state in the place of the last."""
    (following / _FILE).write_text(json.dumps(asdict(state), indent=2) + "\n", "utf-8")
    before = folder.with_name(f"{folder.name}.before")
    if folder.exists():
        folder.rename(before)
    following.rename(folder)
    shutil.rmtree(before, ignore_errors=True)


def _recover(folder: Path) -> None:
    """After a run that was broken between the two renamings."""
    before = folder.with_name(f"{folder.name}.before")
    if before.exists() and not folder.exists():
        before.rename(folder)


def _sample(base: Checkpoint) -> dict[str, list[float]]:
    found = {}
    for name, tensor in base.tensors.items():
        numbers = torch.empty(min(_SAMPLED, tensor.numel), dtype=tensor.dtype)
        base.read_into(name, numbers, (tensor.numel - numbers.numel()) // 2)
        found[name] = numbers.double().tolist()
    return found


def _first_process(step: Callable[[], Any]) -> Any:
    """What the first process makes of a step, while the others wait."""
    ranks = processes()
    return ranks.together(lambda: step() if ranks.first else None)[0]
