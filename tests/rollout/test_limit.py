"""Sample limit against simulated services."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from searchr1_async.errors import ConfigurationError
from searchr1_async.rollout.limit import QUIET_SECONDS, Cause, Flight, LimitSettings, LoadCurve, SampleLimit


def filled(limit: SampleLimit, now: float, samples: int = 1) -> list[Flight]:
    """Fills the limit with requests."""
    flights = []
    while limit.may_begin(samples):
        flights.append(limit.begin(now, samples))
    return flights


@dataclass
class Crowd:
    """Unlimited work for a service with ``servers`` servers and ``seconds(now, chance)`` per sample."""

    seconds: Callable[[random.Random], float]
    servers: int = 1 << 20
    samples: int = 1
    now: float = 100.0
    done: int = 0
    _free: list[float] = field(default_factory=list)
    _ends: list[tuple[float, int, Flight]] = field(default_factory=list)

    def play(self, limit: SampleLimit, count: int) -> None:
        """Runs until ``count`` answers."""
        chance, order = random.Random(f"{self.now}"), itertools.count()
        for _ in range(count):
            while limit.may_begin(self.samples):
                flight = limit.begin(self.now, self.samples)
                starts = self.now
                if len(self._free) >= self.servers:
                    starts = max(starts, heapq.heappop(self._free))
                ends = starts + self.seconds(chance)
                heapq.heappush(self._free, ends)
                heapq.heappush(self._ends, (ends, next(order), flight))
            self.now, _, flight = heapq.heappop(self._ends)
            limit.finished(flight, self.now, is_short=True)
            self.done += 1


def small(**more: int) -> SampleLimit:
    return SampleLimit(LimitSettings(**{"first": 128, "most": 2048, **more}))


@pytest.mark.parametrize("samples", [1, 8])
def test_a_service_that_is_slow_by_nature_gets_all_that_is_wanted(samples: int) -> None:
    limit = small()
    crowd = Crowd(lambda chance: 60.0 * chance.lognormvariate(0.0, 1.0), samples=samples)
    crowd.play(limit, 4 * 2048)
    assert limit.limit == 2048
    assert not limit.is_queueing
    assert limit.cause(crowd.now, wanted=8) is Cause.SETTINGS


@pytest.mark.parametrize("servers", [16, 64])
@pytest.mark.parametrize("samples", [1, 8])
def test_a_service_that_queues_gets_no_more_than_at_first(servers: int, samples: int) -> None:
    limit = SampleLimit(LimitSettings(first=1024, most=4096))
    crowd = Crowd(lambda chance: chance.lognormvariate(0.0, 0.5), servers=servers, samples=samples)
    crowd.play(limit, 8000)
    assert limit.is_queueing
    assert limit.cause(crowd.now, wanted=8) is Cause.QUEUE
    before = limit.limit
    crowd.play(limit, 4000)
    assert limit.limit == before < 4096


def test_it_doubles_with_a_round_trip_while_more_is_wanted() -> None:
    limit = small()
    for flight in filled(limit, 0.0):
        limit.finished(flight, 1.0, is_short=True)
    assert limit.limit == 256


def test_what_is_not_used_does_not_grow() -> None:
    limit = small()
    for _ in range(1000):
        limit.finished(limit.begin(0.0), 1.0, is_short=False)
    assert limit.limit == 128
    assert limit.cause(1.0, wanted=0) is Cause.WORK


def test_a_push_back_lowers_it_once_a_round_trip_and_it_comes_back_when_it_is_quiet() -> None:
    limit = small()
    flights = filled(limit, 0.0)
    for _ in range(5):
        limit.pushed_back(1.0)
    assert limit.limit == 89
    assert limit.cause(1.0, wanted=8) is Cause.SERVICE
    for flight in flights[:30]:  # above the limit, earlier requests still drain: the limit itself is untested
        limit.pushed_back(9.0)
        limit.finished(flight, 9.0, is_short=True)
    assert limit.limit == 89
    for flight in flights[30:40]:
        limit.finished(flight, 9.0, is_short=True)
    limit.pushed_back(11.0)  # 88 left; a round trip takes 9 s, and the limit was lowered 10 s ago
    assert limit.limit == 61
    for flight in flights[40:]:
        limit.finished(flight, 11.5, is_short=True)
    assert limit.limit == 61, "not quiet yet"
    later = 11.0 + QUIET_SECONDS
    for flight in filled(limit, later):
        limit.finished(flight, later, is_short=True)
    assert limit.limit == 65, "slowly, after back-pressure"


def test_push_backs_take_it_to_its_least_and_no_further() -> None:
    limit = small()
    for second in range(0, 200, 2):
        for flight in filled(limit, float(second)):
            limit.pushed_back(float(second))
            limit.ended(flight)
    assert limit.limit == 8


def test_a_saturated_client_holds_it() -> None:
    limit = small()
    limit.client_is(5.0, cpu=0.97, lag=0.001)
    limit.client_is(6.0, cpu=0.80, lag=0.001)  # still saturated
    for flight in filled(limit, 6.0):
        limit.finished(flight, 7.0, is_short=True)
    assert limit.limit == 128
    assert limit.cause(7.0, wanted=8) is Cause.CLIENT
    limit.client_is(9.0, cpu=0.3, lag=0.001)
    assert not limit.is_saturated
    assert limit.cause(9.0, wanted=8) is Cause.GROWING
    limit.client_is(10.0, cpu=0.3, lag=0.05)
    assert limit.is_saturated, "a median lag of 50 ms"


def test_waiting_in_this_process_does_not_pass_for_a_queue_at_the_service() -> None:
    limit = small(first=1024)
    limit.client_is(0.0, cpu=0.97, lag=0.0)
    for _ in range(20):  # latency grows with the load
        for number, flight in enumerate(filled(limit, 1.0)):
            limit.finished(flight, 2.0 + number / 300, is_short=True)
    assert not limit.is_queueing


def test_a_request_larger_than_the_limit_goes_alone() -> None:
    limit = SampleLimit(LimitSettings(first=4, least=4, most=4))
    assert limit.may_begin(8)
    flight = limit.begin(0.0, 8)
    assert not limit.may_begin(1)
    limit.ended(flight)
    assert limit.may_begin(4)


def test_the_requests_are_bounded_too() -> None:
    limit = small(most_requests=10)
    assert len(filled(limit, 0.0)) == 10
    assert limit.cause(0.0, wanted=1) is Cause.SETTINGS


@pytest.mark.parametrize("name", ["first", "least", "most", "most_requests"])
def test_bounds_that_let_nothing_through_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        LimitSettings(**{name: 0})


def test_a_load_curve_tells_room_from_a_queue_and_forgets() -> None:
    curve = LoadCurve()
    for load in (64, 128):
        for _ in range(LoadCurve.ENOUGH):
            curve.add(load, 2.0)
    assert curve.elasticity == pytest.approx(0.0)
    for _ in range(10 * LoadCurve.ENOUGH):
        curve.add(128, 4.0)
    assert curve.elasticity == pytest.approx(1.0, abs=0.01)
    assert curve.is_steep
    for _ in range(LoadCurve.STALE + LoadCurve.ENOUGH):
        curve.add(32, 2.0)
    assert not curve.is_steep


class Limits(RuleBasedStateMachine):
    """The bounds hold and nothing is lost under any sequence of events."""

    def __init__(self) -> None:
        super().__init__()
        self.limit = SampleLimit(LimitSettings(first=32, most=64, most_requests=20))
        self.now = 0.0
        self.flights: list[Flight] = []

    @rule(samples=st.integers(1, 16))
    def begin(self, samples: int) -> None:
        if self.limit.may_begin(samples):
            alone = not self.flights
            self.flights.append(self.limit.begin(self.now, samples))
            assert alone or self.limit.in_flight <= self.limit.limit
            assert len(self.flights) <= 20

    @precondition(lambda self: self.flights)
    @rule(data=st.data(), how=st.sampled_from(["finished", "ended"]), is_short=st.booleans())
    def end(self, data: st.DataObject, how: str, is_short: bool) -> None:
        flight = self.flights.pop(data.draw(st.integers(0, len(self.flights) - 1)))
        before = self.limit.limit
        if how == "finished":
            self.limit.finished(flight, self.now, is_short=is_short)
        else:
            getattr(self.limit, how)(flight)
        assert self.limit.limit == before or (how == "finished" and is_short and not self.limit.is_saturated)

    @rule(seconds=st.floats(0.0, 30.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def push_back(self) -> None:
        before = self.limit.limit
        self.limit.pushed_back(self.now)
        assert self.limit.limit <= before
        assert self.limit.cause(self.now, wanted=1) is Cause.SERVICE

    @rule(cpu=st.floats(0.0, 1.2), lag=st.floats(0.0, 0.1))
    def client(self, cpu: float, lag: float) -> None:
        self.limit.client_is(self.now, cpu=cpu, lag=lag)

    @invariant()
    def holds(self) -> None:
        assert self.limit.in_flight == sum(flight.samples for flight in self.flights)
        assert self.limit.requests == len(self.flights)
        assert 8 <= self.limit.limit <= 64
        assert self.flights or self.limit.may_begin(10**6)


TestLimits = Limits.TestCase
TestLimits.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
