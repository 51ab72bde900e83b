"""Detects back-pressure from the service, which the SDK hides.

On "too many requests" (429) the SDK holds all samples of its session back for 1 to 5 s, and on "paused for capacity" it retries;
callers see only longer waits. It leaves two traces: the session holder's back-off time, and the queue-state callback of a
sampling client. Both are SDK internals: if one is missing the other is used, and without both nothing is detected.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

HOLDER_FIELD = "_sample_backoff_until"
OBSERVER = "on_queue_state_change"
PAUSED = "PAUSED_CAPACITY"
"""Queue state of a service short of capacity. (Fewer samples do not help with PAUSED_RATE_LIMIT, which limits the number of
weights sampled from.)"""


class PushBackProbe:
    """Watches the sampling clients of this process. Call :meth:`watch` and :meth:`take` on one thread."""

    def __init__(self) -> None:
        self._holders: dict[int, tuple[weakref.ref[Any], Any]] = {}
        """By identity: the holder and its last seen back-off time."""
        # The SDK reports queue states on its own thread.
        self._paused = threading.Event()

    def watch(self, client: Any) -> None:
        """Adds a sampling client; clients are dropped when garbage-collected."""
        holder = getattr(client, "holder", None)
        if holder is not None and id(holder) not in self._holders:
            try:
                number = id(holder)
                reference = weakref.ref(holder, lambda _: self._holders.pop(number, None))
            except TypeError:  # not weakly referenceable, and must not be kept alive
                pass
            else:
                self._holders[number] = (reference, getattr(holder, HOLDER_FIELD, None))
        self._listen(client)

    def take(self) -> bool:
        """Whether the service pushed back since the last call."""
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
        """Wraps the client's queue-state callback."""
        if not callable(getattr(client, OBSERVER, None)) or OBSERVER in getattr(client, "__dict__", {OBSERVER: None}):
            return
        paused, kind = self._paused, type(client)
        try:
            reference = weakref.ref(client)  # a strong reference would be a cycle that keeps old clients alive
        except TypeError:
            return

        def observe(queue_state: Any, queue_state_reason: str | None) -> None:
            if getattr(queue_state, "name", "") == PAUSED:
                paused.set()
            if (owner := reference()) is not None:
                getattr(kind, OBSERVER)(owner, queue_state, queue_state_reason)

        setattr(client, OBSERVER, observe)
