"""Models whose adapters hold several tasks: which one is used, and what becomes of single ones."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_modular.adapters._convert import to_lora
from hf_modular.adapters._method import Adapter, Site
from hf_modular.adapters._peft import AdapterModel
from hf_modular.checkpoints import refuse_occupied


class TasksModel(AdapterModel):
    """What a tuner offers beside if its adapters hold several tasks; a `PeftModel` around it passes it on.

    A batch may hold samples of different tasks: `model(**batch, adapter_names=["mrpc", "sst2", "__base__"])`, where
    the name of a task stands for the active adapter at that task.
    """

    @property
    def tasks(self) -> list[str]:
        """The tasks of the active adapter."""
        return list(self.peft_config[self._one()].tasks)

    @property
    def task(self) -> str:
        """The one that is used."""
        return self._used(self._one())

    def set_task(self, task: str, adapter_name: str | None = None) -> None:
        """Use this task from now on.

        Raises:
            ValueError: If the adapter has no such task, or is merged into the model at another one.
        """
        name = self._one(adapter_name)
        config = self.peft_config[name]
        self._require(task, config.tasks)
        self._require_unmerged(name)
        for adapter in self._holders(name):
            adapter.task = adapter.tasks.index(task)
        config.task = task

    def task_layers(self, adapter_name: str | None = None) -> dict[str, tuple[Site, Adapter]]:
        """The layers that the adapter is on, and what it has there."""
        name = self._one(adapter_name)
        layers = [layer for layer in self._layers() if name in layer.adapters]
        return {layer.site.name: (layer.site, layer.adapters[name]) for layer in layers}  # type: ignore[misc]

    def store_task(
        self,
        task: str,
        factors: Mapping[str, tuple[Tensor, Tensor | None]],  # by layer, what its adapter's `extended` takes
        error: float,
        adapter_name: str | None = None,
    ) -> None:
        """Store one task more; the relative error is what is already known of it."""
        name = self._one(adapter_name)
        self._require_unmerged(name)
        config = self.peft_config[name]
        changed = {layer: [*rows, len(factors[layer][0])] for layer, rows in config.whole.items()}
        new = replace(config, tasks=[*config.tasks, task], errors={**config.errors, task: error}, whole=changed)
        for layer, (_, adapter) in self.task_layers(name).items():
            adapter.extended(task, *factors[layer])  # type: ignore[operator]
        config.tasks, config.errors, config.whole = new.tasks, new.errors, new.whole

    def delete_task(self, task: str, adapter_name: str | None = None) -> None:
        """Forget a task; what is stored for all of them stays as it is."""
        name = self._one(adapter_name)
        self._require(task, self.peft_config[name].tasks)
        self.keep_tasks([other for other in self.peft_config[name].tasks if other != task], name)

    def keep_tasks(self, tasks: Sequence[str], adapter_name: str | None = None) -> None:
        """Have these of the tasks, in this order, and forget all others."""
        name = self._one(adapter_name)
        config = self.peft_config[name]
        if not tasks:
            raise ValueError(f"An adapter must hold a task, but {config.tasks} are all: delete the adapter instead.")
        self._require_unmerged(name)
        used = self._used(name) if self._used(name) in tasks else tasks[0]
        rows = [config.tasks.index(task) for task in tasks]
        for adapter in self._holders(name):
            adapter.resized(list(tasks), torch.tensor(rows))  # type: ignore[operator]
        config.tasks, config.task = list(tasks), None
        config.errors = {task: config.errors[task] for task in tasks if task in config.errors}
        config.whole = {layer: [outputs[row] for row in rows] for layer, outputs in config.whole.items()}
        self.set_task(used, name)

    def revert(
        self, task: str, save_directory: str | Path, adapter_name: str | None = None, *, overwrite: bool = False
    ) -> None:
        """Write one task as a LoRA adapter that plain PEFT loads, into a folder that is absent or empty.

        Raises:
            ValueError: If the adapter has no such task or is merged into the model, or if there is something in the
                folder that is not to be overwritten.
        """
        name, folder = self._one(adapter_name), Path(save_directory)
        refuse_occupied(folder, overwrite=overwrite)
        used = self._used(name)
        self.set_task(task, name)
        try:
            config, tensors = to_lora(self.model, name)
        finally:
            self.set_task(used, name)
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(folder))
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})

    def _sample_names(self) -> set[str]:
        return super()._sample_names() | self._active_tasks()

    def _check_names(self, names: list[str]) -> None:
        if both := sorted(set(names) & super()._sample_names() & self._active_tasks()):
            raise ValueError(f"Samples name an adapter or a task, but {both} are both here: rename the adapters.")
        super()._check_names(names)

    def _active_tasks(self) -> set[str]:
        return {task for name in self.active_adapters for task in self.peft_config[name].tasks}

    def _holders(self, adapter_name: str) -> Iterator[Adapter]:
        held: list[nn.ModuleDict] = [layer.adapters for layer in self._layers()]
        return (adapters[adapter_name] for adapters in held if adapter_name in adapters)  # type: ignore[misc]

    def _one(self, adapter_name: str | None = None) -> str:
        """The adapter that is meant."""
        names: Any = self.active_adapters if adapter_name is None else [adapter_name]
        if len(names) != 1 or names[0] not in self.peft_config:
            raise ValueError(f"One adapter of {[*self.peft_config]} must be meant, but got {list(names)}.")
        return str(names[0])

    def _used(self, name: str) -> str:
        config = self.peft_config[name]
        return str(config.task or config.tasks[0])

    def _require_unmerged(self, name: str) -> None:
        if merged := [layer.site.name for layer in self._layers() if name in layer.merged_adapters]:
            raise ValueError(f"Adapter {name!r} is merged into '{merged[0]}': call `unmerge_adapter` first.")

    def _require(self, task: str, tasks: Sequence[str]) -> None:
        if task not in tasks:
            raise ValueError(f"The adapter has no task {task!r}; it has {list(tasks)}.")
