"""The modules of a model, which a recipe may merge apart: each stack of layers with what belongs to it, and the rest.

They go by mergekit's names, or by the part of the names of tensors by which they differ.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from hf_modular.merging.assembly._layers import LayerStack, layer_stacks
from hf_modular.merging.sources._names import known
from hf_modular.merging.sources._sources import Source

WHOLE = "default"  # the only module of a model with one stack of layers
_REST = ("shared", WHOLE, "multi_modal_projector")  # what belongs to no stack
_ROLES = {"text_config": ("text_decoder",), "vision_config": ("vision_tower", "vision_model")}  # by mergekit
_BETWEEN = "merger"  # what leads from images to texts, although it may be named as a part of what sees


@dataclass(frozen=True)
class Module:
    """A part of a model.

    Args:
        names: What a recipe may call it, the usual name first.
        stack: Its layers, if it has any.
        outside: Its tensors outside the layers.
    """

    names: tuple[str, ...]
    stack: LayerStack | None
    outside: tuple[str, ...]

    @property
    def layers(self) -> int:
        return self.stack.layers if self.stack else 0

    def __str__(self) -> str:
        return f"{self.names[0]!r} ({f'{self.layers} layers' if self.stack else 'without layers'})"


def modules(source: Source, names: Collection[str] = ()) -> list[Module]:
    """The modules of a model, cut in the way in which a recipe names them.

    Where it names one by all that comes before the numbers of its layers, as mergekit does for models that it has no
    description of, the layers are the module, and all that is outside of layers is another one.
    """
    stacks = layer_stacks(source)
    loose = [name for name in source.tensors if not any(stack.place(name) for stack in stacks)]
    if len(stacks) < 2:
        return [Module((WHOLE,), next(iter(stacks), None), tuple(loose))]
    if any(stack.stem[:-1] in names for stack in stacks):
        return [*(Module((stack.stem[:-1],), stack, ()) for stack in stacks), Module((WHOLE,), None, tuple(loose))]
    owners = {stack: _owner(stack, stacks) for stack in stacks}
    seeing = any(_part(stack) == "vision_config" for stack in stacks)
    texts = next((stack for stack in stacks if seeing and _part(stack) in ("", "text_config")), None)
    found: dict[LayerStack | None, list[str]] = {stack: [] for stack in (*stacks, None)}
    for name in loose:
        found[_home(source, name, owners, texts)].append(name)
    named = [Module(_names(stack, owners, seeing=seeing), stack, tuple(found[stack])) for stack in stacks]
    rest = _REST[::-1] if seeing else _REST
    return [*named, *([Module(rest, None, tuple(found[None]))] if found[None] else [])]


def spelled(there: Iterable[Module]) -> str:
    """Modules for a message."""
    return ", ".join(map(str, there))


def module_named(name: str | None, source: Source, names: Collection[str]) -> Module:
    """One of the modules of a model, of which a recipe has these names; without a name the whole model.

    Raises:
        ValueError: If there is no such module, or the whole model has several.
    """
    there = modules(source, names)
    if name is None and len(there) == 1:
        return there[0]
    for module in there:
        if name in module.names:
            return module
    has = f"{source.reference} has {spelled(there)}"
    if name is None:
        law = "slices need a model with one stack of layers"
        raise ValueError(f"{law}, but {has}: give the slices of each under `modules`")
    raise ValueError(f"there is no module {name!r}: {has}")


def _part(stack: LayerStack) -> str:
    """The part of the config that tells of a stack."""
    return stack.full.rpartition(".")[0]


def _owner(stack: LayerStack, stacks: Sequence[LayerStack]) -> str:
    """What the names of all that belongs to a stack begin with, and those of no other stack."""
    parts = stack.stem.split(".")[:-1]
    starts = (".".join(parts[: i + 1]) + "." for i in range(len(parts)))
    return next(start for start in starts if not any(o.stem.startswith(start) for o in stacks if o != stack))


def _home(source: Source, name: str, owners: dict[LayerStack, str], texts: LayerStack | None) -> LayerStack | None:
    """The stack that a tensor outside the layers belongs to, if to any."""
    if texts is not None and _BETWEEN in name:
        return None
    stack = next((stack for stack, owner in owners.items() if name.startswith(owner)), None)
    return texts if stack is None and name in known(source).vocabulary else stack


def _names(stack: LayerStack, owners: Mapping[LayerStack, str], *, seeing: bool) -> tuple[str, ...]:
    """What a stack may be called: by its role, or by where it is."""
    last = [owner.split(".")[-2] for owner in owners.values()]
    where = owners[stack].split(".")[-2]
    roles = _ROLES.get(_part(stack) or "text_config", ()) if seeing else ()
    return (*roles, where if last.count(where) == 1 else owners[stack][:-1])
