"""What a worker process runs, by its path: the player without the rest of the package.

Importing the package itself, or its search, brings in Chroma, Polars and Matplotlib. The SDK and Transformers import torch
where it is installed, and the renderers' package imports OpenAI's client for functions of its own that nobody here calls. Without
these a worker is up after 2.1 s of CPU instead of 5.9 s, and takes 93 MB instead of 323 MB.
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
    """Plays what comes over the socket whose number is the first argument, until that is closed."""
    # Ctrl-C goes to a terminal's whole process group, a scheduler's SIGTERM to all processes of a job: the parent decides when
    # this process ends, by closing the socket.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    root = Path(__file__).resolve().parents[2]
    _enter(_PACKAGE, root)
    _enter(f"{_PACKAGE}.search", root / "search")
    sys.modules["torch"] = None  # type: ignore[assignment]  # as Python says "not installed"
    client = ModuleType("openai")
    vars(client)["AsyncOpenAI"] = object
    sys.modules["openai"] = client
    from searchr1_async.rollout.workers.worker import run

    run(int(sys.argv[1]))
    sys.stderr.flush()
    # At once: the SDK's thread and its connections end with the process, and have nothing left to do.
    os._exit(0)


if __name__ == "__main__":
    main()
