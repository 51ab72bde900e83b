"""One emitter for several watchers, none of which can harm the run or another watcher."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from searchr1_async.events import Emit, Event

logger = logging.getLogger(__name__)


class Watchers:
    """An :data:`~searchr1_async.events.Emit` that forwards every event to each of its subscribers, in order.

    A subscriber that raises is dropped, with one warning that holds its traceback: a broken dashboard must not end a
    run of hours, nor fill its log. Exceptions that are no :class:`Exception` (an interrupt) pass through.
    """

    def __init__(self, subscribers: Iterable[Emit] = ()) -> None:
        self._subscribers: tuple[Emit, ...] = tuple(subscribers)

    @property
    def subscribers(self) -> tuple[Emit, ...]:
        return self._subscribers

    def subscribe(self, subscriber: Emit) -> None:
        """Add ``subscriber``; it sees every event from the next one on. Twice is as good as once."""
        if subscriber not in self._subscribers:
            self._subscribers = (*self._subscribers, subscriber)

    def unsubscribe(self, subscriber: Emit) -> None:
        """Remove ``subscriber``; no error when it is not there (it may have been dropped)."""
        self._subscribers = tuple(other for other in self._subscribers if other != subscriber)

    def close(self) -> None:
        """The run has ended: what comes late, from a call that nobody waits for any more, is told to nobody."""
        self._subscribers = ()

    def __call__(self, event: Event) -> None:
        # The tuple is replaced and never changed, so a subscriber may subscribe or unsubscribe while it is called.
        for subscriber in self._subscribers:
            try:
                subscriber(event)
            except Exception:
                self.unsubscribe(subscriber)
                logger.warning(
                    "watcher %r failed on %s and is not called again; the run goes on",
                    subscriber,
                    type(event).__name__,
                    exc_info=True,
                )
