"""Bounded waits for external events. A wait over 5 seconds is reported once, with its reason and end.

:class:`PausableDeadlines` do not advance while a run is paused.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timedelta

import anyio

TOLD_AFTER = 5.0
"""Seconds after which a wait is reported."""

Tell = Callable[[str], None]
"""Receives one sentence for the user, such as ``lambda text: emit(Notice(text))``."""


def say_nothing(text: str) -> None:
    """Discards reports."""


@contextmanager
def bounded_wait(reason: str, tell: Tell, at_most: float, deadlines: PausableDeadlines | None = None) -> Iterator[None]:
    """A block that waits for something external. Uses a timer, not a task.

    Args:
        reason: what is being waited for: ``"the Tinker service does not respond"``.
        tell: receives reason and end of the wait if the block still runs after :data:`TOLD_AFTER` seconds.
        at_most: timeout in seconds.
        deadlines: the timeout stops while these are paused.

    Raises:
        TimeoutError: the block took longer than ``at_most`` seconds.
    """
    loop = asyncio.get_running_loop()
    timer = loop.call_later(TOLD_AFTER, lambda: tell(_sentence(reason, at_most - TOLD_AFTER)))
    try:
        with anyio.move_on_after(at_most) if deadlines is None else deadlines.limit(at_most) as scope:
            yield
        if scope.cancelled_caught:
            raise TimeoutError
    finally:
        timer.cancel()


def tell_of(seconds: float, reason: str, tell: Tell) -> None:
    """Reports the caller's own wait if it is over :data:`TOLD_AFTER` seconds. The caller bounds ``seconds``."""
    if seconds > TOLD_AFTER:
        tell(_sentence(reason, seconds))


async def pause(seconds: float, reason: str, tell: Tell) -> None:
    """Sleeps; reports a sleep over :data:`TOLD_AFTER` seconds at its start. The caller bounds ``seconds``."""
    tell_of(seconds, reason, tell)
    await anyio.sleep(seconds)


class PausableDeadlines:
    """Deadlines that stop while a run is paused. Used in one event loop."""

    def __init__(self) -> None:
        self._left: dict[anyio.CancelScope, float] = {}
        """Per active limit: the seconds left when paused, else its full time."""
        self._paused_at: float | None = None
        self._held = 0.0

    @property
    def held(self) -> float:
        """Total seconds paused."""
        return self._held + (0.0 if self._paused_at is None else anyio.current_time() - self._paused_at)

    @contextmanager
    def limit(self, seconds: float | None) -> Iterator[anyio.CancelScope]:
        """Cancels the block after this many unpaused seconds; None: never. Check ``cancelled_caught``."""
        with anyio.CancelScope() as scope:
            if seconds is None:
                yield scope
                return
            self._left[scope] = seconds
            if self._paused_at is None:
                scope.deadline = anyio.current_time() + seconds
            try:
                yield scope
            finally:
                del self._left[scope]

    def pause(self, is_paused: bool) -> None:
        """Pauses or resumes all deadlines."""
        now = anyio.current_time()
        if is_paused and self._paused_at is None:
            self._paused_at = now
            for scope in self._left:
                self._left[scope] = scope.deadline - now
                scope.deadline = math.inf
        elif not is_paused and self._paused_at is not None:
            self._held += now - self._paused_at
            self._paused_at = None
            for scope, left in self._left.items():
                scope.deadline = now + left

    @contextmanager
    def governing(self) -> Iterator[None]:
        """Makes :func:`time_limit` in the block use these deadlines."""
        token = _governing.set(self)
        try:
            yield
        finally:
            _governing.reset(token)


_governing: ContextVar[PausableDeadlines | None] = ContextVar("deadlines", default=None)


@contextmanager
def time_limit(seconds: float) -> Iterator[anyio.CancelScope]:
    """Cancels the block after this many seconds, not counting pauses of its run. Check ``cancelled_caught``."""
    deadlines = _governing.get()
    with anyio.move_on_after(seconds) if deadlines is None else deadlines.limit(seconds) as scope:
        yield scope


def clock_time(seconds: float) -> str:
    """The local time in this many seconds: ``14:03:07``, with the date if that is another day."""
    now = datetime.now().astimezone()
    then = now + timedelta(seconds=seconds)
    return f"{then:%H:%M:%S}" if then.date() == now.date() else f"{then:%Y-%m-%d %H:%M:%S}"


def _sentence(reason: str, seconds: float) -> str:
    return f"{reason}: waiting for at most {seconds:,.0f} s more, until {clock_time(max(0.0, seconds))}"
