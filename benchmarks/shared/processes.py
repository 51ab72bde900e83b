"""Programs of the benchmarks that run in processes of their own."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository."""


def command_of(module: str, *arguments: str, python: str = sys.executable) -> list[str]:
    """The command that runs a module of the benchmarks, in the environment of :func:`child_environment`."""
    return [python, "-m", module, *arguments]


def child_environment(more: Mapping[str, str] | None = None, checkout: Path = ROOT) -> dict[str, str]:
    """This process's environment, in which a child finds `benchmarks` and the package from any folder, and prints at once.

    Args:
        checkout: whose code it finds.
    """
    paths = [str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **(more or {})}
