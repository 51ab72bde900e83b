"""The order of one model's training requests, as a pure state machine.

A client numbers the training requests of a model 1, 2, 3, … and may post them concurrently: the SDK posts the chunks of
one ``forward_backward`` with the first chunk last. A :class:`Sequence` hands them back in order. A number that never
comes (its client gave up before posting it) must not block the model for ever: after :attr:`Sequence.patience` seconds
the requests that wait behind the gap are given up, in words, and the sequence goes on after them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")


class AlreadyTaken(Exception):
    """A number offered twice, or offered after its turn was given up."""


@dataclass(slots=True)
class Sequence(Generic[Item]):
    """Puts items into the order of their numbers. Not thread-safe; holds no clock.

    The time that callers pass in may start anywhere but never goes back (seconds).
    """

    next_number: int = 1
    """The number whose turn it is."""
    patience: float = 120.0
    """Seconds for which items wait behind a missing number."""
    _waiting: dict[int, Item] = field(default_factory=dict)
    _blocked_since: float | None = None

    def offer(self, number: int | None, item: Item, now: float) -> list[Item]:
        """Takes an item; returns those whose turn has come, in order (often just this one, sometimes none).

        ``None`` as number is the client's way to say that it keeps no order: the item comes after all that wait.

        Raises :class:`AlreadyTaken` for a number whose turn is over or that waits already.
        """
        if number is None:
            number = max(self._waiting, default=self.next_number - 1) + 1
        if number < self.next_number or number in self._waiting:
            raise AlreadyTaken(f"request {number} was submitted already; the next one is {self.next_number}")
        self._waiting[number] = item
        return self._release(now)

    def missing(self) -> range:
        """The numbers that must come before anything that waits can run; empty when nothing waits."""
        return range(self.next_number, min(self._waiting, default=self.next_number))

    def deadline(self) -> float | None:
        """When :meth:`give_up` will have something to do, unless the missing numbers come; None: nothing waits."""
        return None if self._blocked_since is None else self._blocked_since + self.patience

    def give_up(self, now: float) -> tuple[range, list[Item]]:
        """If the patience is at its end: the numbers that never came and *all* items that waited, which are dropped.

        Items behind the gap are dropped rather than run, since an optimiser step without one of its batches would be a
        silent error. What is submitted afterwards runs normally.
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
        """Everything that waits, in order; the sequence is empty afterwards (the model is going away)."""
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
