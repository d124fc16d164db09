"""Public names that are loaded when they are first used, so that importing a package stays cheap."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def attributes(package: str, home: Mapping[str, str], made: Mapping[str, Callable[[], Any]] | None = None) -> Any:
    """The `__getattr__` of a package: each name of `home` is in the module of that name below it.

    A name of `made` is what its function gives.
    """

    def attribute(name: str) -> Any:
        module = import_module(package)
        if made and name in made:
            value = made[name]()
        elif name in home:
            value = getattr(import_module(f"{package}.{home[name]}"), name)
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(module, name, value)
        return value

    return attribute
