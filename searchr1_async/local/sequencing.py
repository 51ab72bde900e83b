"""Puts one model's training requests into order, as a pure state machine.

Clients number a model's requests 1, 2, 3, … and may post them out of order: the SDK posts the first chunk of a
``forward_backward`` last. A number that never arrives must not block the model forever, so after
:attr:`Sequence.patience` seconds the requests behind the gap are dropped and the sequence continues after them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")


class AlreadyTaken(Exception):
    """A number was offered twice, or after it was dropped."""


@dataclass(slots=True)
class Sequence(Generic[Item]):
    """Releases items in number order. Not thread-safe. Callers pass the time (monotonic seconds)."""

    next_number: int = 1
    patience: float = 120.0
    """Seconds that items wait for a missing number."""
    _waiting: dict[int, Item] = field(default_factory=dict)
    _blocked_since: float | None = None

    def offer(self, number: int | None, item: Item, now: float) -> list[Item]:
        """Adds an item; returns the items that are now ready, in order.

        An item without a number goes after all waiting ones. Raises :class:`AlreadyTaken` for a number already used.
        """
        if number is None:
            number = max(self._waiting, default=self.next_number - 1) + 1
        if number < self.next_number or number in self._waiting:
            raise AlreadyTaken(f"request {number} was already submitted; the next one is {self.next_number}")
        self._waiting[number] = item
        return self._release(now)

    def missing(self) -> range:
        """The numbers missing before the first waiting item; empty when nothing waits."""
        return range(self.next_number, min(self._waiting, default=self.next_number))

    def deadline(self) -> float | None:
        """When :meth:`give_up` will drop the waiting items; None: nothing waits."""
        return None if self._blocked_since is None else self._blocked_since + self.patience

    def give_up(self, now: float) -> tuple[range, list[Item]]:
        """After the deadline, drops all waiting items; returns the missing numbers and the dropped items.

        Running them instead would silently apply an optimizer step without one of its batches.
        """
        deadline = self.deadline()
        if deadline is None or now < deadline:
            return range(0), []
        gap = self.missing()
        dropped = [self._waiting[number] for number in sorted(self._waiting)]
        self.next_number = max(self._waiting) + 1
        self._waiting.clear()
        self._blocked_since = None
        return gap, dropped

    def drain(self) -> list[Item]:
        """Removes and returns all waiting items, in order."""
        items = [self._waiting[number] for number in sorted(self._waiting)]
        self._waiting.clear()
        self._blocked_since = None
        return items

    def _release(self, now: float) -> list[Item]:
        ready: list[Item] = []
        while self.next_number in self._waiting:
            ready.append(self._waiting.pop(self.next_number))
            self.next_number += 1
        if not self._waiting:
            self._blocked_since = None
        elif ready or self._blocked_since is None:
            self._blocked_since = now
        return ready
