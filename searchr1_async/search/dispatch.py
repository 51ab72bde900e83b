"""Batches the items of thousands of concurrent callers into requests to one service, deduplicated.

A dispatcher has no background task. Each batch runs in the task group of one of its callers (the latest), so nothing
outlives the callers. If that caller leaves (cancelled, or past its deadline), its batches pass to the remaining waiters.

Which keys go next is decided by :mod:`~searchr1_async.search.gathering`; :mod:`~searchr1_async.search.retries` sends.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Generic, TypeVar

import anyio

from searchr1_async.boundary.waits import Notify
from searchr1_async.errors import SearchError, SearchUnavailableError
from searchr1_async.search.faults import RefusedInput
from searchr1_async.search.gathering import (
    Deadline,
    Gathering,
    Item,
    Key,
    Value,
    Waiter,
    is_worth_sending,
    now_in_loop,
    still_wanted,
)
from searchr1_async.search.pacing import Flight, PacingSettings, Telling
from searchr1_async.search.retries import Capacity, RemoteService, RetriedRequests
from searchr1_async.search.stats import ServiceStatistics, ServiceTally

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

LONGEST_HOLD = 0.1
"""Seconds for which keys wait for a fuller batch; bounded because requests in flight may hang."""


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
        weigh: an item's weight, against ``Capacity.weight``.
    """

    def __init__(
        self,
        send: Callable[[Sequence[Item]], Awaitable[Sequence[Value]]],
        *,
        name: str,
        capacity: Callable[[], Capacity],
        pacing: PacingSettings | None = None,
        tally: ServiceTally | None = None,
        failure: type[SearchError] = SearchError,
        weigh: Callable[[Key], int] = lambda _: 0,
    ) -> None:
        self._service = RemoteService(name, send, capacity, pacing or PacingSettings(), failure)
        self._tally = tally or ServiceTally()
        self._gathering: Gathering[Key, Waiter[Key, Item, Value]] = Gathering(weigh)
        self._requests = RetriedRequests(self._service, self._tally, self._gathering, self._pump)
        self._number = 0
        self._carriers = 0
        self._is_holding = False
        self._pump_is_due = False

    @property
    def waits(self) -> Telling:
        """Reports waits for the service through its ``tell``."""
        return self._requests.waits

    @property
    def statistics(self) -> ServiceStatistics:
        """Totals and current state."""
        return self._requests.statistics

    async def fetch(self, items: Mapping[Key, Item], deadline: Deadline | None = None) -> dict[Key, Value]:
        """Returns the value of every item by key. Keys that are already pending are sent once.

        Args:
            items: what to send, by key; equal keys must stand for equal items.
            deadline: None waits as long as retries make sense.

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
            self._tally.joined += self._gathering.ask(items, waiter).joined
            # Deferred to the end of this loop iteration, so that callers woken together share a batch.
            if not self._pump_is_due:
                self._pump_is_due = True
                tasks.start_soon(self._pump_when_due)
            try:
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
            left = math.inf if deadline is None else deadline.at - now_in_loop()
            with anyio.move_on_after(left):
                await waiter.done.wait()
            if waiter.done.is_set() or deadline is None:
                continue
            if not self._requests.put_off(deadline):
                waiter.fail(self._requests.too_late(deadline))

    # Sending

    async def _pump_when_due(self) -> None:
        self._pump_is_due = False
        self._pump()

    def _pump(self, *, is_overdue: bool = False) -> None:
        """Launches batches while there is room; retries go first."""
        requests = self._requests
        while waiting := self._gathering.waiting:
            capacity = self._service.capacity()
            if requests.has_room():
                if not is_overdue and not is_worth_sending(waiting, requests.items_in_flight, capacity.items):
                    self._hold_back()
                    return
                batch = list(self._gathering.take(capacity.items, capacity.weight))
                self._launch(batch, requests.begin(len(batch)))
            elif self._carriers == requests.resting:
                # The service is backing off: one batch must wait it out, or nobody would wake up.
                self._launch(list(self._gathering.take(capacity.items, capacity.weight)), None)
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
            self._answer(await self._requests.answers(batch, flight))
        except RefusedInput as refused:
            self._split(batch, refused)
        except SearchUnavailableError as failure:
            logger.warning("%s", failure)
            self._fail_everyone(failure)
            self._fail(batch, failure)
        except SearchError as failure:
            self._fail(batch, failure)
        except Exception as error:
            failure = self._service.failure(
                f"{self._service.name} failed on a request of {len(batch)} items ({type(error).__name__})"
            )
            failure.__cause__ = error
            self._fail(batch, failure)
        except BaseException:  # the carrier leaves: other waiters take over its keys
            self._gathering.leave(carrier.items, carrier)
            self._gathering.give_back(batch)
            raise
        finally:
            self._carriers -= 1
            carrier.carrying -= 1
            self._pump()

    # Answering

    def _answer(self, values: Mapping[Key, Value]) -> None:
        for key, waiters in self._gathering.finish(values).items():
            for waiter in waiters:
                waiter.answer(key, values[key])

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
            failure = self._service.failure(str(refused))
            failure.__cause__ = refused
            self._fail(batch, failure)
            return
        still_wanted(self._gathering, batch)
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
    once.waits.tell = tell
    return (await once.fetch({"once": None}))["once"]
