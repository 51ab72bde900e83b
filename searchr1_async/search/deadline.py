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
    """When a call of ``seconds`` expires. Extended during an outage (which has its own limit), and restarted after it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.at = now_in_loop() + seconds

    def put_off(self, since: float) -> None:
        self.at = since + self.seconds
