"""Events for whoever reads them in a loop of their own, at their own pace."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable
from weakref import WeakSet

import anyio

from searchr1_async.events import Event, Notice

HELD = 4096
"""Events that wait for a reader at most: some hold an episode, of 50 KB and more."""


class EventStreams:
    """Hands events to any number of readers; subscribe it as an emitter."""

    def __init__(self) -> None:
        # Weak: a loop that was left in the middle, or never begun, is forgotten with its iterator.
        self._readers: WeakSet[_Reader] = WeakSet()

    @property
    def readers(self) -> int:
        """Loops that are reading."""
        return len(self._readers)

    def __call__(self, event: Event) -> None:
        for reader in self._readers:
            reader.put(event)

    def wake(self) -> None:
        """Has readers look again whether more can come."""
        for reader in self._readers:
            reader.came.set()

    def events(self, is_over: Callable[[], bool]) -> AsyncGenerator[Event, None]:
        """Every event from now on, until ``is_over`` and none is left. A reader that falls far behind loses the oldest, and is
        told how many."""
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
                    await reader.came.wait()
        finally:
            self._readers.discard(reader)


class _Reader:
    def __init__(self) -> None:
        self.waiting: deque[Event] = deque(maxlen=HELD)
        self.came = anyio.Event()
        self._lost = 0

    def put(self, event: Event) -> None:
        self._lost += len(self.waiting) == HELD
        self.waiting.append(event)
        self.came.set()

    def take(self) -> list[Event]:
        self.came = anyio.Event()
        taken, lost = list(self.waiting), self._lost
        self.waiting.clear()
        self._lost = 0
        if lost:
            taken.insert(
                0, Notice(f"{lost} events came faster than they were read, and were left out", is_warning=True)
            )
        return taken
