"""Waiting for something outside: every wait has a bound, and one over 5 seconds is told once, with its reason and its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

import anyio

TOLD_AFTER = 5.0
"""Seconds after which a wait is told."""

Tell = Callable[[str], None]
"""Takes one sentence for the person who watches, such as ``lambda text: emit(Notice(text))``."""


@contextmanager
def bounded_wait(reason: str, tell: Tell, at_most: float) -> Iterator[None]:
    """A block that waits for something outside. Costs a timer, no task.

    Args:
        reason: what is waited for, and why: ``"the Tinker service does not answer"``.
        tell: gets the reason and the end of the wait, :data:`TOLD_AFTER` seconds from now, if the block still runs then.
        at_most: seconds after which the block is cut.

    Raises:
        TimeoutError: the block took longer than ``at_most`` seconds.
    """
    loop = asyncio.get_running_loop()
    timer = loop.call_later(TOLD_AFTER, lambda: tell(_sentence(reason, at_most - TOLD_AFTER)))
    try:
        with anyio.fail_after(at_most):
            yield
    finally:
        timer.cancel()


def tell_of(seconds: float, reason: str, tell: Tell) -> None:
    """Tells of a wait that somebody else makes, where it is over :data:`TOLD_AFTER` seconds. The caller bounds ``seconds``."""
    if seconds > TOLD_AFTER:
        tell(_sentence(reason, seconds))


async def pause(seconds: float, reason: str, tell: Tell) -> None:
    """Sleeps; a sleep over :data:`TOLD_AFTER` seconds is told at its beginning. The caller bounds ``seconds``."""
    tell_of(seconds, reason, tell)
    await anyio.sleep(seconds)


def _sentence(reason: str, seconds: float) -> str:
    end = datetime.now().astimezone() + timedelta(seconds=max(0.0, seconds))
    day = "" if end.date() == datetime.now().astimezone().date() else f"{end:%Y-%m-%d} "
    return f"{reason}: waiting for at most {seconds:,.0f} s more, until {day}{end:%H:%M:%S}"
