"""Batches the items of thousands of concurrent callers into requests to one service: paced, retried, deduplicated.

The decisions are pure and live in :mod:`gathering` and :mod:`pacing`; this module does the I/O.

A dispatcher has no background task. Each batch runs in the task group of one of its callers (the latest), so nothing
outlives the callers. If that caller leaves (cancelled, or past its deadline), its batches pass to the remaining waiters.

A batch in flight holds one of the service's slots. A batch that backs off holds none, so it does not block others.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Generic

import anyio
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from searchr1_async.boundary.waits import bounded_wait
from searchr1_async.errors import SearchError, SearchUnavailableError
from searchr1_async.search.faults import PassingFault, RefusedInput, TooManyRequests
from searchr1_async.search.gathering import (
    Deadline,
    Gathering,
    Item,
    Key,
    Slowest,
    Value,
    Waiter,
    hedged,
    is_worth_sending,
    now_in_loop,
)
from searchr1_async.search.pacing import Flight, Pacer, PacingSettings, Telling
from searchr1_async.search.stats import ServiceStatistics, ServiceTally

logger = logging.getLogger(__name__)

SUSPECT_AFTER = 2
"""Transient faults after which a batch is split, if others succeed. A 10 % fault rate splits 1 % of batches."""
LONGEST_HOLD = 0.1
"""Seconds for which keys wait for a fuller batch; bounded because requests in flight may hang."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a service accepts."""

    items: int
    """Per request."""
    requests: int
    """In flight at once."""
    weight: int | None = None
    """Total weight of the items of one request; None for no limit."""


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

    Attributes:
        waits: reports waits for the service through its ``tell``.
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
        self._send = send
        self._name = name
        self._capacity = capacity
        self._settings = pacing or PacingSettings()
        self._tally = tally or ServiceTally()
        self._failure = failure
        self._gathering: Gathering[Key, Waiter[Key, Item, Value]] = Gathering(weigh)
        self._pacer = Pacer(self._settings)
        self.waits = Telling(name, self._settings, self._pacer)
        self._pause = wait_random_exponential(
            multiplier=2 * self._settings.first_pause, max=self._settings.longest_pause
        )
        self._number = 0
        self._carriers = 0
        self._resting = 0
        self._is_holding = False
        self._queued = 0
        self._pump_is_due = False
        self._freed = anyio.Event()
        self._answered_at = -math.inf
        self._slowest = Slowest(self._settings.hedged_fraction)

    @property
    def statistics(self) -> ServiceStatistics:
        """Totals and current state."""
        return replace(
            self._tally.snapshot(),
            limit=min(self._pacer.limit, self._capacity().requests),
            in_flight=self._pacer.in_flight,
            waiting=self._gathering.waiting,
            seconds_down=self._pacer.down_for(now_in_loop()),
        )

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
            if self._pacer.is_failing:
                deadline.put_off(now_in_loop())
            elif self._pacer.up_since + deadline.seconds > now_in_loop():
                deadline.put_off(self._pacer.up_since)
            else:
                waiter.fail(self._too_late(deadline))

    def _too_late(self, deadline: Deadline) -> SearchError:
        now = now_in_loop()
        opens = self._pacer.opens_at(now)
        asked = "" if opens is None else f"; it asks to back off for another {opens - now:.0f} s (a rate limit?)"
        return self._failure(
            f"no answer from {self._name} within {deadline.seconds:g} s{asked}: check that it is up and its rate limits, "
            "or set a longer deadline"
        )

    # Sending

    async def _pump_when_due(self) -> None:
        self._pump_is_due = False
        self._pump()

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

    def _pump(self, *, is_overdue: bool = False) -> None:
        """Launches batches while there is room; retries go first."""
        while self._gathering.waiting:
            now, capacity, pacer = now_in_loop(), self._capacity(), self._pacer
            if not self._queued and pacer.may_send(now, capacity.requests):
                waiting = self._gathering.waiting
                if not is_overdue and not is_worth_sending(waiting, pacer.items_in_flight, capacity.items):
                    self._hold_back()
                    return
                batch = list(self._gathering.take(capacity.items, capacity.weight))
                self._launch(batch, pacer.begin(now, len(batch)))
            elif self._carriers == self._resting:
                # The service is backing off: one batch must wait it out, or nobody would wake up.
                self._launch(list(self._gathering.take(capacity.items, capacity.weight)), None)
            else:
                return

    def _launch(self, batch: list[Key], flight: Flight | None) -> None:
        # The latest caller has the latest deadline.
        carrier = max(self._gathering.waiters_of(batch), key=lambda waiter: waiter.number)
        self._carriers += 1
        carrier.carrying += 1
        carrier.tasks.start_soon(self._carry, carrier, batch, flight)

    async def _carry(self, carrier: Waiter[Key, Item, Value], batch: list[Key], flight: Flight | None) -> None:
        """Runs one batch until its waiters are answered or failed."""
        try:
            self._answer(await self._until_answered(batch, flight))
        except RefusedInput as refused:
            self._split(batch, refused)
        except SearchUnavailableError as failure:
            logger.warning("%s", failure)
            self._fail_everyone(failure)
            self._fail(batch, failure)
        except SearchError as failure:
            self._fail(batch, failure)
        except Exception as error:
            failure = self._failure(f"{self._name} failed on a request of {len(batch)} items ({type(error).__name__})")
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

    async def _until_answered(self, batch: list[Key], flight: Flight | None) -> Mapping[Key, Value]:
        """Retries a batch until it is answered; drops keys that nobody waits for."""
        began = now_in_loop()
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(PassingFault),
            wait=self._pause_after,
            stop=lambda state: self._is_hopeless(began) or self._is_suspect(batch, state, began),
            sleep=self._rest,
            reraise=True,
        )
        values: Mapping[Key, Value] = {}
        try:
            async for attempt in retrying:
                with attempt:
                    begun, flight = flight or await self._slot(len(batch)), None
                    values = await self._attempt(batch, begun)
        except PassingFault as fault:
            now = now_in_loop()
            if len(batch) > 1 and not self._is_hopeless(began):
                raise RefusedInput(str(fault)) from fault
            if down := self._pacer.down_for(now):
                raise SearchUnavailableError(
                    f"{self._name} has been down for {down:.0f} s ({fault}): restart it and resume, or raise "
                    "PacingSettings.max_outage"
                ) from fault
            raise self._failure(f"{self._name} kept failing for {now - began:.0f} s ({fault})") from fault
        return values

    def _pause_after(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, TooManyRequests) or self._pacer.down_for(now_in_loop()):
            return 0.0  # the pacer delays all batches, this one included
        asked = error.retry_after if isinstance(error, PassingFault) else None
        return max(asked or 0.0, self._pause(state))

    async def _rest(self, seconds: float) -> None:
        """Backoff. A resting batch wakes nobody, so if all of them rest, a waiting one has to probe."""
        self._resting += 1
        try:
            if seconds:
                self._pump()
            await anyio.sleep(seconds)
        finally:
            self._resting -= 1

    def _is_hopeless(self, began: float) -> bool:
        now = now_in_loop()
        if down := self._pacer.down_for(now):
            return down > self._settings.max_outage
        return now - max(began, self._pacer.up_since) > self._settings.retry_budget

    def _is_suspect(self, batch: Sequence[Key], state: RetryCallState, began: float) -> bool:
        """Fails repeatedly while others succeed: an item in it may be the cause, so it is split."""
        if len(batch) == 1 or state.attempt_number < SUSPECT_AFTER:
            return False
        error = state.outcome.exception() if state.outcome else None
        # A batch that times out may be too large.
        return self._answered_at > began or (isinstance(error, PassingFault) and error.cause == "timeout")

    async def _slot(self, items: int) -> Flight:
        """Waits for a request slot and takes it."""
        self._queued += 1
        try:
            while not self._pacer.may_send(now := now_in_loop(), self._capacity().requests):
                opens = self._pacer.opens_at(now)
                with anyio.move_on_after(math.inf if opens is None else opens - now):
                    await self._freed.wait()
            flight = self._pacer.begin(now, items)
        finally:
            self._queued -= 1
        self._pump()  # there may be room for more
        return flight

    async def _attempt(self, batch: list[Key], flight: Flight) -> Mapping[Key, Value]:
        """Sends one request and reports its outcome to the pacer."""
        most = self._capacity().requests
        is_ended = False
        try:
            if not (items := self._items(batch)):
                return {}
            values = await self._hedged(items)
            if len(values) != len(batch):
                raise PassingFault(f"{self._name} answered {len(values)} of {len(batch)} items", cause="malformed")
        except PassingFault as fault:
            is_ended, now = True, now_in_loop()
            self._tally.faults[fault.cause] += 1
            if isinstance(fault, TooManyRequests):
                self._pacer.pushed_back(flight, now, fault.retry_after)
            else:
                self._pacer.failed(flight, now)
            self.waits.refuse_long(fault)
            self.waits.failed(fault, now)
            self._pump()  # others need not wait for this batch's backoff
            raise
        except SearchError:  # the service is up and refuses
            is_ended = True
            self._pacer.succeeded(flight, now_in_loop(), most=most, is_short=False)
            raise
        else:
            is_ended, now = True, now_in_loop()
            is_short = self._gathering.waiting >= self._capacity().items
            self._pacer.succeeded(flight, now, most=most, is_short=is_short)
            self.waits.answered()
            self._answered_at = now
            self._tally.latency.add(now - flight.began)
            self._slowest.add(now - flight.began)
            return dict(zip(batch, values, strict=True))
        finally:
            if not is_ended:
                self._pacer.abandoned(flight)
            self._wake_queued()

    def _wake_queued(self) -> None:
        self._freed.set()
        self._freed = anyio.Event()

    async def _hedged(self, items: Sequence[Item]) -> Sequence[Value]:
        """Sends one request, and a second one if the first is among the slowest and there is room."""
        delay = self._slowest.delay(sent=self._tally.sizes.total(), hedged=self._tally.hedged)
        if delay is None:
            return await self._request(items)
        return await hedged(lambda: self._request(items), delay, self._begin_hedge, self._end_hedge)

    def _begin_hedge(self) -> Flight | None:
        now = now_in_loop()
        if not self._pacer.may_send(now, self._capacity().requests):
            return None
        self._tally.hedged += 1
        return self._pacer.begin(now)

    def _end_hedge(self, flight: Flight) -> None:
        self._pacer.abandoned(flight)
        self._wake_queued()
        self._pump()

    async def _request(self, items: Sequence[Item]) -> Sequence[Value]:
        self._tally.sizes[len(items)] += 1
        timeout = self._settings.request_timeout
        began = now_in_loop()
        # A service with one request at a time computes locally, which may take long.
        is_watched = self.waits.tell is not None and self._capacity().requests > 1
        try:
            with self._watched(began, timeout) if is_watched else anyio.fail_after(timeout):
                return await self._send(items)
        except TimeoutError as error:
            raise PassingFault(f"{self._name} did not answer within {timeout:g} s", cause="timeout") from error

    def _watched(self, began: float, timeout: float) -> AbstractContextManager[None]:
        def tell(text: str) -> None:
            if self._answered_at < began:
                self.waits.hangs(text, began + timeout)

        return bounded_wait(f"{self._name} has not answered", tell, timeout)

    # Answering

    def _items(self, batch: list[Key]) -> list[Item]:
        """The items of a batch. First drops keys that nobody waits for."""
        waiters = {key: next(iter(self._gathering.waiters_of([key])), None) for key in batch}
        self._gathering.finish(key for key, waiter in waiters.items() if waiter is None)
        batch[:] = [key for key, waiter in waiters.items() if waiter is not None]
        return [waiter.items[key] for key, waiter in waiters.items() if waiter is not None]

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
            failure = self._failure(str(refused))
            failure.__cause__ = refused
            self._fail(batch, failure)
            return
        self._items(batch)
        size = max(1, min(-(-len(batch) // 2), self._capacity().items))
        for start in range(0, len(batch), size):
            self._launch(batch[start : start + size], None)
