"""Validation of everything that enters the package, with one owner per kind of input, and the edge to the SDK.

- :mod:`.settings`: values, settings and arguments, by their annotations.
- :mod:`.paths`: paths, and atomic files.
- :mod:`.tables`: rows and cells of files and of tables in memory.
- :mod:`.signals`: what ends the work of this process.
- :mod:`.network`: URLs and proxies.
- :mod:`.waits`: bounded waits, deadlines that can stand still, and work in threads.
- :mod:`.sdk`: health of a service and errors of the SDK.
- :mod:`.compat`: interfaces of the SDK that are not public.

The rest of the package trusts validated values. Any module may import this package; it imports only the errors.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def lazy_names(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package whose names load their module on first use (PEP 562).

    The names are the imports of the package's ``if TYPE_CHECKING:`` block, so type checkers see exactly what there is.

    Args:
        package: its ``__name__``.
        file: its ``__file__``.
    """
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    origins = {alias.name: node.module or "" for node in imports for alias in node.names}

    def load(name: str) -> Any:
        if name not in origins:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = origins[name]
        if module == package:
            value = import_module(f"{package}.{name}")
        else:
            value = getattr(__import__(module, fromlist=[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return load, lambda: sorted(origins), sorted(origins)
