"""The queue in front of a service: which keys wait, which are in flight, and who waits for each. No task, no client.

Natural batching: whatever accumulates while other batches are in flight forms the next batch. There is no fixed batching
window, so a lone search goes out at once (:func:`is_worth_sending`).

Fair queueing: the keys of one call are spread over rounds, so that a call with twenty queries does not starve later ones.
Each key gets a virtual start time, and the smallest goes first (start-time fair queueing: Goyal, Vin and Cheng, SIGCOMM
1996).
"""

from __future__ import annotations

import asyncio
import copy
import heapq
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import anyio
from anyio.abc import TaskGroup

from searchr1_async.errors import SearchError

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Value = TypeVar("Value")
WaitingCaller = TypeVar("WaitingCaller", bound=Hashable)

FEW = 4
"""Below so many keys in flight, keys are sent at once."""


def is_worth_sending(waiting: int, in_flight: int, max_keys: int) -> bool:
    """Whether the waiting keys should be sent now, given room for a request of ``max_keys``.

    With few keys in flight, always. Otherwise a batch waits until it is full or half as large as all keys in flight, which
    nearly halves the requests under load. The caller must bound this wait, since requests may hang.
    """
    return waiting >= max_keys or in_flight < FEW or 2 * waiting >= in_flight


@dataclass(frozen=True, slots=True)
class Asked:
    """Outcome of :meth:`Gathering.ask`."""

    new: int
    """Keys that nobody else waited for."""
    joined: int
    """Keys already pending, and duplicates within the call."""


@dataclass(slots=True)
class _Wanted(Generic[WaitingCaller]):
    round: int
    """Virtual start time of the key."""
    number: int
    """Order within a round, kept when the key returns to the queue."""
    waiters: set[WaitingCaller]


class Gathering(Generic[Key, WaitingCaller]):
    """Keys (queries) and waiters (callers). ``weigh`` gives a key's weight against ``max_weight`` of a batch."""

    def __init__(self, weigh: Callable[[Key], int] = lambda _: 0) -> None:
        self._weigh = weigh
        self._waiting: dict[Key, _Wanted[WaitingCaller]] = {}
        self._sent: dict[Key, _Wanted[WaitingCaller]] = {}
        # (round, number, key); an entry is stale once its key waits in another round.
        self._queue: list[tuple[int, int, Key]] = []
        self._number = 0
        self._round = 0

    @property
    def waiting(self) -> int:
        """Keys not in flight yet."""
        return len(self._waiting)

    @property
    def sent(self) -> int:
        """Keys in flight."""
        return len(self._sent)

    def ask(self, keys: Iterable[Key], waiter: WaitingCaller) -> Asked:
        """Registers a waiter for keys: pending ones are joined, new ones queued."""
        new = joined = 0
        for key in keys:
            if (wanted := self._sent.get(key)) is not None:
                joined += 1
            elif (wanted := self._waiting.get(key)) is not None:
                joined += 1
                # The joining call may be entitled to an earlier round than the one that queued the key.
                if wanted.round > self._round + new + 1:
                    self._enqueue(key, wanted, self._round + new + 1)
            else:
                new += 1
                self._number += 1
                wanted = self._waiting[key] = _Wanted(0, self._number, set())
                self._enqueue(key, wanted, self._round + new)
            wanted.waiters.add(waiter)
        return Asked(new, joined)

    def leave(self, keys: Iterable[Key], waiter: WaitingCaller) -> None:
        """Removes a waiter. Waiting keys without waiters are dropped."""
        for key in keys:
            if (wanted := self._sent.get(key)) is not None:
                wanted.waiters.discard(waiter)
            elif (wanted := self._waiting.get(key)) is not None:
                wanted.waiters.discard(waiter)
                if not wanted.waiters:
                    del self._waiting[key]

    def take(self, max_keys: int, max_weight: int | None = None) -> tuple[Key, ...]:
        """Moves the next batch, in fair order, to in flight. Empty if no key waits; a key over ``max_weight`` goes alone."""
        if max_keys < 1:
            raise ValueError(f"max_keys is {max_keys}: it must be at least 1")
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

    def finish(self, batch: Iterable[Key]) -> Mapping[Key, frozenset[WaitingCaller]]:
        """Removes the keys of a finished batch and returns their waiters."""
        return {key: frozenset(self._sent.pop(key).waiters) for key in batch}

    def give_back(self, batch: Sequence[Key]) -> None:
        """Requeues the keys of an aborted batch at their old places; drops those without waiters."""
        for key in batch:
            wanted = self._sent.pop(key)
            if wanted.waiters:
                self._waiting[key] = wanted
                self._enqueue(key, wanted, wanted.round)

    def waiters_of(self, batch: Iterable[Key]) -> frozenset[WaitingCaller]:
        """Waiters of any key of a batch in flight."""
        return frozenset(waiter for key in batch for waiter in self._sent[key].waiters)

    def anyone_waiting(self) -> WaitingCaller:
        """A waiter of a key not in flight; there must be one."""
        return next(iter(next(iter(self._waiting.values())).waiters))

    def everyone(self) -> frozenset[WaitingCaller]:
        """All waiters."""
        places = (self._waiting, self._sent)
        return frozenset(waiter for place in places for wanted in place.values() for waiter in wanted.waiters)

    def _enqueue(self, key: Key, wanted: _Wanted[WaitingCaller], due: int) -> None:
        wanted.round = due
        heapq.heappush(self._queue, (due, wanted.number, key))


@dataclass(eq=False, slots=True)
class Waiter(Generic[Key, Item, Value]):
    """One call of :meth:`~searchr1_async.search.dispatch.Dispatcher.fetch`, until all items are answered or one fails."""

    number: int
    """Increases with every call."""
    items: Mapping[Key, Item]
    tasks: TaskGroup
    """Its task group, which runs batches while it waits."""
    answers: dict[Key, Value] = field(default_factory=dict)
    failure: SearchError | None = None
    carrying: int = 0
    """Batches running in its task group."""
    done: anyio.Event = field(default_factory=anyio.Event)

    def answer(self, key: Key, value: Value) -> None:
        self.answers[key] = value
        if len(self.answers) == len(self.items):
            self.done.set()

    def fail(self, failure: SearchError) -> None:
        self.failure = self.failure or failure
        self.done.set()

    def result(self) -> dict[Key, Value]:
        """The values by key. Raises a copy of the failure: a shared exception would collect all callers' tracebacks."""
        if self.failure is not None:
            raise _own_copy(self.failure) from (self.failure.__cause__ or self.failure)
        return self.answers


def still_wanted(gathering: Gathering[Key, Waiter[Key, Item, Value]], batch: list[Key]) -> list[Item]:
    """The items of a batch in flight. First drops the keys that nobody waits for from it."""
    waiters = {key: next(iter(gathering.waiters_of([key])), None) for key in batch}
    gathering.finish(key for key, waiter in waiters.items() if waiter is None)
    batch[:] = [key for key, waiter in waiters.items() if waiter is not None]
    return [waiter.items[key] for key, waiter in waiters.items() if waiter is not None]


def _own_copy(failure: SearchError) -> SearchError:
    try:
        return copy.copy(failure)
    except TypeError:  # a subclass with other constructor arguments
        return SearchError(str(failure), is_fatal=failure.is_fatal)


def now_in_loop() -> float:
    """The running event loop's time, or monotonic time outside of one."""
    try:
        return asyncio.get_running_loop().time()
    except RuntimeError:
        return time.monotonic()


class Deadline:
    """When a call of ``seconds`` expires. Extended during an outage (which has its own limit), and restarted after it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.at = now_in_loop() + seconds

    def put_off(self, since: float) -> None:
        self.at = since + self.seconds
