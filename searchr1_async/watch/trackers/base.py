"""The tracker interface, and a base class with a queue and one worker thread."""

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
"""An event and its arrival time in unix seconds."""

SECONDS_BETWEEN_BATCHES = 0.5
MAX_WAITING = 100_000
"""Maximum queued events per tracker; later ones are lost, with one warning. At 1,000 episodes per second it fills within two
minutes if the service takes nothing."""


class Tracker(Protocol):
    """Receives a run's events; the run opens and closes it."""

    def __call__(self, event: Event) -> None:
        """Record ``event``. Called on the event loop's thread: return within microseconds, without blocking or raising."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Flush within a few seconds; a hanging service must not delay the end of the run."""
        ...


class QueuedTracker:
    """Tracker with a queue: its own thread writes events twice per second.

    Subclasses override :meth:`open`, :meth:`write` and :meth:`close`, which all run in that thread, and optionally :meth:`wants`.
    If one of them raises, the tracker is dropped with one warning and the run continues.

    Args:
        close_within: maximum seconds that the end of the run waits for the flush. Later events are lost; the daemon thread is
            abandoned.
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
        """It failed and receives no more events."""
        return self._is_dropped

    def open(self) -> None:
        """Set up; called once, first."""

    def wants(self, event: Event, now: float) -> bool:
        """Whether to queue ``event``. Called on the event loop: must not block."""
        return True

    def write(self, batch: Sequence[Timed]) -> None:
        """Write these events, in order."""
        raise NotImplementedError

    def close(self) -> None:
        """Flush; called once, last, unless an earlier call failed."""

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
            logger.warning("%s is too slow: %d events are queued, further ones are lost to it", self.name, MAX_WAITING)

    async def __aenter__(self) -> Self:
        if self._thread is not None:
            raise RuntimeError(f"{self.name} was already opened: a tracker serves one run")
        # Own daemon thread: a hanging service must neither occupy the pool nor keep the process alive.
        self._thread = threading.Thread(target=self._work, name=f"tracker {self.name}", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        thread = self._thread
        assert thread is not None
        self._ending.set()
        with anyio.CancelScope(shield=True):  # flush even if the run was cancelled
            await anyio.to_thread.run_sync(thread.join, self._close_within)
        if thread.is_alive():
            self._is_dropped = True
            logger.warning(
                "%s did not accept the run's last events within %g s and was abandoned", self.name, self._close_within
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
        except BaseException:  # a service's client may even raise SystemExit
            self._is_dropped = True
            logger.warning("%s failed and receives no more events; the run continues", self.name, exc_info=True)
            if is_open:
                with suppress(Exception):
                    self.close()
            self._taken()

    def _taken(self) -> list[Timed]:
        """Drain the queue."""
        batch: list[Timed] = []
        with suppress(queue.Empty):
            for _ in range(self._waiting.qsize()):
                batch.append(self._waiting.get_nowait())
        return batch


@asynccontextmanager
async def open_trackers(trackers: Sequence[Tracker]) -> AsyncIterator[tuple[Tracker, ...]]:
    """Open trackers for the duration of the block; those that fail to open are skipped with a warning.

    They are closed concurrently, so several that hang take only as long as the slowest.
    """
    opened: list[Tracker] = []
    try:
        for tracker in trackers:
            try:
                opened.append(await tracker.__aenter__())
            except Exception:
                logger.warning("tracker %r could not be opened; the run continues without it", tracker, exc_info=True)
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
