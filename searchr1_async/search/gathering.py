"""Which searches wait, which are on their way, and who waits for each: decisions only, no clock, task or client.

Natural batching: whatever has gathered while one batch was on its way makes the next. There is no waiting window, so a
lone search goes out at once and a crowd goes out together.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Waiter = TypeVar("Waiter", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Asked:
    """What became of the keys of one request."""

    new: int
    """Keys that nobody else waited for."""
    joined: int
    """Keys that were waiting or on their way already, and those given twice in the request."""


class Gathering(Generic[Key, Waiter]):
    """Keys (what is asked) and waiters (who asks), each key answered once for all who wait for it.

    Args:
        max_batch: keys that one batch may hold, at least 1.
    """

    def __init__(self, max_batch: int) -> None:
        if max_batch < 1:
            raise ValueError(f"a batch of {max_batch} holds nothing")
        self._max_batch = max_batch
        self._waiting: dict[Key, set[Waiter]] = {}  # in the order in which they were first asked
        self._sent: dict[Key, set[Waiter]] = {}

    @property
    def waiting(self) -> int:
        """Keys that are not on their way yet."""
        return len(self._waiting)

    @property
    def sent(self) -> int:
        """Keys that are on their way."""
        return len(self._sent)

    def ask(self, keys: Iterable[Key], waiter: Waiter) -> Asked:
        """Someone asks for some keys: those that are known are joined, the others wait for the next batch."""
        new = joined = 0
        for key in keys:
            place = self._sent if key in self._sent else self._waiting
            if key in place:
                joined += 1
            else:
                new += 1
            place.setdefault(key, set()).add(waiter)
        return Asked(new, joined)

    def leave(self, keys: Iterable[Key], waiter: Waiter) -> None:
        """Someone no longer waits. A key that nobody waits for any more is not sent."""
        for key in keys:
            if (waiters := self._sent.get(key)) is not None:
                waiters.discard(waiter)
            elif (waiters := self._waiting.get(key)) is not None:
                waiters.discard(waiter)
                if not waiters:
                    del self._waiting[key]

    def take(self) -> tuple[Key, ...]:
        """The next batch, the longest-waiting keys first; from now on these are on their way. Empty if none waits."""
        batch = tuple(self._waiting)[: self._max_batch]
        for key in batch:
            self._sent[key] = self._waiting.pop(key)
        return batch

    def finish(self, batch: Sequence[Key]) -> Mapping[Key, frozenset[Waiter]]:
        """A batch came back, well or ill: who waits for each of its keys. They are known no longer."""
        return {key: frozenset(self._sent.pop(key)) for key in batch}

    def give_back(self, batch: Sequence[Key]) -> None:
        """A batch was broken off: its keys wait again, before all others; those that nobody waits for are dropped."""
        returned = {key: waiters for key in batch if (waiters := self._sent.pop(key))}
        self._waiting = returned | self._waiting

    def next_waiter(self) -> Waiter | None:
        """One of those who wait for the longest-waiting key."""
        for waiters in self._waiting.values():
            return next(iter(waiters))
        return None

    def clear(self) -> frozenset[Waiter]:
        """Forgets every key that waits for a batch; who waited for one of them. Those on their way stay."""
        waiters = frozenset(waiter for found in self._waiting.values() for waiter in found)
        self._waiting = {}
        return waiters
