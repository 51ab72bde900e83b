"""Has things drawn in another process (see :mod:`searchr1_async.watch.live.drawing` for why)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import anyio

_SCRIPT = Path(__file__).with_name("drawing.py")
_SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIALS")


class DrawingError(Exception):
    """Nothing was drawn. A view says so in its log and goes on without; it never reaches the run."""


@dataclass(frozen=True, slots=True)
class Charts:
    """What a page needs for its curves."""

    page: Mapping[str, Any]
    """A Vega-Lite chart for each curve."""
    picture: Mapping[str, Any]
    """One of them all, for the end."""
    vega: bytes
    """Gzipped ES module."""


class Drawer:
    """Draws in a child process; Vega is bundled once and kept.

    Raises:
        DrawingError: from both methods, where the process fails.
    """

    def __init__(self) -> None:
        self._vega = b""

    async def charts(self, window: int, *, from_zero: bool) -> Charts:
        """The charts of a page: 2 to 5 s, in the background."""
        said: list[bytes] = []

        async def specs() -> None:
            said.append(await run("charts", {"window": window, "from_zero": from_zero}))

        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(specs)
                if not self._vega:
                    self._vega = await run("vega", {})
        except* DrawingError as group:
            raise group.exceptions[0] from None
        return Charts(**json.loads(said[0]), vega=self._vega)

    async def picture(self, task: Mapping[str, Any]) -> bytes:
        """A PNG: 2 to 3 s."""
        return await run("picture", task)


async def run(what: Literal["charts", "vega", "picture"], task: Mapping[str, Any]) -> bytes:
    """What the drawing process gives for ``task``. Cancelling kills it."""
    if not sys.executable:
        raise DrawingError("this Python does not know its own program, so nothing can be drawn")
    # A thread and not asyncio's own subprocesses, which a notebook's loop on Windows lacks. -P: the folder of the script holds
    # modules of ours that are not to be imported by their bare names.
    command = [sys.executable, "-P", str(_SCRIPT), what]
    limiter = anyio.CapacityLimiter(1)  # of its own: the engine's threads are not to wait for it

    def start() -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=_environment())

    try:
        process = await anyio.to_thread.run_sync(start, limiter=limiter)
    except OSError as error:
        raise DrawingError(f"the drawing process did not start: {error}") from error
    try:
        out, said = await anyio.to_thread.run_sync(
            process.communicate, json.dumps(task).encode(), limiter=limiter, abandon_on_cancel=True
        )
    except BaseException:
        process.kill()  # the abandoned thread then reads to the end and reaps it
        raise
    if process.returncode:
        last = said.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        raise DrawingError(f"drawing {what} failed: {last[0]}")
    return out


def _environment() -> dict[str, str]:
    """This process's, without what may be a secret: drawing needs none."""
    return {name: value for name, value in os.environ.items() if not any(word in name.upper() for word in _SECRETS)}
