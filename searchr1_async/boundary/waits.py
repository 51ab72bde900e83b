"""Waits and work beside the event loop.

A bounded wait for something external that takes over 5 seconds is reported once, with its reason and end;
:class:`PausableDeadlines` do not advance while a run is paused. Blocking work runs in threads (:func:`in_thread`,
:class:`OwnThread`), and frequent writes are combined (:class:`GatheredWriting`).
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from contextvars import ContextVar
from datetime import datetime, timedelta
from typing import Generic, ParamSpec, TypeVar

import anyio
import anyio.to_thread

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
        reason: what is being waited for: ``"the Tinker service does not respond"``.
        notify: receives reason and end of the wait if the block still runs after :data:`REPORT_AFTER` seconds.
        at_most: timeout in seconds.
        deadlines: the timeout stops while these are paused.

    Raises:
        TimeoutError: the block took longer than ``at_most`` seconds.
    """
    loop = asyncio.get_running_loop()
    timer = loop.call_later(REPORT_AFTER, lambda: notify(_sentence(reason, at_most - REPORT_AFTER)))
    try:
        with anyio.move_on_after(at_most) if deadlines is None else deadlines.limit(at_most) as scope:
            yield
        if scope.cancelled_caught:
            raise TimeoutError
    finally:
        timer.cancel()


def notify_of_wait(seconds: float, reason: str, notify: Notify) -> None:
    """Reports the caller's own wait if it is over :data:`REPORT_AFTER` seconds. The caller bounds ``seconds``."""
    if seconds > REPORT_AFTER:
        notify(_sentence(reason, seconds))


async def pause(seconds: float, reason: str, notify: Notify) -> None:
    """Sleeps; reports a sleep over :data:`REPORT_AFTER` seconds at its start. The caller bounds ``seconds``."""
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
        """Total seconds paused."""
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
    deadlines = _governing.get()
    with anyio.move_on_after(seconds) if deadlines is None else deadlines.limit(seconds) as scope:
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

    A long function should call ``anyio.from_thread.check_cancelled()`` regularly. The task group makes a plain ``Task.cancel``
    (Ctrl-C) reach it: ``to_thread.run_sync`` alone would return at once and abandon the thread.
    """
    results: list[Result] = []
    failures: list[Exception] = []

    async def work() -> None:
        try:
            results.append(await anyio.to_thread.run_sync(function))
        except Exception as error:
            failures.append(error)

    async with anyio.create_task_group() as group:
        group.start_soon(work)
    if failures:
        raise failures[0]
    return results[0]


def prepared_ahead(items: Iterator[Item]) -> Generator[Item]:
    """The same items, each prepared in a thread while the previous one is used."""
    with ThreadPoolExecutor(1, "searchr1-ahead") as pool:
        coming = pool.submit(_next_of, items)
        while found := coming.result():
            coming = pool.submit(_next_of, items)
            yield found[0]


def _next_of(items: Iterator[Item]) -> tuple[Item] | None:
    try:
        return (next(items),)
    except StopIteration:
        return None


def usable_cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


class OwnThread:
    """Runs functions one after another, always in the same thread, from any event loop.

    anyio's worker threads vary per call, and OpenMP keeps a thread pool for each thread that ever called it. A cancelled
    caller returns at once: a queued function is dropped, a running one finishes on its own.
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
