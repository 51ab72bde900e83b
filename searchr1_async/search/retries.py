"""Requests to one service: slots, backoff, outages, ``Retry-After``, and a second request for the slowest.

A request in flight holds one of the service's slots. A batch that backs off holds none, so it does not block others. What
to do is decided by :mod:`~searchr1_async.search.pacing`.

Hedging follows Dean and Barroso, "The Tail at Scale", CACM 56(2), 2013: a second request after the 95th percentile of the
latency cuts the tail for about 5 % more requests.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import anyio
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from searchr1_async.boundary.waits import bounded_wait
from searchr1_async.errors import SearchError, SearchUnavailableError
from searchr1_async.search.faults import PassingFault, RefusedInput, TooManyRequests
from searchr1_async.search.gathering import Deadline, Gathering, Item, Key, Value, Waiter, now_in_loop, still_wanted
from searchr1_async.search.pacing import Flight, Pacer, PacingSettings, Telling
from searchr1_async.search.stats import ServiceStatistics, ServiceTally

SUSPECT_AFTER = 2
"""Transient faults after which a batch is split, if others succeed. A 10 % fault rate splits 1 % of batches."""

Result = TypeVar("Result")

HEDGE_AFTER_REQUESTS, RECENT_REQUESTS = 50, 400
"""Answered requests before hedging starts, and the window of recent latencies."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a service accepts."""

    items: int
    """Per request."""
    requests: int
    """In flight at once."""
    weight: int | None = None
    """Total weight of the items of one request; None for no limit."""


@dataclass(frozen=True, slots=True)
class RemoteService(Generic[Item, Value]):
    """A service, as described in :class:`~searchr1_async.search.dispatch.Dispatcher`."""

    name: str
    send: Callable[[Sequence[Item]], Awaitable[Sequence[Value]]]
    capacity: Callable[[], Capacity]
    pacing: PacingSettings
    failure: type[SearchError]


class RetriedRequests(Generic[Key, Item, Value]):
    """Sends batches to a service, each again until it is answered. Bound to one event loop.

    Args:
        service: where requests go.
        tally: its counters.
        gathering: the keys in flight, and who waits for them.
        on_room: called when another batch may be sent.

    Attributes:
        waits: reports waits for the service through its ``tell``.
        resting: batches that back off.
    """

    def __init__(
        self,
        service: RemoteService[Item, Value],
        tally: ServiceTally,
        gathering: Gathering[Key, Waiter[Key, Item, Value]],
        on_room: Callable[[], None],
    ) -> None:
        settings = service.pacing
        self._service = service
        self._tally = tally
        self._gathering = gathering
        self._on_room = on_room
        self._pacer = Pacer(settings)
        self.waits = Telling(service.name, settings, self._pacer)
        self._pause = wait_random_exponential(multiplier=2 * settings.first_pause, max=settings.longest_pause)
        self.resting = 0
        self._queued = 0
        self._freed = anyio.Event()
        self._answered_at = -math.inf
        self._slowest = Slowest(settings.hedged_fraction)

    @property
    def statistics(self) -> ServiceStatistics:
        """Totals and current state."""
        return replace(
            self._tally.snapshot(),
            limit=min(self._pacer.limit, self._service.capacity().requests),
            in_flight=self._pacer.in_flight,
            waiting=self._gathering.waiting,
            seconds_down=self._pacer.down_for(now_in_loop()),
        )

    @property
    def items_in_flight(self) -> int:
        """Items of all requests in flight."""
        return self._pacer.items_in_flight

    def has_room(self) -> bool:
        """Whether a new batch may be sent now; retries go first."""
        return not self._queued and self._pacer.may_send(now_in_loop(), self._service.capacity().requests)

    def begin(self, items: int) -> Flight:
        """Takes a slot; only if :meth:`has_room`."""
        return self._pacer.begin(now_in_loop(), items)

    # Deadlines

    def put_off(self, deadline: Deadline) -> bool:
        """Extends a passed deadline during an outage, and restarts it after one; False if it is final."""
        if self._pacer.is_failing:
            deadline.put_off(now_in_loop())
        elif self._pacer.up_since + deadline.seconds > now_in_loop():
            deadline.put_off(self._pacer.up_since)
        else:
            return False
        return True

    def too_late(self, deadline: Deadline) -> SearchError:
        """The failure of a call whose deadline has passed."""
        now = now_in_loop()
        opens = self._pacer.opens_at(now)
        asked = "" if opens is None else f"; it asks to back off for another {opens - now:.0f} s (a rate limit?)"
        return self._service.failure(
            f"no answer from {self._service.name} within {deadline.seconds:g} s{asked}: check that it is up and its rate "
            "limits, or set a longer deadline"
        )

    # Retries

    async def answers(self, batch: list[Key], flight: Flight | None) -> Mapping[Key, Value]:
        """Sends a batch until it is answered, first in the slot ``flight``; drops keys that nobody waits for.

        Raises:
            RefusedInput: an item may be the cause of its faults: send it in parts.
            SearchUnavailableError: the service was down for too long, or asks for too long a wait.
            SearchError: it failed permanently, or for too long.
        """
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
            now, name = now_in_loop(), self._service.name
            if len(batch) > 1 and not self._is_hopeless(began):
                raise RefusedInput(str(fault)) from fault
            if down := self._pacer.down_for(now):
                raise SearchUnavailableError(
                    f"{name} has been down for {down:.0f} s ({fault}): restart it and resume, or raise "
                    "PacingSettings.max_outage"
                ) from fault
            raise self._service.failure(f"{name} kept failing for {now - began:.0f} s ({fault})") from fault
        return values

    def _pause_after(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, TooManyRequests) or self._pacer.down_for(now_in_loop()):
            return 0.0  # the pacer delays all batches, this one included
        asked = error.retry_after if isinstance(error, PassingFault) else None
        return max(asked or 0.0, self._pause(state))

    async def _rest(self, seconds: float) -> None:
        """Backoff. A resting batch wakes nobody, so if all of them rest, a waiting one has to probe."""
        self.resting += 1
        try:
            if seconds:
                self._on_room()
            await anyio.sleep(seconds)
        finally:
            self.resting -= 1

    def _is_hopeless(self, began: float) -> bool:
        now, settings = now_in_loop(), self._service.pacing
        if down := self._pacer.down_for(now):
            return down > settings.max_outage
        return now - max(began, self._pacer.up_since) > settings.retry_budget

    def _is_suspect(self, batch: Sequence[Key], state: RetryCallState, began: float) -> bool:
        """Fails repeatedly while others succeed: an item in it may be the cause, so it is split."""
        if len(batch) == 1 or state.attempt_number < SUSPECT_AFTER:
            return False
        error = state.outcome.exception() if state.outcome else None
        # A batch that times out may be too large.
        return self._answered_at > began or (isinstance(error, PassingFault) and error.cause == "timeout")

    # Requests

    async def _slot(self, items: int) -> Flight:
        """Waits for a request slot and takes it."""
        self._queued += 1
        try:
            while not self._pacer.may_send(now := now_in_loop(), self._service.capacity().requests):
                opens = self._pacer.opens_at(now)
                with anyio.move_on_after(math.inf if opens is None else opens - now):
                    await self._freed.wait()
            flight = self._pacer.begin(now, items)
        finally:
            self._queued -= 1
        self._on_room()  # there may be room for more
        return flight

    async def _attempt(self, batch: list[Key], flight: Flight) -> Mapping[Key, Value]:
        """Sends one request and reports its outcome to the pacer."""
        most = self._service.capacity().requests
        is_ended = False
        try:
            if not (items := still_wanted(self._gathering, batch)):
                return {}
            values = await self._hedged(items)
            if len(values) != len(batch):
                raise PassingFault(
                    f"{self._service.name} answered {len(values)} of {len(batch)} items", cause="malformed"
                )
        except PassingFault as fault:
            is_ended = True
            self._failed(fault, flight)
            raise
        except SearchError:  # the service is up and refuses
            is_ended = True
            self._pacer.succeeded(flight, now_in_loop(), most=most, is_short=False)
            raise
        else:
            is_ended, now = True, now_in_loop()
            is_short = self._gathering.waiting >= self._service.capacity().items
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

    def _failed(self, fault: PassingFault, flight: Flight) -> None:
        now = now_in_loop()
        self._tally.faults[fault.cause] += 1
        if isinstance(fault, TooManyRequests):
            self._pacer.pushed_back(flight, now, fault.retry_after)
        else:
            self._pacer.failed(flight, now)
        self.waits.refuse_long(fault)
        self.waits.failed(fault, now)
        self._on_room()  # others need not wait for this batch's backoff

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
        if not self._pacer.may_send(now, self._service.capacity().requests):
            return None
        self._tally.hedged += 1
        return self._pacer.begin(now)

    def _end_hedge(self, flight: Flight) -> None:
        self._pacer.abandoned(flight)
        self._wake_queued()
        self._on_room()

    async def _request(self, items: Sequence[Item]) -> Sequence[Value]:
        service = self._service
        self._tally.sizes[len(items)] += 1
        timeout = service.pacing.request_timeout
        # A service with one request at a time computes locally, which may take long.
        is_watched = self.waits.tell is not None and service.capacity().requests > 1
        try:
            with self._watched(timeout) if is_watched else anyio.fail_after(timeout):
                return await service.send(items)
        except TimeoutError as error:
            raise PassingFault(f"{service.name} did not answer within {timeout:g} s", cause="timeout") from error

    def _watched(self, timeout: float) -> AbstractContextManager[None]:
        began = now_in_loop()

        def tell(text: str) -> None:
            if self._answered_at < began:
                self.waits.hangs(text, began + timeout)

        return bounded_wait(f"{self._service.name} has not answered", tell, timeout)


class Slowest:
    """The latency after which a request counts as one of the slowest ``fraction``; 0 disables hedging."""

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction
        self._recent: deque[float] = deque(maxlen=RECENT_REQUESTS)

    def add(self, seconds: float) -> None:
        self._recent.append(seconds)

    def delay(self, *, sent: int, hedged: int) -> float | None:
        """Seconds after which to hedge a request, or None. Caps ``hedged`` at its share of ``sent``, even in a slowdown."""
        if not self._fraction or hedged >= self._fraction * sent or len(self._recent) < HEDGE_AFTER_REQUESTS:
            return None
        # 5 % above, so that nothing is hedged if all latencies are equal.
        return 1.05 * sorted(self._recent)[int((1 - self._fraction) * len(self._recent))]


async def hedged(
    request: Callable[[], Awaitable[Result]],
    delay: float,
    begin: Callable[[], Flight | None],
    end: Callable[[Flight], None],
) -> Result:
    """The result of a request, or of a second one sent after ``delay`` seconds, whichever comes first.

    ``begin`` takes a slot for the second (None if there is none), ``end`` releases it. Raises the first exception if neither
    succeeds.
    """
    answers: list[Result] = []
    errors: list[Exception] = []
    running = 1

    async def race() -> None:
        nonlocal running
        try:
            answers.append(await request())
        except Exception as error:
            errors.append(error)
        running -= 1
        if answers or not running:
            racers.cancel_scope.cancel()

    async with anyio.create_task_group() as racers:
        racers.start_soon(race)
        await anyio.sleep(delay)
        if (flight := begin()) is not None:
            running += 1
            try:
                await race()
            finally:
                end(flight)
    if not answers:
        raise errors[0]
    return answers[0]
