"""Entry script of the child process: runs the service without importing the engine.

``python -m searchr1_async.local`` would run the package's ``__init__``, which imports the whole engine (seconds and 240 MB).
This script registers the package without executing it; it is executed on first attribute access.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

_PACKAGE = "searchr1_async"


def _enter_package() -> None:
    folder = Path(__file__).resolve().parent.parent
    spec = importlib.util.spec_from_file_location(
        _PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    loader = spec.loader
    assert loader is not None
    package = importlib.util.module_from_spec(spec)

    def run_and_get(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        vars(package).pop("__getattr__", None)
        loader.exec_module(package)
        return getattr(package, name)

    vars(package)["__getattr__"] = run_and_get
    sys.modules[_PACKAGE] = package


if __name__ == "__main__":
    _enter_package()
    from searchr1_async.local.__main__ import run_child

    run_child()
