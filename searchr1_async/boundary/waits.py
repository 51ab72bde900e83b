"""Waiting for something outside: every wait has a bound, and one over 5 seconds is reported once, with its reason and its end.

Time that a run is held counts for none of the bounds that :class:`PausableDeadlines` keeps.
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
"""Takes one sentence for the person who watches, such as ``lambda text: emit(Notice(text))``."""


def say_nothing(text: str) -> None:
    """For waits that nobody watches."""


@contextmanager
def bounded_wait(reason: str, tell: Tell, at_most: float, deadlines: PausableDeadlines | None = None) -> Iterator[None]:
    """A block that waits for something outside. Costs a timer, no task.

    Args:
        reason: what is waited for, and why: ``"the Tinker service does not answer"``.
        tell: gets the reason and the end of the wait, :data:`TOLD_AFTER` seconds from now, if the block still runs then.
        at_most: seconds after which the block is cut.
        deadlines: the time stands still while these are held.

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
    """Reports a wait that the caller makes, if it is over :data:`TOLD_AFTER` seconds. The caller bounds ``seconds``."""
    if seconds > TOLD_AFTER:
        tell(_sentence(reason, seconds))


async def pause(seconds: float, reason: str, tell: Tell) -> None:
    """Sleeps; a sleep over :data:`TOLD_AFTER` seconds is reported at its beginning. The caller bounds ``seconds``."""
    tell_of(seconds, reason, tell)
    await anyio.sleep(seconds)


class PausableDeadlines:
    """Deadlines that stand still while a run is held: all of them are put off together. Used in one event loop."""

    def __init__(self) -> None:
        self._left: dict[anyio.CancelScope, float] = {}
        """Of each limit under way: seconds left while it is held, else what it was given."""
        self._paused_at: float | None = None
        self._held = 0.0

    @property
    def held(self) -> float:
        """Seconds of all pauses so far."""
        return self._held + (0.0 if self._paused_at is None else anyio.current_time() - self._paused_at)

    @contextmanager
    def limit(self, seconds: float | None) -> Iterator[anyio.CancelScope]:
        """Cuts the block after so many seconds in which the run was not held; None: never. ``cancelled_caught`` tells."""
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
        """Holds all of them, or lets them go on."""
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
        """While the block runs, :func:`time_limit` in it is one of these."""
        token = _governing.set(self)
        try:
            yield
        finally:
            _governing.reset(token)


_governing: ContextVar[PausableDeadlines | None] = ContextVar("deadlines", default=None)


@contextmanager
def time_limit(seconds: float) -> Iterator[anyio.CancelScope]:
    """Cuts the block after so many seconds in which the run that it belongs to was not held. ``cancelled_caught`` tells."""
    deadlines = _governing.get()
    with anyio.move_on_after(seconds) if deadlines is None else deadlines.limit(seconds) as scope:
        yield scope


def clock_time(seconds: float) -> str:
    """The time of day so many seconds from now, with its date where that is another day: ``14:03:07``."""
    now = datetime.now().astimezone()
    then = now + timedelta(seconds=seconds)
    return f"{then:%H:%M:%S}" if then.date() == now.date() else f"{then:%Y-%m-%d %H:%M:%S}"


def _sentence(reason: str, seconds: float) -> str:
    return f"{reason}: waiting for at most {seconds:,.0f} s more, until {clock_time(max(0.0, seconds))}"
