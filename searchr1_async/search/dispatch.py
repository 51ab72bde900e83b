"""Batches the items of thousands of concurrent callers into requests to one service, deduplicated.

There is no background task: each batch runs in the task group of one of its callers (the latest), so nothing outlives the
callers. If that caller leaves, its batches pass to the remaining waiters.
"""

from __future__ import annotations

import copy
import heapq
import logging
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from searchr1_async.boundary.waits import Notify
from searchr1_async.errors import SearchError, SearchUnavailableError
from searchr1_async.search.faults import RefusedInput
from searchr1_async.search.pacing import Flight, PacingSettings
from searchr1_async.search.retries import Capacity, Deadline, RemoteService, RetriedRequests, now_in_loop
from searchr1_async.search.stats import ServiceStatistics

logger = logging.getLogger(__name__)

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Value = TypeVar("Value")
Result = TypeVar("Result")
WaitingCaller = TypeVar("WaitingCaller", bound=Hashable)

FEW = 4
"""Below so many keys in flight, keys are sent at once."""
LONGEST_HOLD = 0.1
"""Seconds for which keys wait for a fuller batch; bounded because requests in flight may hang."""


def is_worth_sending(waiting: int, in_flight: int, max_keys: int) -> bool:
    """Whether the waiting keys should be sent now, given room for a request of ``max_keys``.

    With few keys in flight, always. Otherwise once a batch is full or half as large as all keys in flight, which nearly halves
    the requests under load.
    """
    return waiting >= max_keys or in_flight < FEW or 2 * waiting >= in_flight


@dataclass(slots=True)
class _Wanted(Generic[WaitingCaller]):
    round: int
    """Virtual start time of the key."""
    number: int
    """Order within a round, kept when the key returns to the queue."""
    waiters: set[WaitingCaller] = field(default_factory=set)
    is_sent: bool = False


class Gathering(Generic[Key, WaitingCaller]):
    """The queue in front of a service: keys that wait or are in flight, and who waits for each. No task, no client.

    Whatever accumulates while other batches are in flight forms the next batch; there is no batching window. The keys of one
    call are spread over rounds, so that a call with twenty queries does not starve later ones: each key gets a virtual start
    time, and the smallest goes first (start-time fair queueing: Goyal, Vin and Cheng, SIGCOMM 1996).
    """

    def __init__(self) -> None:
        self._wanted: dict[Key, _Wanted[WaitingCaller]] = {}
        # (round, number, key); an entry is stale if its key is in flight or waits in another round.
        self._queue: list[tuple[int, int, Key]] = []
        self._number = 0
        self._round = 0
        self.waiting = 0
        """Keys not in flight yet."""

    def ask(self, keys: Iterable[Key], waiter: WaitingCaller) -> int:
        """Registers a waiter for keys: pending ones are joined, new ones queued. Returns how many were joined."""
        new = joined = 0
        for key in keys:
            wanted = self._wanted.get(key)
            if wanted is None:
                new += 1
                self._number += 1
                wanted = self._wanted[key] = _Wanted(self._round + new, self._number)
                self._enqueue(key, wanted)
            else:
                joined += 1
                # The joining call may be entitled to an earlier round than the one that queued the key.
                if not wanted.is_sent and wanted.round > self._round + new + 1:
                    wanted.round = self._round + new + 1
                    heapq.heappush(self._queue, (wanted.round, wanted.number, key))
            wanted.waiters.add(waiter)
        return joined

    def leave(self, keys: Iterable[Key], waiter: WaitingCaller) -> None:
        """Removes a waiter. Waiting keys without waiters are dropped."""
        for key in keys:
            if (wanted := self._wanted.get(key)) is not None:
                wanted.waiters.discard(waiter)
                if not wanted.waiters and not wanted.is_sent:
                    del self._wanted[key]
                    self.waiting -= 1

    def take(self, max_keys: int) -> list[Key]:
        """Moves the next batch, in fair order, to in flight. Empty if no key waits."""
        batch: list[Key] = []
        while self._queue and len(batch) < max_keys:
            due, _, key = heapq.heappop(self._queue)
            wanted = self._wanted.get(key)
            if wanted is not None and not wanted.is_sent and wanted.round == due:
                wanted.is_sent = True
                self.waiting -= 1
                self._round = max(self._round, due)
                batch.append(key)
        return batch

    def finish(self, batch: Iterable[Key]) -> Mapping[Key, frozenset[WaitingCaller]]:
        """Removes the keys of a finished batch and returns their waiters."""
        return {key: frozenset(self._wanted.pop(key).waiters) for key in batch}

    def give_back(self, batch: Iterable[Key]) -> None:
        """Requeues the keys of an aborted batch at their old places; drops those without waiters."""
        for key in batch:
            wanted = self._wanted[key]
            if wanted.waiters:
                wanted.is_sent = False
                self._enqueue(key, wanted)
            else:
                del self._wanted[key]

    def callers(self, batch: Iterable[Key]) -> dict[Key, WaitingCaller]:
        """A waiter of each key of a batch in flight that anybody waits for."""
        return {key: next(iter(waiters)) for key in batch if (waiters := self._wanted[key].waiters)}

    def waiters_of(self, keys: Iterable[Key]) -> frozenset[WaitingCaller]:
        """Waiters of any of the keys."""
        return frozenset(waiter for key in keys for waiter in self._wanted[key].waiters)

    def anyone_waiting(self) -> WaitingCaller:
        """A waiter of a key not in flight; there must be one."""
        return next(waiter for wanted in self._wanted.values() if not wanted.is_sent for waiter in wanted.waiters)

    def everyone(self) -> frozenset[WaitingCaller]:
        """All waiters."""
        return self.waiters_of(self._wanted)

    def _enqueue(self, key: Key, wanted: _Wanted[WaitingCaller]) -> None:
        self.waiting += 1
        heapq.heappush(self._queue, (wanted.round, wanted.number, key))


@dataclass(eq=False, slots=True)
class Waiter(Generic[Key, Item, Value]):
    """One call of :meth:`Dispatcher.fetch`, until all items are answered or one fails. Its task group runs batches meanwhile."""

    number: int
    """Increases with every call."""
    items: Mapping[Key, Item]
    tasks: TaskGroup
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
        if (failure := self.failure) is None:
            return self.answers
        try:
            own = copy.copy(failure)
        except TypeError:  # a subclass with other constructor arguments
            own = SearchError(str(failure), is_fatal=failure.is_fatal)
        raise own from (failure.__cause__ or failure)


class Dispatcher(Generic[Key, Item, Value]):
    """Sends items to one service, batching those of many callers. Bound to one event loop.

    Args:
        send: one request: returns the values of some items, in order. Tries once, and raises as an
            :class:`~searchr1_async.search.embedders.Embedder` does.
        name: of the service, for messages.
        capacity: what the service accepts; called per request, since it may change.
        pacing: see :class:`PacingSettings`.
        tally: counters to continue from an earlier dispatcher; None starts at 0.
        failure: raised when retries do not help.
    """

    def __init__(
        self,
        send: Callable[[Sequence[Item]], Awaitable[Sequence[Value]]],
        *,
        name: str,
        capacity: Callable[[], Capacity],
        pacing: PacingSettings | None = None,
        tally: ServiceStatistics | None = None,
        failure: type[SearchError] = SearchError,
    ) -> None:
        tally = ServiceStatistics() if tally is None else tally
        self._service = RemoteService(name, send, capacity, pacing or PacingSettings(), tally, failure)
        self._gathering: Gathering[Key, Waiter[Key, Item, Value]] = Gathering()
        self._requests = RetriedRequests(self._service, self._wanted, lambda: self._gathering.waiting, self._pump)
        self.waits = self._requests.waits
        self._number = 0
        self._carriers = 0
        self._is_holding = False

    @property
    def statistics(self) -> ServiceStatistics:
        """Totals and current state."""
        return self._requests.statistics

    async def fetch(self, items: Mapping[Key, Item], deadline: Deadline | None = None) -> dict[Key, Value]:
        """The value of every item by key; equal keys stand for equal items. Keys that are already pending are sent once.

        Raises:
            SearchError: the service failed permanently, or the deadline passed.
            SearchUnavailableError: the service was down longer than ``PacingSettings.max_outage``, or its ``Retry-After``
                exceeds ``PacingSettings.longest_wait``.
        """
        if not items:
            return {}
        self._number += 1
        tasks = anyio.create_task_group()
        waiter: Waiter[Key, Item, Value] = Waiter(self._number, items, tasks)
        async with tasks:
            self._service.tally.joined += self._gathering.ask(items, waiter)
            try:
                await anyio.lowlevel.checkpoint()  # so that callers woken together share a batch
                self._pump()
                await self._until_done(waiter, deadline)
            finally:
                self._gathering.leave(items, waiter)
                if waiter.carrying:
                    tasks.cancel_scope.cancel()
        return waiter.result()

    def close(self) -> None:
        """Fails all pending calls."""
        self._fail_everyone(SearchError("the search was closed while calls were waiting"))

    async def _until_done(self, waiter: Waiter[Key, Item, Value], deadline: Deadline | None) -> None:
        while not waiter.done.is_set():
            with anyio.move_on_after(None if deadline is None else deadline.at - now_in_loop()):
                await waiter.done.wait()
            if deadline is not None and not waiter.done.is_set() and (late := self._requests.expired(deadline)):
                waiter.fail(late)

    # Sending

    def _pump(self, *, is_overdue: bool = False) -> None:
        """Launches batches while there is room; retries go first."""
        requests = self._requests
        while waiting := self._gathering.waiting:
            capacity = self._service.capacity()
            if requests.has_room():
                if not is_overdue and not is_worth_sending(waiting, requests.pacer.items_in_flight, capacity.items):
                    self._hold_back()
                    return
                batch = self._gathering.take(capacity.items)
                self._launch(batch, requests.pacer.begin(now_in_loop(), len(batch)))
            elif self._carriers == requests.resting:
                # The service is backing off: one batch must wait it out, or nobody would wake up.
                self._launch(self._gathering.take(capacity.items), None)
            else:
                return

    def _hold_back(self) -> None:
        if not self._is_holding:
            self._is_holding = True
            host = self._gathering.anyone_waiting()
            host.carrying += 1
            host.tasks.start_soon(self._hold, host)

    async def _hold(self, host: Waiter[Key, Item, Value]) -> None:
        """Flushes the waiting keys after :data:`LONGEST_HOLD`."""
        try:
            await anyio.sleep(LONGEST_HOLD)
        finally:
            host.carrying -= 1
            self._is_holding = False
            self._pump(is_overdue=True)

    def _launch(self, batch: list[Key], flight: Flight | None) -> None:
        # The latest caller has the latest deadline.
        carrier = max(self._gathering.waiters_of(batch), key=lambda waiter: waiter.number)
        self._carriers += 1
        carrier.carrying += 1
        carrier.tasks.start_soon(self._carry, carrier, batch, flight)

    async def _carry(self, carrier: Waiter[Key, Item, Value], batch: list[Key], flight: Flight | None) -> None:
        """Runs one batch until its waiters are answered or failed."""
        try:
            values = await self._requests.answers(batch, flight)
            for key, waiters in self._gathering.finish(values).items():
                for waiter in waiters:
                    waiter.answer(key, values[key])
        except RefusedInput as refused:
            self._split(batch, refused)
        except SearchUnavailableError as failure:
            logger.warning("%s", failure)
            self._fail(batch, failure)
            self._fail_everyone(failure)
        except SearchError as failure:
            self._fail(batch, failure)
        except Exception as error:
            name, kind = self._service.name, type(error).__name__
            self._fail(batch, self._failure(f"{name} failed on a request of {len(batch)} items ({kind})", error))
        except BaseException:  # the carrier leaves: other waiters take over its keys
            self._gathering.leave(carrier.items, carrier)
            self._gathering.give_back(batch)
            raise
        finally:
            self._carriers -= 1
            carrier.carrying -= 1
            self._pump()

    def _wanted(self, batch: list[Key]) -> list[Item]:
        """The items of a batch in flight. First drops the keys that nobody waits for from it."""
        callers = self._gathering.callers(batch)
        self._gathering.finish(key for key in batch if key not in callers)
        batch[:] = callers
        return [caller.items[key] for key, caller in callers.items()]

    # Failing

    def _failure(self, what: str, cause: Exception) -> SearchError:
        failure = self._service.failure(what)
        failure.__cause__ = cause
        return failure

    def _fail(self, batch: Iterable[Key], failure: SearchError) -> None:
        for waiters in self._gathering.finish(batch).values():
            for waiter in waiters:
                waiter.fail(failure)

    def _fail_everyone(self, failure: SearchError) -> None:
        for waiter in self._gathering.everyone():
            waiter.fail(failure)

    def _split(self, batch: list[Key], refused: RefusedInput) -> None:
        """Resends a refused batch in parts, so that one bad item fails alone."""
        if len(batch) == 1:
            self._fail(batch, self._failure(str(refused), refused))
            return
        self._wanted(batch)
        size = max(1, min(-(-len(batch) // 2), self._service.capacity().items))
        for start in range(0, len(batch), size):
            self._launch(batch[start : start + size], None)


async def with_retries(
    request: Callable[[], Awaitable[Result]],
    *,
    name: str,
    pacing: PacingSettings,
    failure: type[SearchError],
    tell: Notify | None = None,
) -> Result:
    """The result of a single request, sent again until it is answered. Arguments and errors as of :class:`Dispatcher`."""

    async def send(_: Sequence[None]) -> Sequence[Result]:
        return [await request()]

    once: Dispatcher[str, None, Result] = Dispatcher(
        send, name=name, capacity=lambda: Capacity(1, 1), pacing=pacing, failure=failure
    )
    if tell is not None:
        once.waits.tell = tell
    return (await once.fetch({"once": None}))["once"]
