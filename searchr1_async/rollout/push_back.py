"""Sees what the SDK keeps to itself: that the service told it to slow down.

The SDK answers "too many requests" (429) by holding all samples of its session back for 1 to 5 s, and "paused for capacity" by
asking again; its caller sees only longer waits. Two traces of it can be read: the time until which the session's holder
backs off, and the calls by which a sampling client is told of its queue's state. Neither is promised: where one is missing, the
other is used, and without both nothing is seen.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

HOLDER_FIELD = "_sample_backoff_until"
OBSERVER = "on_queue_state_change"
PAUSED = "PAUSED_CAPACITY"
"""The state of a service that is short of capacity. (PAUSED_RATE_LIMIT is about the number of weights that are sampled from: it is
not cured by fewer samples.)"""


class PushBackProbe:
    """Watches the sampling clients of this process. :meth:`watch` and :meth:`take` are called on one thread."""

    def __init__(self) -> None:
        self._holders: dict[int, tuple[weakref.ref[Any], Any]] = {}
        """Of each holder, by its identity: itself, and the back-off last seen."""
        # The SDK tells of its queue on its own thread.
        self._paused = threading.Event()

    def watch(self, client: Any) -> None:
        """Looks at one more sampling client; one that is gone is forgotten by itself."""
        holder = getattr(client, "holder", None)
        if holder is not None and id(holder) not in self._holders:
            try:
                number = id(holder)
                reference = weakref.ref(holder, lambda _: self._holders.pop(number, None))
            except TypeError:  # it cannot be referred to weakly, and is not to be kept alive by this
                pass
            else:
                self._holders[number] = (reference, getattr(holder, HOLDER_FIELD, None))
        self._listen(client)

    def take(self) -> bool:
        """Whether the service pushed back since this was last asked."""
        pushed = self._paused.is_set()
        if pushed:
            self._paused.clear()
        for number, (reference, seen) in list(self._holders.items()):
            now = getattr(reference(), HOLDER_FIELD, None)
            if now != seen:
                self._holders[number] = (reference, now)
                pushed = pushed or now is not None
        return pushed

    def _listen(self, client: Any) -> None:
        """Hears the client's queue state, and passes it on to the client as before."""
        if not callable(getattr(client, OBSERVER, None)) or OBSERVER in getattr(client, "__dict__", {OBSERVER: None}):
            return
        paused, kind = self._paused, type(client)
        try:
            reference = weakref.ref(client)  # a reference proper would make a cycle, and keep old weights' clients
        except TypeError:
            return

        def observe(queue_state: Any, queue_state_reason: str | None) -> None:
            if getattr(queue_state, "name", "") == PAUSED:
                paused.set()
            if (owner := reference()) is not None:
                getattr(kind, OBSERVER)(owner, queue_state, queue_state_reason)

        setattr(client, OBSERVER, observe)
