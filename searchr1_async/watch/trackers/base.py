"""What a tracker is, and the base of those here: a queue, and one thread that empties it."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Protocol, Self

import anyio
import anyio.to_thread

from searchr1_async.events import Event

logger = logging.getLogger(__name__)

Timed = tuple[float, Event]
"""An event and when it came, in unix seconds."""

SECONDS_BETWEEN_BATCHES = 0.5
MAX_WAITING = 100_000
"""Events that wait for a tracker at most; those after them are lost, with one warning. A run of 1,000 episodes a second fills
it within two minutes if the service takes nothing."""


class Tracker(Protocol):
    """Receives a run's events for as long as it is open; the run opens and closes it."""

    def __call__(self, event: Event) -> None:
        """Take note of ``event``: on the event loop's thread, in microseconds, without blocking or raising."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what is left, within a few seconds; a service that hangs does not hold up the run's end."""
        ...


class QueuedTracker:
    """A tracker that may take its time: events queue up, and a thread of its own hands them on twice a second.

    A subclass overrides :meth:`open`, :meth:`write` and :meth:`close`, which all run in that one thread, and perhaps
    :meth:`wants`. Whatever they raise drops the tracker with one warning: the run goes on without it.

    Args:
        close_within: seconds that the run's end waits at most until everything is handed on. What a service has not taken by
            then is lost; its thread is left behind and does not keep the process alive.
        clock: unix seconds.
    """

    name = "tracker"

    def __init__(self, *, close_within: float = 10.0, clock: Callable[[], float] = time.time) -> None:
        self._close_within = close_within
        self._clock = clock
        self._waiting: queue.SimpleQueue[Timed] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._is_dropped = False
        self._is_full = False

    @property
    def is_dropped(self) -> bool:
        """It failed, and hears no more of the run."""
        return self._is_dropped

    def open(self) -> None:
        """Make ready; called once, first."""

    def wants(self, event: Event, now: float) -> bool:
        """Whether ``event`` is to be queued. Called on the event loop: microseconds, nothing that blocks."""
        return True

    def write(self, batch: Sequence[Timed]) -> None:
        """Hand on these events, in their order."""
        raise NotImplementedError

    def close(self) -> None:
        """Write everything that is left; called once, last, unless an earlier call failed."""

    def __call__(self, event: Event) -> None:
        if self._is_dropped or self._ending.is_set():
            return
        now = self._clock()
        if not self.wants(event, now):
            return
        if self._waiting.qsize() < MAX_WAITING:
            self._waiting.put((now, event))
        elif not self._is_full:
            self._is_full = True
            logger.warning("%s takes no events: %d wait, further ones are lost to it", self.name, MAX_WAITING)

    async def __aenter__(self) -> Self:
        if self._thread is not None:
            raise RuntimeError(f"{self.name} was open before: a tracker serves one run")
        # A thread of its own, not one of the pool: one that a service holds up must take no place there, and a daemon does
        # not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=f"tracker {self.name}", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        thread = self._thread
        assert thread is not None
        self._ending.set()
        with anyio.CancelScope(shield=True):  # a cancelled run keeps its last events too
            await anyio.to_thread.run_sync(thread.join, self._close_within)
        if thread.is_alive():
            self._is_dropped = True
            logger.warning(
                "%s did not take the run's last events within %g s and is left behind", self.name, self._close_within
            )

    def _work(self) -> None:
        is_open = False
        try:
            self.open()
            is_open = True
            while not self._ending.is_set():
                self._ending.wait(SECONDS_BETWEEN_BATCHES)
                if batch := self._taken():
                    self.write(batch)
            if batch := self._taken():
                self.write(batch)
            is_open = False
            self.close()
        except BaseException:  # of this thread alone: a service's client may even raise SystemExit
            self._is_dropped = True
            logger.warning("%s failed and hears no more of the run, which goes on", self.name, exc_info=True)
            if is_open:
                with suppress(Exception):
                    self.close()
            self._taken()

    def _taken(self) -> list[Timed]:
        """Everything that waits now."""
        batch: list[Timed] = []
        with suppress(queue.Empty):
            for _ in range(self._waiting.qsize()):
                batch.append(self._waiting.get_nowait())
        return batch


@asynccontextmanager
async def open_trackers(trackers: Sequence[Tracker]) -> AsyncIterator[tuple[Tracker, ...]]:
    """Trackers, open for as long as the block lasts; those that cannot be opened are left out, with a warning.

    At its end all are closed at once, so that several that hang cost no more time than the slowest.
    """
    opened: list[Tracker] = []
    try:
        for tracker in trackers:
            try:
                opened.append(await tracker.__aenter__())
            except Exception:
                logger.warning("tracker %r could not be opened; the run goes on without it", tracker, exc_info=True)
        yield tuple(opened)
    finally:
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as group:
                for tracker in opened:
                    group.start_soon(_closed, tracker)


async def _closed(tracker: Tracker) -> None:
    try:
        await tracker.__aexit__(None, None, None)
    except Exception:
        logger.warning("tracker %r could not be closed", tracker, exc_info=True)
