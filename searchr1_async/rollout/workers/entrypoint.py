"""Entry point of a worker process, run by path: loads the player without the rest of the package.

The package itself imports Chroma, Polars and Matplotlib, the SDK and Transformers import torch, and the renderers import
OpenAI's client. Skipping these cuts start-up CPU time and memory by about two thirds.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import ModuleType

_PACKAGE = "searchr1_async"


def _enter(name: str, folder: Path) -> None:
    """Makes a package's modules importable without running its ``__init__``."""
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


def main() -> None:
    """Serves the socket whose descriptor is the first argument."""
    # Terminals and schedulers signal all processes: the parent ends this one by closing the socket.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    root = Path(__file__).resolve().parents[2]
    _enter(_PACKAGE, root)
    _enter(f"{_PACKAGE}.search", root / "search")
    sys.modules["torch"] = None  # type: ignore[assignment]  # makes Python treat it as not installed
    client = ModuleType("openai")
    vars(client)["AsyncOpenAI"] = object
    sys.modules["openai"] = client
    from searchr1_async.rollout.workers.worker import run

    run(int(sys.argv[1]))
    sys.stderr.flush()
    # Immediately: the SDK's thread and connections need no cleanup.
    os._exit(0)


if __name__ == "__main__":
    main()
