"""Runs backend work in tasks that end with the service, and settles its promises."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import anyio.to_thread
from anyio.abc import TaskGroup

from searchr1_async.errors import CheckpointError
from searchr1_async.local.backend import UserFault
from searchr1_async.local.promises import Failure, Promise, PromiseStore, Reply

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

LARGE_BYTES = 256 << 10
"""Larger bodies are encoded and decoded in a worker thread; for smaller ones the hop costs more than the work."""


class Jobs:
    """Runs work and settles its promises; errors go into the promise, never into the task group."""

    def __init__(self, promises: PromiseStore, tasks: TaskGroup) -> None:
        self.promises = promises
        self._tasks = tasks

    def start(self, promise: Promise, work: Callable[[], Awaitable[Reply]]) -> None:
        """Runs ``work`` in its own task; its reply or error settles the promise."""
        self._tasks.start_soon(self.run, promise, work)

    def start_loop(self, loop: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> None:
        """Starts a task that runs as long as the service and settles its promises itself."""
        self._tasks.start_soon(loop, *arguments)

    async def run(self, promise: Promise, work: Callable[[], Awaitable[Reply]]) -> None:
        """As :meth:`start`, in the caller's task. Raises only on the caller's own cancellation."""
        try:
            outcome: Reply | Failure = await work()
        except asyncio.CancelledError:
            # No effect if the client cancelled the promise: it is already settled.
            self.settle(promise, Failure("the service is shutting down", "server"))
            raise
        except Exception as error:
            outcome = failure_of(error)
        self.settle(promise, outcome)

    def settle(self, promise: Promise, outcome: Reply | Failure) -> None:
        self.promises.settle(promise, outcome, time.monotonic())


def failure_of(error: Exception) -> Failure:
    """The failure reported to the client. Unexpected errors are logged with their traceback."""
    if isinstance(error, UserFault):
        return Failure(str(error), "user")
    if isinstance(error, CheckpointError):
        logger.error("%s", error)
        return Failure(str(error), "server")
    logger.error("a request failed with an internal error", exc_info=error)
    return Failure(f"the service failed: {type(error).__name__}: {error}", "server")


async def result_of(future: Future[Result]) -> Result:
    """Awaits a backend's future; cancelling the caller cancels it.

    Raises the backend's exception, or :class:`RuntimeError` if the backend cancelled the future (it closed).
    """
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if future.cancelled() and not (task is not None and task.cancelling()):
            raise RuntimeError("the backend cancelled the request") from None
        raise


async def offload(size: int, function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls ``function`` in a worker thread if ``size`` (bytes) is large, else inline."""
    if size < LARGE_BYTES:
        return function(*arguments)
    return await anyio.to_thread.run_sync(function, *arguments)
