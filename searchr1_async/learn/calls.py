"""Deadlines and errors of calls on a training client."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import tinker

from searchr1_async.boundary.network import SDK_FAULTS, fault_text
from searchr1_async.boundary.waits import PausableDeadlines
from searchr1_async.errors import SearchR1Error, ServiceError


class TrainingCalls:
    """Deadline of training calls, which stops while the run is paused, and their errors.

    Args:
        deadline: seconds for all training calls of one step, after which the service counts as dead.
    """

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self._deadlines = PausableDeadlines()

    def pause(self, is_paused: bool) -> None:
        """Pauses or resumes the deadlines of pending calls."""
        self._deadlines.pause(is_paused)

    @contextmanager
    def waiting(self, doing: str, error: type[SearchR1Error] = ServiceError) -> Iterator[None]:
        """Context for waiting on the service.

        Args:
            doing: the operation, for the error message.
            error: error class raised on failure or timeout.
        """
        try:
            with self._deadlines.limit(self.deadline) as scope:
                yield
        except SearchR1Error:
            raise
        except SDK_FAULTS as fault:
            raise error(f"{doing} failed at the Tinker service: {fault_text(fault)}") from fault
        if scope.cancelled_caught:
            raise error(
                f"{doing} took over {self.deadline:g} s at the Tinker service: if it is only slow, or paused for capacity, raise "
                "training_deadline"
            )


async def until_done(future: tinker.APIFuture[Any]) -> None:
    """Waits without awaiting the future, which would cancel the call with the wait, and raise its error here."""
    done = asyncio.Event()
    when_done(future, done.set, also_failed=True)
    await done.wait()


def when_done(future: tinker.APIFuture[Any], tell: Callable[[], None], *, also_failed: bool = False) -> None:
    """Calls ``tell`` in this event loop when the SDK call ends, unless the loop is closed."""
    loop = asyncio.get_running_loop()

    def ended(inner: concurrent.futures.Future[Any]) -> None:
        is_good = not inner.cancelled() and inner.exception() is None
        if (is_good or also_failed) and not loop.is_closed():
            with suppress(RuntimeError):  # closed just now
                loop.call_soon_threadsafe(tell)

    future.future().add_done_callback(ended)
