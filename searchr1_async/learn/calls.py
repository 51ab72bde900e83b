"""Calls on a training client: their deadline, their errors, and when they have ended."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import tinker

from searchr1_async.errors import ServiceError

TRAINING_DEADLINE = 3600.0
"""Seconds for one step's training calls in all; a service that needs longer is taken for dead."""


class training_faults:  # noqa: N801
    """Names what was being done when the SDK fails, as one of our own errors."""

    def __init__(self, doing: str, error: type[Exception] = ServiceError) -> None:
        self._doing, self._error = doing, error

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, TimeoutError):
            raise self._error(f"{self._doing} took over {TRAINING_DEADLINE:g} s at the Tinker service") from error
        if isinstance(error, tinker.TinkerError | ValueError | KeyError):
            raise self._error(f"{self._doing} failed at the Tinker service: {type(error).__name__}: {error}") from error


async def until_done(future: tinker.APIFuture[Any]) -> None:
    """Awaiting the future itself would cancel the call when the wait is cancelled, and raise its error here."""
    done = asyncio.Event()
    when_done(future, done.set, also_failed=True)
    await done.wait()


def when_done(future: tinker.APIFuture[Any], tell: Callable[[], None], *, also_failed: bool = False) -> None:
    """Calls ``tell`` in this event loop when the SDK's call has ended; its threads outlive the loop."""
    loop = asyncio.get_running_loop()

    def ended(inner: concurrent.futures.Future[Any]) -> None:
        is_good = not inner.cancelled() and inner.exception() is None
        if (is_good or also_failed) and not loop.is_closed():
            with suppress(RuntimeError):  # closed between the two
                loop.call_soon_threadsafe(tell)

    future.future().add_done_callback(ended)
