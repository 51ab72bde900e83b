"""The clock of the search, and the time by which a call must be answered."""

from __future__ import annotations

import asyncio
import time


def now_in_loop() -> float:
    """Seconds by the running event loop's clock; outside of one, by the clock that asyncio's loops go by."""
    try:
        return asyncio.get_running_loop().time()
    except RuntimeError:
        return time.monotonic()


class Deadline:
    """By when a call must be answered. It is put off while a service answers nobody, which has a limit of its own; after an
    outage everyone has the whole time once more.

    Args:
        seconds: from now on.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.at = now_in_loop() + seconds

    def put_off(self, since: float) -> None:
        self.at = since + self.seconds
