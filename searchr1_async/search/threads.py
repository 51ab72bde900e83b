"""A thread of one's own, for a library that blocks and wants to be called from one thread at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

Result = TypeVar("Result")
Parameters = ParamSpec("Parameters")


class OwnThread:
    """Runs functions one after another, always in the same thread, from any event loop.

    anyio's worker threads change from call to call, and OpenMP keeps a pool of threads for each thread that ever
    called it. A caller that is cancelled leaves at once: a function not begun yet is dropped, one that runs is left
    to end alone.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._executor: ThreadPoolExecutor | None = None

    async def run(
        self, function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Result:
        """The function's result, or its exception."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=self._name)
        return await asyncio.wrap_future(self._executor.submit(function, *args, **kwargs))

    def close(self) -> None:
        """Lets the thread end after what it runs; the next :meth:`run` starts another."""
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False, cancel_futures=True)
