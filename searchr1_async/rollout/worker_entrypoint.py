"""Entry point of a worker process: loads the player without torch, which the SDK and Transformers import if it is there, and without
OpenAI's client, which the renderers import. That cuts start-up CPU time and memory by more than half."""

from __future__ import annotations

import os
import signal
import sys
from types import ModuleType


def main() -> None:
    """Serves the socket whose descriptor is the first argument."""
    # Terminals and schedulers signal all processes: the parent ends this one by closing the socket.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.modules["torch"] = None  # type: ignore[assignment]  # makes Python treat it as not installed
    client = ModuleType("openai")
    vars(client)["AsyncOpenAI"] = object
    sys.modules["openai"] = client
    from searchr1_async.rollout.worker import run

    run(int(sys.argv[1]))
    sys.stderr.flush()
    # Immediately: the SDK's thread and connections need no cleanup.
    os._exit(0)


if __name__ == "__main__":
    main()
