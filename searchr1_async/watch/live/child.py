"""Runs :mod:`searchr1_async.watch.live.drawing` in a subprocess (see there for why)."""

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
    """Drawing failed. The view logs it and continues without; it never reaches the run."""


@dataclass(frozen=True, slots=True)
class Charts:
    """What a page needs to draw its curves."""

    page: Mapping[str, Any]
    """A Vega-Lite chart per curve."""
    picture: Mapping[str, Any]
    """One chart of all curves, for the final picture."""
    vega: bytes
    """Gzipped ES module."""


class Drawer:
    """Draws in a subprocess; Vega is bundled once and cached.

    Raises:
        DrawingError: from both methods, if the subprocess fails.
    """

    def __init__(self) -> None:
        self._vega = b""

    async def charts(self, window: int, *, from_zero: bool) -> Charts:
        """The charts of a page. Takes 2 to 5 s in the background."""
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
        """A PNG. Takes 2 to 3 s."""
        return await run("picture", task)


async def run(what: Literal["charts", "vega", "picture"], task: Mapping[str, Any]) -> bytes:
    """The subprocess's output for ``task``. Cancelling kills it."""
    if not sys.executable:
        raise DrawingError("sys.executable is empty, so the drawing process cannot be started")
    drawing = _Drawing(what, json.dumps(task).encode())
    try:
        # Own limiter: drawing must not use up the engine's worker threads.
        return await anyio.to_thread.run_sync(drawing.run, limiter=anyio.CapacityLimiter(1), abandon_on_cancel=True)
    except OSError as error:
        raise DrawingError(f"the drawing process did not start: {error}") from error
    except BaseException:
        drawing.abandon()
        raise


class _Drawing:
    """One subprocess, run from a thread: on Windows a notebook's event loop has no asyncio subprocesses."""

    def __init__(self, what: str, task: bytes) -> None:
        # -P: keeps the script's folder off sys.path, whose modules would shadow others.
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
            if self._is_abandoned:  # abandoned during startup
                process.kill()
            out, said = process.communicate(self._task)
        if process.returncode:
            last = said.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
            raise DrawingError(f"drawing {self._what} failed: {last[0]}")
        return out

    def abandon(self) -> None:
        """Kill the process; its thread then cleans up."""
        self._is_abandoned = True
        if self._process is not None:
            self._process.kill()


def _environment() -> dict[str, str]:
    """The environment without likely secrets."""
    return {name: value for name, value in os.environ.items() if not any(word in name.upper() for word in _SECRETS)}
