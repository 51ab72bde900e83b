"""Debounced, coalesced writes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Generic, TypeVar

import anyio

Item = TypeVar("Item")


class GatheredWriting:
    """Calls ``write`` once, ``seconds`` after the first of several requests.

    Args:
        write: writes whatever is pending, perhaps nothing.
        seconds: the delay: the most a kill may cost.
    """

    def __init__(self, write: Callable[[], Awaitable[None]], seconds: float) -> None:
        self._write, self._seconds = write, seconds
        self._wanted = anyio.Event()

    def want(self) -> None:
        """Requests a write."""
        self._wanted.set()

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Writes during the block, and a last time at its end, even after an error.

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
    """Collects items and writes them in batches.

    Args:
        write: writes at least one item; not cancelled once started.
        seconds: the delay: the most a kill may cost.
    """

    def __init__(self, write: Callable[[list[Item]], Awaitable[None]], seconds: float) -> None:
        self._write = write
        self._pending: list[Item] = []
        self._gathered = GatheredWriting(self._write_pending, seconds)

    def take(self, item: Item) -> None:
        """Adds an item to the next write."""
        self._pending.append(item)
        self._gathered.want()

    def writing(self) -> AbstractAsyncContextManager[None]:
        """As :meth:`GatheredWriting.writing`."""
        return self._gathered.writing()

    async def _write_pending(self) -> None:
        pending, self._pending = self._pending, []
        if pending:
            # Shielded: items taken from the list must reach the disk, even if the work is being stopped.
            with anyio.CancelScope(shield=True):
                await self._write(pending)
