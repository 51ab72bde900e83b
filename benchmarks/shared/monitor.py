"""What a contender costs while it runs: CPU, memory, its event loop's lag, and the HTTP requests that it sends for searches.

Nothing of this project is used, since one contender lives in an environment of its own; both run the same code.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

TICK = 0.01
"""Seconds between two looks at the event loop."""
_USAGE_TICK = 0.5
_PAGE = os.sysconf("SC_PAGE_SIZE")
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Observed:
    """What was seen; times are :func:`time.monotonic` seconds, as in the service's log."""

    usage: list[tuple[float, float, float]] = field(default_factory=list)
    """When, CPU seconds of the process and its children so far, and their resident memory in bytes."""
    lags: list[tuple[float, float, float]] = field(default_factory=list)
    """When the loop was late, by how many seconds, and how many of them its own thread computed: the rest of the time the
    machine or another thread had the core."""
    looks: int = 0
    """How often the loop was looked at; only lags over :data:`LAG_KEPT` are kept."""
    requests: dict[str, int] = field(default_factory=dict)
    """Sent through httpx (the SDK, Chroma's client) and aiohttp, by port of this machine and the last part of the path."""
    ended: bool = False
    """The contender did all its work."""

    def save(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(path: Path) -> Observed:
        """What :meth:`save` wrote."""
        return Observed(**json.loads(path.read_text()))


LAG_KEPT = 0.002
"""Seconds; what is less counts as none."""


@asynccontextmanager
async def observing(path: Path) -> AsyncIterator[Observed]:
    """Observes this process and this event loop until the block ends, and then writes ``path``."""
    observed = Observed()
    _count_requests(observed)
    stop = threading.Event()
    thread = threading.Thread(target=_watch_usage, args=(observed, stop), name="usage", daemon=True)
    thread.start()
    task = asyncio.create_task(_watch_loop(observed))
    try:
        yield observed
        observed.ended = True
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        stop.set()
        thread.join()
        observed.save(path)


async def _watch_loop(observed: Observed) -> None:
    while True:
        due, computed = time.monotonic() + TICK, time.thread_time()
        await asyncio.sleep(TICK)
        now = time.monotonic()
        observed.looks += 1
        if now - due > LAG_KEPT:
            observed.lags.append((now, now - due, min(now - due, time.thread_time() - computed)))


def _watch_usage(observed: Observed, stop: threading.Event) -> None:
    while True:
        cpu, memory = usage()
        observed.usage.append((time.monotonic(), cpu, memory))
        if stop.wait(_USAGE_TICK):
            return


def usage() -> tuple[float, float]:
    """CPU seconds and resident bytes of this process and its children."""
    cpu, memory = time.process_time(), _resident(os.getpid())
    for child in _children(os.getpid()):
        with contextlib.suppress(OSError, IndexError, ValueError):
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            cpu += (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS
            memory += _resident(child)
    return cpu, memory


def _resident(process: int) -> float:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * _PAGE


def _children(process: int) -> list[int]:
    """All processes below this one."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{process}/task").iterdir():
            with contextlib.suppress(OSError):
                for child in map(int, (thread / "children").read_text().split()):
                    found += [child, *_children(child)]
    return found


def _count_requests(observed: Observed) -> None:
    """Counts where httpx and aiohttp send; a request of another library is not seen."""
    import aiohttp
    import httpx

    send, request = httpx.AsyncClient.send, aiohttp.ClientSession._request

    def count(port: int | None, path: str) -> None:
        key = f"{port} {path.rpartition('/')[2]}"
        observed.requests[key] = observed.requests.get(key, 0) + 1

    async def counted_send(self: Any, sent: Any, *args: Any, **kwargs: Any) -> Any:
        count(sent.url.port, sent.url.path)
        return await send(self, sent, *args, **kwargs)

    async def counted_request(self: Any, method: str, url: Any, **kwargs: Any) -> Any:
        parts = urlsplit(str(url))
        count(parts.port, parts.path)
        return await request(self, method, url, **kwargs)

    httpx.AsyncClient.send = counted_send  # pyright: ignore[reportAttributeAccessIssue]
    aiohttp.ClientSession._request = counted_request  # pyright: ignore[reportAttributeAccessIssue]


def run_contender(play: Callable[[dict[str, Any]], Coroutine[Any, Any, None]]) -> None:
    """The main program of a contender: plays the settings in the file that its argument names, and logs to the file that they name."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    log_to(Path(settings["log"]))
    asyncio.run(play(settings))


def log_to(path: Path) -> None:
    """Standard output and error of this process go to a file: what a contender prints is no concern of the benchmark."""
    stream = path.open("ab", buffering=0)
    for number in (1, 2):
        os.dup2(stream.fileno(), number)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
