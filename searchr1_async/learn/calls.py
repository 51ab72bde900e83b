"""Calls on a training client: their deadline, their errors, and when they have ended."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import tinker

from searchr1_async.boundary.sdk import SDK_FAULTS, fault_text
from searchr1_async.boundary.waits import PausableDeadlines
from searchr1_async.errors import SearchR1Error, ServiceError


class TrainingCalls:
    """The time limit of training calls, which stands still while the run is held, and the names of their errors.

    Args:
        deadline: seconds for one step's training calls in all; a service that needs longer is taken for dead.
    """

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self._deadlines = PausableDeadlines()

    def pause(self, is_paused: bool) -> None:
        """Holds the time of calls under way, or lets it go on."""
        self._deadlines.pause(is_paused)

    @contextmanager
    def waiting(self, doing: str, error: type[SearchR1Error] = ServiceError) -> Iterator[None]:
        """A block that waits for the service.

        Args:
            doing: what is being done, for the message.
            error: what is raised when it fails or takes too long.
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
                f"{doing} took over {self.deadline:g} s at the Tinker service: if it is only slow, or paused for capacity, wait "
                "longer (training_deadline)"
            )


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
