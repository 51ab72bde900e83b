"""Which keys wait, which are on their way, and who waits for each: decisions only, no clock, task or client.

Natural batching: whatever has gathered while other batches were on their way makes the next. There is no waiting window,
so a lone search goes out at once and a crowd goes out together (:func:`is_worth_sending`).

Fair queueing: the keys of one call are spaced out, one for each round, so that a call with twenty queries shares every
batch with the calls that came after it. Each key gets a virtual start time, and the smallest go first (start-time fair
queueing: Goyal, Vin and Cheng, SIGCOMM 1996). Since virtual time only grows, no key waits for ever either.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Waiter = TypeVar("Waiter", bound=Hashable)


FEW = 4
"""Keys in the air below which nobody waits for company."""


def is_worth_sending(waiting: int, in_the_air: int, max_keys: int) -> bool:
    """Whether what waits should go out now, given room for a request.

    Where few keys are in the air, everything goes at once. Where many are, a batch waits until it is half as large as all
    of them together, or until one of them lands: with 1,024 episodes that nearly halves the requests. Whoever asks has to
    set that waiting a limit, since what is in the air may hang.

    Args:
        waiting: keys that wait.
        in_the_air: keys in the requests that are on their way.
        max_keys: of one request; a full one always goes.
    """
    return waiting >= max_keys or in_the_air < FEW or 2 * waiting >= in_the_air


@dataclass(frozen=True, slots=True)
class Asked:
    """What became of the keys of one request."""

    new: int
    """Keys that nobody else waited for."""
    joined: int
    """Keys that were waiting or on their way already, and those given twice in the request."""


@dataclass(slots=True)
class _Wanted(Generic[Waiter]):
    round: int
    """The virtual time at which the key may go."""
    number: int
    """Among those of one round, who was asked for first goes first, also when it comes back."""
    waiters: set[Waiter]


class Gathering(Generic[Key, Waiter]):
    """Keys (what is asked) and waiters (who asks), each key answered once for all who wait for it.

    Args:
        weigh: what a key counts against ``max_weight`` of a batch; by default nothing does.
    """

    def __init__(self, weigh: Callable[[Key], int] = lambda _: 0) -> None:
        self._weigh = weigh
        self._waiting: dict[Key, _Wanted[Waiter]] = {}
        self._sent: dict[Key, _Wanted[Waiter]] = {}
        # (round, number, key); an entry counts only while its key waits with this very round.
        self._queue: list[tuple[int, int, Key]] = []
        self._number = 0
        self._round = 0

    @property
    def waiting(self) -> int:
        """Keys that are not on their way yet."""
        return len(self._waiting)

    @property
    def sent(self) -> int:
        """Keys that are on their way."""
        return len(self._sent)

    def ask(self, keys: Iterable[Key], waiter: Waiter) -> Asked:
        """Someone asks for some keys: those that are known are joined, the others wait for a batch."""
        new = joined = 0
        for key in keys:
            if (wanted := self._sent.get(key)) is not None:
                joined += 1
            elif (wanted := self._waiting.get(key)) is not None:
                joined += 1
                # Whoever joins may deserve it sooner than the call that asked for it as its twentieth.
                if wanted.round > self._round + new + 1:
                    self._enqueue(key, wanted, self._round + new + 1)
            else:
                new += 1
                self._number += 1
                wanted = self._waiting[key] = _Wanted(0, self._number, set())
                self._enqueue(key, wanted, self._round + new)
            wanted.waiters.add(waiter)
        return Asked(new, joined)

    def leave(self, keys: Iterable[Key], waiter: Waiter) -> None:
        """Someone no longer waits. A key that nobody waits for any more is not sent."""
        for key in keys:
            if (wanted := self._sent.get(key)) is not None:
                wanted.waiters.discard(waiter)
            elif (wanted := self._waiting.get(key)) is not None:
                wanted.waiters.discard(waiter)
                if not wanted.waiters:
                    del self._waiting[key]

    def take(self, max_keys: int, max_weight: int | None = None) -> tuple[Key, ...]:
        """The next batch, in fair order; from now on its keys are on their way. Empty if none waits.

        Args:
            max_keys: at least 1.
            max_weight: of all its keys together; a key that is heavier alone goes alone.
        """
        if max_keys < 1:
            raise ValueError(f"a batch of {max_keys} holds nothing")
        batch: list[Key] = []
        weight = 0
        while self._queue and len(batch) < max_keys:
            due, _, key = self._queue[0]
            wanted = self._waiting.get(key)
            if wanted is None or wanted.round != due:
                heapq.heappop(self._queue)
                continue
            weight += self._weigh(key)
            if batch and max_weight is not None and weight > max_weight:
                break
            heapq.heappop(self._queue)
            self._sent[key] = self._waiting.pop(key)
            self._round = max(self._round, due)
            batch.append(key)
        return tuple(batch)

    def finish(self, batch: Iterable[Key]) -> Mapping[Key, frozenset[Waiter]]:
        """A batch came back, well or ill: who waits for each of its keys. They are known no longer."""
        return {key: frozenset(self._sent.pop(key).waiters) for key in batch}

    def give_back(self, batch: Sequence[Key]) -> None:
        """A batch was broken off: its keys wait again, in their old places; those that nobody waits for are dropped."""
        for key in batch:
            wanted = self._sent.pop(key)
            if wanted.waiters:
                self._waiting[key] = wanted
                self._enqueue(key, wanted, wanted.round)

    def waiters_of(self, batch: Iterable[Key]) -> frozenset[Waiter]:
        """Who waits for any key of a batch that is on its way."""
        return frozenset(waiter for key in batch for waiter in self._sent[key].waiters)

    def anyone_waiting(self) -> Waiter:
        """One who waits for a key that is not on its way; there must be one."""
        return next(iter(next(iter(self._waiting.values())).waiters))

    def everyone(self) -> frozenset[Waiter]:
        """Who waits for anything."""
        places = (self._waiting, self._sent)
        return frozenset(waiter for place in places for wanted in place.values() for waiter in wanted.waiters)

    def _enqueue(self, key: Key, wanted: _Wanted[Waiter], due: int) -> None:
        wanted.round = due
        heapq.heappush(self._queue, (due, wanted.number, key))
