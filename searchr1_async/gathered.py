"""Writing a little later, so that what comes close together is written at once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Generic, TypeVar

import anyio

Item = TypeVar("Item")


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


class GatheredItems(Generic[Item]):
    """Takes items as they come and has them written, many at a time.

    Args:
        write: writes these, at least one; once begun it is not cancelled.
        seconds: of gathering: what a kill may cost.
    """

    def __init__(self, write: Callable[[list[Item]], Awaitable[None]], seconds: float) -> None:
        self._write = write
        self._pending: list[Item] = []
        self._gathered = GatheredWriting(self._write_pending, seconds)

    def take(self, item: Item) -> None:
        """Writes this one soon."""
        self._pending.append(item)
        self._gathered.want()

    def writing(self) -> AbstractAsyncContextManager[None]:
        """Writes while the block runs, and what is left at its end, however that comes.

        Raises, within an exception group, what ``write`` raises.
        """
        return self._gathered.writing()

    async def _write_pending(self) -> None:
        pending, self._pending = self._pending, []
        if pending:
            # Shielded: what was taken from the list must reach the disk, though the work is stopped just now.
            with anyio.CancelScope(shield=True):
                await self._write(pending)
