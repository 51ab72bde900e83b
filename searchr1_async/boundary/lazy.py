"""Names of a package that load their module on first use (PEP 562), so that importing the package costs nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, names: Mapping[str, str], namespaces: str = ""
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package.

    Args:
        package: its ``__name__``.
        names: module to the names that it gives, separated by spaces.
        namespaces: modules of the package that are reached as its attributes; not in ``__all__``.
    """
    modules = {name: module for module, listed in names.items() for name in listed.split()}
    modules_within = namespaces.split()

    def load(name: str) -> Any:
        if name in modules:
            value = getattr(import_module(modules[name]), name)
        elif name in modules_within:
            value = import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)
        return value

    return load, lambda: sorted([*modules, *modules_within]), sorted(modules)
