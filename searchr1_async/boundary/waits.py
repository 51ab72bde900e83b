"""Waits that are bounded and reported, deadlines that stop while a run is paused, and work in threads."""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from datetime import datetime, timedelta
from typing import Generic, ParamSpec, TypeVar, cast

import anyio
import anyio.to_thread

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Item = TypeVar("Item")
Parameters = ParamSpec("Parameters")
REPORT_AFTER = 5.0
"""Seconds after which a wait is reported."""

Notify = Callable[[str], None]
"""Receives one sentence for the user, such as ``lambda text: emit(Notice(text))``."""


def notify_nobody(text: str) -> None:
    """Discards reports."""


@contextmanager
def bounded_wait(
    reason: str, notify: Notify, at_most: float, deadlines: PausableDeadlines | None = None
) -> Iterator[None]:
    """A block that waits for something external. Uses a timer, not a task.

    Args:
        reason: what is being waited for; ``notify`` receives it, with the end of the wait, after :data:`REPORT_AFTER` seconds.
        at_most: timeout in seconds, which stops while ``deadlines`` are paused.

    Raises:
        TimeoutError: the block took longer than ``at_most`` seconds.
    """
    rest = at_most - REPORT_AFTER
    timer = asyncio.get_running_loop().call_later(REPORT_AFTER, lambda: notify(_sentence(reason, rest)))
    try:
        with (deadlines or PausableDeadlines()).limit(at_most) as scope:
            yield
        if scope.cancelled_caught:
            raise TimeoutError
    finally:
        timer.cancel()


def notify_of_wait(seconds: float, reason: str, notify: Notify) -> None:
    """Reports the caller's own wait if it is over :data:`REPORT_AFTER` seconds."""
    if seconds > REPORT_AFTER:
        notify(_sentence(reason, seconds))


async def pause(seconds: float, reason: str, notify: Notify) -> None:
    """Sleeps; reports a sleep over :data:`REPORT_AFTER` seconds at its start."""
    notify_of_wait(seconds, reason, notify)
    await anyio.sleep(seconds)


class PausableDeadlines:
    """Deadlines that stop while a run is paused. Used in one event loop."""

    def __init__(self) -> None:
        self._left: dict[anyio.CancelScope, float] = {}
        """Per active limit: the seconds left when paused, else its full time."""
        self._paused_at: float | None = None
        self._paused_seconds = 0.0

    @property
    def paused_seconds(self) -> float:
        return self._paused_seconds + (0.0 if self._paused_at is None else anyio.current_time() - self._paused_at)

    @contextmanager
    def limit(self, seconds: float | None) -> Iterator[anyio.CancelScope]:
        """Cancels the block after this many unpaused seconds; None: never. Check ``cancelled_caught``."""
        with anyio.CancelScope() as scope:
            if seconds is None:
                yield scope
                return
            self._left[scope] = seconds
            if self._paused_at is None:
                scope.deadline = anyio.current_time() + seconds
            try:
                yield scope
            finally:
                del self._left[scope]

    def pause(self, is_paused: bool) -> None:
        """Pauses or resumes all deadlines."""
        now = anyio.current_time()
        if is_paused and self._paused_at is None:
            self._paused_at = now
            for scope in self._left:
                self._left[scope] = scope.deadline - now
                scope.deadline = math.inf
        elif not is_paused and self._paused_at is not None:
            self._paused_seconds += now - self._paused_at
            self._paused_at = None
            for scope, left in self._left.items():
                scope.deadline = now + left

    @contextmanager
    def governing(self) -> Iterator[None]:
        """Makes :func:`time_limit` in the block use these deadlines."""
        token = _governing.set(self)
        try:
            yield
        finally:
            _governing.reset(token)


_governing: ContextVar[PausableDeadlines | None] = ContextVar("deadlines", default=None)


@contextmanager
def time_limit(seconds: float) -> Iterator[anyio.CancelScope]:
    """Cancels the block after this many seconds, not counting pauses of its run. Check ``cancelled_caught``."""
    with (_governing.get() or PausableDeadlines()).limit(seconds) as scope:
        yield scope


def clock_time(seconds: float) -> str:
    """The local time in this many seconds: ``14:03:07``, with the date if that is another day."""
    now = datetime.now().astimezone()
    then = now + timedelta(seconds=seconds)
    return f"{then:%H:%M:%S}" if then.date() == now.date() else f"{then:%Y-%m-%d %H:%M:%S}"


def _sentence(reason: str, seconds: float) -> str:
    return f"{reason}: waiting for at most {seconds:,.0f} s more, until {clock_time(max(0.0, seconds))}"


async def in_thread(function: Callable[[], Result]) -> Result:
    """Runs a function in a thread and waits for it even when cancelled, so that its files are free afterwards.

    A long function should call ``anyio.from_thread.check_cancelled()``.
    """
    results: list[Result] = []

    async def work() -> None:
        results.append(await anyio.to_thread.run_sync(function))

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(work)
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed.exceptions[0].__cause__
    return results[0]


def prepared_ahead(items: Iterator[Item]) -> Generator[Item]:
    """The same items, each prepared in a thread while the previous one is used."""
    end = object()
    with ThreadPoolExecutor(1, "searchr1-ahead") as pool:
        coming = pool.submit(next, items, end)
        while (found := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield cast(Item, found)


def usable_cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class GatheredItems(Generic[Item]):
    """Collects items and writes them in batches, ``seconds`` after the first; a write is not cancelled once started."""

    def __init__(self, write: Callable[[list[Item]], Awaitable[None]], seconds: float) -> None:
        self._write_items, self._seconds = write, seconds
        self._pending: list[Item] = []
        self._wanted = anyio.Event()

    def take(self, item: Item) -> None:
        """Adds an item to the next write."""
        self._pending.append(item)
        self._wanted.set()

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Writes during the block, and at its end, even after an error. Raises what ``write`` raises, perhaps in an exception group.

        After an error a last write that fails as well is logged: why the block failed matters more.
        """
        has_failed = False
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._run)
                yield
                tasks.cancel_scope.cancel()
        except Exception:
            has_failed = True
            raise
        finally:
            try:
                await self._write()
            except Exception as error:
                if not has_failed:
                    raise
                logger.warning("the last write failed as well: %s", error)

    async def _run(self) -> None:
        while True:
            await self._wanted.wait()
            await anyio.sleep(self._seconds)
            self._wanted = anyio.Event()
            await self._write()

    async def _write(self) -> None:
        pending, self._pending = self._pending, []
        if pending:
            with anyio.CancelScope(shield=True):
                await self._write_items(pending)


class OwnThread:
    """Runs functions one after another, always in the same thread: OpenMP keeps a thread pool for each thread that ever called it.

    A cancelled caller returns at once: a queued function is dropped, a running one finishes on its own.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._executor: ThreadPoolExecutor | None = None

    async def run(
        self, function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Result:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=self._name)
        return await asyncio.wrap_future(self._executor.submit(function, *args, **kwargs))

    def close(self) -> None:
        """Ends the thread after its current function; the next :meth:`run` starts another."""
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False, cancel_futures=True)
