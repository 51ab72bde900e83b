"""Event iterators: each reader consumes the run's events at its own pace."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable
from weakref import WeakSet

import anyio

from searchr1_async.events import Event, Notice

MAX_QUEUED = 4096
"""Maximum events buffered per reader: some hold an episode of 50 KB or more."""


class EventStreams:
    """Distributes events to any number of readers; subscribe it to the run."""

    def __init__(self) -> None:
        # Weak: an abandoned or never started loop is dropped with its iterator.
        self._readers: WeakSet[_Reader] = WeakSet()

    @property
    def readers(self) -> int:
        """Number of active readers."""
        return len(self._readers)

    def __call__(self, event: Event) -> None:
        for reader in self._readers:
            reader.put(event)

    def wake(self) -> None:
        """Make readers re-check whether the run is over."""
        for reader in self._readers:
            reader.arrived.set()

    def events(self, is_over: Callable[[], bool]) -> AsyncGenerator[Event, None]:
        """Every event from now on, until ``is_over`` and the buffer is empty. A slow reader loses the oldest events and gets a
        notice with their number."""
        reader = _Reader()
        self._readers.add(reader)
        return self._read(reader, is_over)

    async def _read(self, reader: _Reader, is_over: Callable[[], bool]) -> AsyncGenerator[Event, None]:
        try:
            while True:
                for event in reader.take():
                    yield event
                if not reader.waiting:
                    if is_over():
                        return
                    await reader.arrived.wait()
        finally:
            self._readers.discard(reader)


class _Reader:
    def __init__(self) -> None:
        self.waiting: deque[Event] = deque(maxlen=MAX_QUEUED)
        self.arrived = anyio.Event()
        self._lost = 0

    def put(self, event: Event) -> None:
        self._lost += len(self.waiting) == MAX_QUEUED
        self.waiting.append(event)
        self.arrived.set()

    def take(self) -> list[Event]:
        self.arrived = anyio.Event()
        taken, lost = list(self.waiting), self._lost
        self.waiting.clear()
        self._lost = 0
        if lost:
            taken.insert(0, Notice(f"{lost} events were dropped: the reader was too slow", is_warning=True))
        return taken
