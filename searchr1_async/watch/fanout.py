"""One emitter for several subscribers, isolated from each other's failures."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from searchr1_async.events import Emit, Event

logger = logging.getLogger(__name__)


class Watchers:
    """An :data:`~searchr1_async.events.Emit` that forwards each event to its subscribers, in order.

    A subscriber that raises is dropped, with one warning and its traceback. Exceptions outside :class:`Exception` (an
    interrupt) propagate.
    """

    def __init__(self, subscribers: Iterable[Emit] = ()) -> None:
        self._subscribers: tuple[Emit, ...] = tuple(subscribers)

    @property
    def subscribers(self) -> tuple[Emit, ...]:
        return self._subscribers

    def subscribe(self, subscriber: Emit) -> None:
        """Add ``subscriber``, from the next event on. Adding it twice has no effect."""
        if subscriber not in self._subscribers:
            self._subscribers = (*self._subscribers, subscriber)

    def unsubscribe(self, subscriber: Emit) -> None:
        """Remove ``subscriber``; no error if it is absent (it may have been dropped)."""
        self._subscribers = tuple(other for other in self._subscribers if other != subscriber)

    def close(self) -> None:
        """Remove all subscribers: late events of a finished run are discarded."""
        self._subscribers = ()

    def __call__(self, event: Event) -> None:
        # The tuple is replaced, never mutated: a subscriber may subscribe or unsubscribe during the call.
        for subscriber in self._subscribers:
            try:
                subscriber(event)
            except Exception:
                self.unsubscribe(subscriber)
                logger.warning(
                    "watcher %r failed on %s and is not called again; the run continues",
                    subscriber,
                    type(event).__name__,
                    exc_info=True,
                )
