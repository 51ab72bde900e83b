"""Writing a little later, so that what comes close together is written at once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio


class GatheredWriting:
    """Calls ``write`` so many seconds after something was wanted; what is wanted meanwhile goes along.

    Args:
        write: writes whatever there is by then, nothing included.
        seconds: of gathering: what a kill may cost.
    """

    def __init__(self, write: Callable[[], Awaitable[None]], seconds: float) -> None:
        self._write, self._seconds = write, seconds
        self._wanted = anyio.Event()

    def want(self) -> None:
        """There is something to write."""
        self._wanted.set()

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Writes while the block runs, and what is left at its end, however that comes.

        Raises, within an exception group, what ``write`` raises.
        """
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._run)
                yield
                tasks.cancel_scope.cancel()
        finally:
            await self._write()

    async def _run(self) -> None:
        while True:
            await self._wanted.wait()
            await anyio.sleep(self._seconds)
            self._wanted = anyio.Event()
            await self._write()
