"""Requests to one service, each sent until it is answered: slots, backoff, outages and ``Retry-After``.

A request in flight holds one of the service's slots. A batch that backs off holds none, so it does not block others. What
to do is decided by :mod:`~searchr1_async.search.pacing`.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import anyio

from searchr1_async.boundary.network import long_wait_text
from searchr1_async.boundary.waits import REPORT_AFTER, Notify, notify_of_wait
from searchr1_async.errors import SearchError, SearchUnavailableError
from searchr1_async.search.faults import PassingFault, RefusedInput, TooManyRequests
from searchr1_async.search.pacing import Flight, Pacer, PacingSettings
from searchr1_async.search.stats import ServiceStatistics

logger = logging.getLogger(__name__)
SUSPECT_AFTER = 2
"""Transient faults after which a batch is split, if others succeed. A 10 % fault rate splits 1 % of batches."""

Key = TypeVar("Key")
Item = TypeVar("Item")
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a service accepts."""

    items: int
    """Per request."""
    requests: int
    """In flight at once."""


@dataclass(frozen=True, slots=True)
class RemoteService(Generic[Item, Value]):
    """A service, as described in :class:`~searchr1_async.search.dispatch.Dispatcher`."""

    name: str
    send: Callable[[Sequence[Item]], Awaitable[Sequence[Value]]]
    capacity: Callable[[], Capacity]
    pacing: PacingSettings
    tally: ServiceStatistics
    failure: type[SearchError]


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


@dataclass(slots=True)
class WaitReports:
    """Tells every wait over :data:`~searchr1_async.boundary.waits.REPORT_AFTER` seconds once, with its reason and its end.

    The end of an outage is told when it comes.
    """

    tell: Notify = logger.warning
    _told: dict[str, float] = field(default_factory=dict)

    def report(self, what: str, why: object, seconds: float) -> None:
        """Requests that fail together have about the same end, so they are told once."""
        until = now_in_loop() + seconds
        if seconds > REPORT_AFTER and until > self._told.get(what, -math.inf) + REPORT_AFTER:
            self._told[what] = until
            notify_of_wait(seconds, f"{what} ({why})", self.tell)

    def end(self, what: str, words: str) -> None:
        """Tells ``words`` where the wait was told."""
        if self._told.pop(what, None) is not None:
            self.tell(words)


class RetriedRequests(Generic[Key, Item, Value]):
    """Sends batches to a service, each again until it is answered. Bound to one event loop.

    Args:
        service: where requests go.
        wanted: the items of a batch; first drops the keys that nobody waits for from it.
        waiting: number of keys that wait for a request.
        on_room: called when another batch may be sent.
    """

    def __init__(
        self,
        service: RemoteService[Item, Value],
        wanted: Callable[[list[Key]], list[Item]],
        waiting: Callable[[], int],
        on_room: Callable[[], None],
    ) -> None:
        self._service = service
        self._wanted, self._waiting, self._on_room = wanted, waiting, on_room
        self.pacer = Pacer(service.pacing)
        self.waits = WaitReports()
        self.resting = 0
        """Batches that back off."""
        self._queued = 0
        self._freed = anyio.Event()
        self._answered_at = -math.inf

    @property
    def statistics(self) -> ServiceStatistics:
        """Totals and current state."""
        return replace(
            copy.deepcopy(self._service.tally),
            limit=min(self.pacer.limit, self._service.capacity().requests),
            in_flight=self.pacer.in_flight,
            waiting=self._waiting(),
            seconds_down=self.pacer.down_for(now_in_loop()),
        )

    def has_room(self) -> bool:
        """Whether a new batch may be sent now; retries go first."""
        return not self._queued and self.pacer.may_send(now_in_loop(), self._service.capacity().requests)

    def expired(self, deadline: Deadline) -> SearchError | None:
        """The failure of a call whose deadline has passed; None if an outage puts it off."""
        now, service = now_in_loop(), self._service
        since = now if self.pacer.is_failing else self.pacer.up_since
        if since + deadline.seconds > now:
            deadline.at = since + deadline.seconds
            return None
        return service.failure(
            f"no answer from {service.name} within {deadline.seconds:g} s: check that it is up and its rate limits, or set a "
            "longer deadline"
        )

    async def answers(self, batch: list[Key], flight: Flight | None) -> Mapping[Key, Value]:
        """Sends a batch until it is answered, first in the slot ``flight``; drops keys that nobody waits for.

        Raises RefusedInput where it should be sent in parts, since an item may be the cause of its faults.
        """
        began, faults = now_in_loop(), 0
        while True:
            taken, flight = flight or await self._slot(len(batch)), None
            try:
                return await self._attempt(batch, taken)
            except PassingFault as fault:
                faults += 1
                self._refuse_hopeless(fault, began)
                # Others succeed, so an item in it may be the cause; one that times out may be too large.
                is_suspect = self._answered_at > began or fault.cause == "timeout"
                if len(batch) > 1 and faults >= SUSPECT_AFTER and is_suspect:
                    raise RefusedInput(str(fault)) from fault
                self._report(fault)
                pause = self._pause_after(fault, faults)
            await self._rest(pause)

    def _refuse_hopeless(self, fault: PassingFault, began: float) -> None:
        """Raises if the service asks for too long a wait, has been down for too long, or fails this batch for too long."""
        now, name, pacing = now_in_loop(), self._service.name, self._service.pacing
        if (asked := fault.retry_after or 0.0) > pacing.longest_wait:
            words = long_wait_text(name, asked, pacing.longest_wait, "PacingSettings.longest_wait")
            raise SearchUnavailableError(f"{words} ({fault})") from fault
        down = self.pacer.down_for(now)
        if down > pacing.max_outage:
            raise SearchUnavailableError(
                f"{name} has been down for {down:.0f} s ({fault}): restart it and resume, or raise PacingSettings.max_outage"
            ) from fault
        if not down and now - max(began, self.pacer.up_since) > pacing.retry_budget:
            raise self._service.failure(f"{name} kept failing for {now - began:.0f} s ({fault})") from fault

    def _report(self, fault: PassingFault) -> None:
        now, service = now_in_loop(), self._service
        down = self.pacer.down_for(now)
        if isinstance(fault, TooManyRequests):
            self.waits.report(f"{service.name} asks to back off", fault, (self.pacer.opens_at(now) or now) - now)
        elif not down:
            self.waits.report(f"{service.name} asks to back off", fault, fault.retry_after or 0.0)
        elif down > REPORT_AFTER:
            self.waits.report(f"{service.name} does not answer", fault, service.pacing.max_outage - down)

    def _pause_after(self, fault: PassingFault, faults: int) -> float:
        """Seconds of backoff, with full jitter."""
        if isinstance(fault, TooManyRequests) or self.pacer.down_for(now_in_loop()):
            return 0.0  # the pacer delays all batches, this one included
        pacing = self._service.pacing
        longest = min(2 * pacing.first_pause * 2.0 ** min(faults - 1, 30), pacing.longest_pause)
        return max(fault.retry_after or 0.0, random.uniform(0, longest))

    async def _rest(self, seconds: float) -> None:
        """Backoff. A resting batch wakes nobody, so if all of them rest, a waiting one has to probe."""
        self.resting += 1
        try:
            if seconds:
                self._on_room()  # others need not wait for this batch
            await anyio.sleep(seconds)
        finally:
            self.resting -= 1

    async def _slot(self, items: int) -> Flight:
        """Waits for a request slot and takes it."""
        self._queued += 1
        try:
            while not self.pacer.may_send(now := now_in_loop(), self._service.capacity().requests):
                opens = self.pacer.opens_at(now)
                with anyio.move_on_after(None if opens is None else opens - now):
                    await self._freed.wait()
            flight = self.pacer.begin(now, items)
        finally:
            self._queued -= 1
        self._on_room()  # there may be room for more
        return flight

    async def _attempt(self, batch: list[Key], flight: Flight) -> Mapping[Key, Value]:
        """Sends one request and tells the pacer its outcome."""
        is_settled = False
        try:
            if not (items := self._wanted(batch)):
                return {}
            values = await self._request(items)
            is_settled = True
            self._settle(flight, None)
            return dict(zip(batch, values, strict=True))
        except SearchError as fault:
            is_settled = True
            self._settle(flight, fault)
            raise
        finally:
            if not is_settled:
                self.pacer.abandoned(flight)
            self._freed.set()
            self._freed = anyio.Event()

    async def _request(self, items: Sequence[Item]) -> Sequence[Value]:
        service = self._service
        service.tally.batch_sizes[len(items)] += 1
        timeout = service.pacing.request_timeout
        try:
            with anyio.fail_after(timeout):
                values = await service.send(items)
        except TimeoutError as error:
            raise PassingFault(f"{service.name} did not answer within {timeout:g} s", cause="timeout") from error
        if len(values) != len(items):
            raise PassingFault(f"{service.name} answered {len(values)} of {len(items)} items", cause="malformed")
        return values

    def _settle(self, flight: Flight, fault: SearchError | None) -> None:
        now, service = now_in_loop(), self._service
        if isinstance(fault, PassingFault):
            service.tally.faults[fault.cause] += 1
            self.pacer.failed(flight, now, fault)
            return
        # A refusal, too, says that it is up.
        capacity = service.capacity()
        is_short = fault is None and self._waiting() >= capacity.items
        self.pacer.succeeded(flight, now, most=capacity.requests, is_short=is_short)
        if fault is None:
            self._answered_at = now
            self.waits.end(f"{service.name} does not answer", f"{service.name} answers again")
            service.tally.latency.add(now - flight.began)
