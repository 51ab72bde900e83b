"""Promises: pending and finished results, kept until fetched plus a grace period; and the order of a model's requests.

:class:`PromiseStore` belongs to one event loop; nothing here is thread-safe. Callers pass the time (monotonic seconds).

Clients number a model's training requests 1, 2, 3, … and may post them out of order: the SDK posts the first chunk of a
``forward_backward`` last. A number that never arrives must not block the model forever, so after
:attr:`Sequence.patience` seconds the requests behind the gap are dropped and the sequence continues after them.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

Category = Literal["unknown", "server", "user"]
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Failure:
    """``{"error", "category"}`` on the wire."""

    error: str
    category: Category


@dataclass(frozen=True, slots=True)
class Reply:
    """A serialized response: JSON or protobuf."""

    body: bytes
    content_type: str = "application/json"


@dataclass(slots=True, eq=False)
class Promise:
    """One unit of work. ``outcome`` is set once, by :meth:`PromiseStore.settle`."""

    request_id: str
    kind: str
    owner: str
    """The session, model or sampler that requested it."""
    key: Hashable | None
    outcome: Reply | Failure | None = None
    on_cancel: Callable[[], Any] | None = None
    """Called when the client cancels; None: not cancellable."""
    log: CompletionLog | None = None
    """Records the promise when it is settled."""
    settled_at: float = 0.0
    fetched_at: float = 0.0
    done: asyncio.Event = field(default_factory=asyncio.Event)


class UnknownPromise(LookupError):
    """No such promise; ``expired`` if this store once had it."""

    def __init__(self, request_id: str, expired: bool) -> None:
        super().__init__(request_id)
        self.expired = expired


class PromiseStore:
    """All open and recently settled promises.

    A settled promise is dropped ``grace`` seconds after its last fetch (clients may retry a lost response), or earlier,
    oldest first, if fetched results exceed ``fetched_bytes``. A result never fetched is dropped after ``unfetched`` seconds.
    """

    def __init__(self, *, grace: float = 60.0, unfetched: float = 3600.0, fetched_bytes: int = 256 << 20) -> None:
        self.grace = grace
        self.unfetched = unfetched
        self.fetched_bytes = fetched_bytes
        self._prefix = secrets.token_hex(4)
        self._opened = 0
        self._by_id: dict[str, Promise] = {}
        self._by_key: dict[Hashable, Promise] = {}
        # Ordered by settled_at and fetched_at, so that sweep stops early.
        self._unfetched: dict[str, Promise] = {}
        self._fetched: dict[str, Promise] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def find(self, key: Hashable | None) -> Promise | None:
        """The promise with this idempotency key, if still kept."""
        return None if key is None else self._by_key.get(key)

    def open(self, kind: str, owner: str, key: Hashable | None = None) -> Promise:
        """Opens a promise. ``key`` must be unused (see :meth:`find`)."""
        if key is not None and key in self._by_key:
            raise ValueError(f"the idempotency key {key!r} is in use")
        self._opened += 1
        promise = Promise(f"{self._prefix}-{self._opened}", kind, owner, key)
        self._by_id[promise.request_id] = promise
        if key is not None:
            self._by_key[key] = promise
        return promise

    def settle(self, promise: Promise, outcome: Reply | Failure, now: float) -> bool:
        """Sets the outcome and wakes waiters. False if it was already settled (cancelled)."""
        if promise.outcome is not None:
            return False
        promise.outcome = outcome
        promise.settled_at = now
        promise.on_cancel = None
        promise.done.set()
        if promise.log is not None:
            promise.log.add(promise)
        if promise.request_id in self._by_id:
            self._unfetched[promise.request_id] = promise
        return True

    def get(self, request_id: str) -> Promise:
        """Raises :class:`UnknownPromise`."""
        try:
            return self._by_id[request_id]
        except KeyError:
            prefix, _, number = request_id.partition("-")
            mine = prefix == self._prefix and number.isdecimal() and 0 < int(number) <= self._opened
            raise UnknownPromise(request_id, expired=mine) from None

    async def wait(self, promise: Promise, seconds: float) -> Reply | Failure | None:
        """The outcome, or None after ``seconds``."""
        if promise.outcome is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await promise.done.wait()
        return promise.outcome

    def fetched(self, promise: Promise, now: float) -> None:
        """Marks the outcome as sent to the client; it is kept for ``grace`` more seconds."""
        promise.fetched_at = now
        if self._unfetched.pop(promise.request_id, None) is not None:
            self._bytes += _size(promise)
        elif self._fetched.pop(promise.request_id, None) is None:
            return
        self._fetched[promise.request_id] = promise

    def cancel(self, promise: Promise, now: float, reason: str = "cancelled by the client") -> bool:
        """Settles an open promise as cancelled and stops its work. False if it is settled or not cancellable."""
        stop = promise.on_cancel
        if promise.outcome is not None or stop is None:
            return False
        self.settle(promise, Failure(reason, "user"), now)
        stop()
        return True

    def open_of(self, owner: str) -> Iterator[Promise]:
        return (promise for promise in list(self._by_id.values()) if promise.owner == owner and promise.outcome is None)

    def sweep(self, now: float) -> int:
        """Drops expired promises and those over the memory limit; returns how many."""
        gone: list[Promise] = []
        excess = self._bytes - self.fetched_bytes
        for promise in self._fetched.values():
            if excess <= 0 and now - promise.fetched_at < self.grace:
                break
            excess -= _size(promise)
            gone.append(promise)
        for promise in self._unfetched.values():
            if now - promise.settled_at < self.unfetched:
                break
            gone.append(promise)
        for promise in gone:
            self._forget(promise)
        return len(gone)

    def _forget(self, promise: Promise) -> None:
        del self._by_id[promise.request_id]
        if promise.key is not None:
            del self._by_key[promise.key]
        if promise.log is not None:
            promise.log.discard(promise)
        if self._unfetched.pop(promise.request_id, None) is None:
            del self._fetched[promise.request_id]
            self._bytes -= _size(promise)


class CompletionLog:
    """Settled requests of one sampling client, for clients that poll all of them in one request.

    Entries are numbered 1, 2, 3, …; a client asks for those after its cursor.
    """

    def __init__(self) -> None:
        self._number_of: dict[Promise, int] = {}
        self._count = 0
        self._changed = asyncio.Event()

    def add(self, promise: Promise) -> None:
        self._count += 1
        self._number_of[promise] = self._count
        self._changed.set()

    def discard(self, promise: Promise) -> None:
        self._number_of.pop(promise, None)

    async def after(self, cursor: int, seconds: float) -> tuple[list[Promise], int]:
        """Entries after ``cursor`` and the new cursor; waits up to ``seconds`` for an entry. Drops entries up to ``cursor``."""
        for promise in [promise for promise, number in self._number_of.items() if number <= cursor]:
            del self._number_of[promise]
        if not self._number_of and seconds > 0:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._changed.wait()
        return list(self._number_of), max(cursor, self._count)


def _size(promise: Promise) -> int:
    return len(promise.outcome.body) if isinstance(promise.outcome, Reply) else 0


class AlreadyTaken(Exception):
    """A number was offered twice, or after it was dropped."""


@dataclass(slots=True)
class Sequence(Generic[Item]):
    """Releases items in number order."""

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
        gap, self.next_number = self.missing(), max(self._waiting) + 1
        return gap, self.drain()

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
