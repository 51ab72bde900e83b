"""Turns of the event loop, shared out: small pieces of work must not add up to a long one."""

from __future__ import annotations

import asyncio
from collections import deque

PIECES = 4
"""Pieces a turn of the loop. Reading a sampled turn or rendering passages takes 0.5 to 2 ms, so a turn stays below 10 ms."""


class LoopTurns:
    """Lets a few waiting pieces of work run in each turn of the event loop, in the order in which they came.

    When a hundred samples arrive at once, their coroutines all become ready in one turn, and nothing else (timers, sockets, a
    notebook's other cells) runs until the last has parsed its tokens: 0.2 s in one piece. A coroutine that awaits
    :meth:`turn` before such a piece shares the loop instead. Bound to the event loop that first uses it.
    """

    def __init__(self, pieces: int = PIECES) -> None:
        self._pieces = pieces
        self._left = pieces
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_scheduled = False

    async def turn(self) -> None:
        """Returns at once where this turn of the loop has room, else in a later one."""
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
