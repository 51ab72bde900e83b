"""Hedging: a request that is slow is sent a second time, and the first answer counts.

After Dean and Barroso, "The Tail at Scale", CACM 56(2), 2013: a second request after the 95th percentile of the latency
cuts the tail for about 5 % more requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

Result = TypeVar("Result")
Flight = TypeVar("Flight")

HEDGE_AFTER_REQUESTS, RECENT_REQUESTS = 50, 400
"""Requests answered before the slowest of them can be told, and those that still count."""


class Slowest:
    """After what time a request is among the slowest of late: a pure count of latencies.

    Args:
        fraction: how many of the requests those are; 0 means that none is hedged.
    """

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction
        self._recent: deque[float] = deque(maxlen=RECENT_REQUESTS)

    def add(self, seconds: float) -> None:
        """A request took so long."""
        self._recent.append(seconds)

    def delay(self, *, sent: int, hedged: int) -> float | None:
        """Seconds after which a request is to be sent a second time; None where it is not.

        Args:
            sent: requests so far.
            hedged: of them, second ones: no more than their share, also while the service slows down.
        """
        if not self._fraction or hedged >= self._fraction * sent or len(self._recent) < HEDGE_AFTER_REQUESTS:
            return None
        # A little more: where all take the same time, none is slow.
        return 1.05 * sorted(self._recent)[int((1 - self._fraction) * len(self._recent))]


async def hedged(
    request: Callable[[], Awaitable[Result]],
    delay: float,
    begin: Callable[[], Flight | None],
    end: Callable[[Flight], None],
) -> Result:
    """The result of a request, or of a second one like it that is begun after ``delay``: whichever comes first.

    Args:
        request: makes one.
        delay: seconds.
        begin: takes room for the second; None where there is none.
        end: gives that room back.

    Raises:
        Exception: that of the first to fail, where none succeeds.
    """
    answers: list[Result] = []
    errors: list[Exception] = []
    running = 1

    async def race() -> None:
        nonlocal running
        try:
            answers.append(await request())
        except Exception as error:
            errors.append(error)
        running -= 1
        if answers or not running:
            racers.cancel_scope.cancel()

    async with anyio.create_task_group() as racers:
        racers.start_soon(race)
        await anyio.sleep(delay)
        if (flight := begin()) is not None:
            running += 1
            try:
                await race()
            finally:
                end(flight)
    if not answers:
        raise errors[0]
    return answers[0]
