"""Fair sharing of the event loop among small pieces of blocking work."""

from __future__ import annotations

import asyncio
from collections import deque

PIECES = 4
"""Pieces per loop iteration. Parsing a turn or rendering passages takes 0.5 to 2 ms, so an iteration stays below 10 ms."""


class LoopTurns:
    """Runs a few waiting pieces of work per event loop iteration, in order of arrival.

    When many samples arrive at once, their coroutines all become ready in one iteration and block the loop until the last is
    parsed. Awaiting :meth:`turn` before such work spreads it out. Bound to the event loop of its first use.
    """

    def __init__(self, pieces: int = PIECES) -> None:
        self._pieces = pieces
        self._left = pieces
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_scheduled = False

    async def turn(self) -> None:
        """Returns at once if this loop iteration has room, else in a later one."""
        loop = asyncio.get_running_loop()
        if not self._is_scheduled:
            self._is_scheduled = True
            loop.call_soon(self._renew, loop)
        if self._left and not self._waiting:
            self._left -= 1
            return
        place = loop.create_future()
        self._waiting.append(place)
        await place

    def _renew(self, loop: asyncio.AbstractEventLoop) -> None:
        self._left = self._pieces
        while self._left and self._waiting:
            place = self._waiting.popleft()
            if not place.done():  # its task may have been cancelled
                place.set_result(None)
                self._left -= 1
        self._is_scheduled = bool(self._waiting)
        if self._is_scheduled:
            loop.call_soon(self._renew, loop)
