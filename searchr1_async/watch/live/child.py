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
    drawing = _Drawing(what, json.dumps(task).encode())
    try:
        # A limiter of its own: the engine's threads are not to wait for it.
        return await anyio.to_thread.run_sync(drawing.run, limiter=anyio.CapacityLimiter(1), abandon_on_cancel=True)
    except OSError as error:
        raise DrawingError(f"the drawing process did not start: {error}") from error
    except BaseException:
        drawing.abandon()
        raise


class _Drawing:
    """One process, from its start to its end, in a thread: asyncio's own subprocesses a notebook's loop on Windows lacks."""

    def __init__(self, what: str, task: bytes) -> None:
        # -P: the folder of the script holds modules of ours that are not to be imported by their bare names.
        self._command = [sys.executable, "-P", str(_SCRIPT), what]
        self._what, self._task = what, task
        self._process: subprocess.Popen[bytes] | None = None
        self._is_abandoned = False

    def run(self) -> bytes:
        pipe = subprocess.PIPE
        with subprocess.Popen(
            self._command,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env=_environment(),
            start_new_session=True,  # a notebook's stop button interrupts the kernel's whole process group
        ) as process:
            self._process = process
            if self._is_abandoned:  # while it was being started
                process.kill()
            out, said = process.communicate(self._task)
        if process.returncode:
            last = said.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
            raise DrawingError(f"drawing {self._what} failed: {last[0]}")
        return out

    def abandon(self) -> None:
        """Nobody waits any more; the thread sees the process end, and closes what it held."""
        self._is_abandoned = True
        if self._process is not None:
            self._process.kill()


def _environment() -> dict[str, str]:
    """This process's, without what may be a secret: drawing needs none."""
    return {name: value for name, value in os.environ.items() if not any(word in name.upper() for word in _SECRETS)}
