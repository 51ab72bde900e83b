"""The search's clock and per-call deadlines."""

from __future__ import annotations

import asyncio
import time


def now_in_loop() -> float:
    """The running event loop's time, or monotonic time outside of one."""
    try:
        return asyncio.get_running_loop().time()
    except RuntimeError:
        return time.monotonic()


class Deadline:
    """When a call must be answered. Extended while a service is down (which has its own limit), and restarted after an outage.

    Args:
        seconds: from now.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.at = now_in_loop() + seconds

    def put_off(self, since: float) -> None:
        self.at = since + self.seconds
