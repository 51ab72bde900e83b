"""Pacing: decisions from observations and time alone."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from searchr1_async.errors import ConfigurationError
from searchr1_async.search.faults import PassingFault, TooManyRequests
from searchr1_async.search.pacing import Flight, Pacer, PacingSettings

MOST = 64
BROKEN = PassingFault("the line broke", cause="reset")


def answered(pacer: Pacer, now: float, *, is_short: bool = True) -> None:
    pacer.succeeded(pacer.begin(now), now, most=MOST, is_short=is_short)


def test_it_grows_by_one_for_each_answer_until_the_first_push_back_and_then_by_one_a_round() -> None:
    pacer = Pacer(PacingSettings(first_limit=4))
    for _ in range(28):
        answered(pacer, 0.0)
    assert pacer.limit == 32
    pacer.failed(pacer.begin(1.0), 1.0, TooManyRequests("slower", retry_after=0.0))
    assert pacer.limit == 16
    for _ in range(16):
        answered(pacer, 2.0)
    assert pacer.limit == 16
    answered(pacer, 2.0)
    assert pacer.limit == 17


def test_it_does_not_grow_where_more_would_not_help_nor_over_its_bound() -> None:
    pacer = Pacer(PacingSettings(first_limit=4))
    for _ in range(100):
        answered(pacer, 0.0, is_short=False)
    assert pacer.limit == 4
    for _ in range(100):
        answered(pacer, 0.0)
    assert pacer.limit == MOST


def test_push_backs_of_requests_that_flew_together_count_once() -> None:
    pacer = Pacer(PacingSettings(first_limit=16))
    together = [pacer.begin(0.0) for _ in range(8)]
    for flight in together:
        pacer.failed(flight, 1.0, TooManyRequests("slower", retry_after=2.0))
    assert pacer.limit == 8
    assert not pacer.may_send(2.9, MOST)
    assert pacer.opens_at(2.9) == 3.0
    assert pacer.may_send(3.0, MOST)


def test_pauses_double_until_something_is_answered() -> None:
    pacer = Pacer(PacingSettings(first_pause=1.0, longest_pause=5.0))
    now, pauses = 0.0, []
    for _ in range(5):
        pacer.failed(pacer.begin(now), now, TooManyRequests("slower", retry_after=None))
        opens = pacer.opens_at(now)
        assert opens is not None
        pauses.append(opens - now)
        now = opens
    assert pauses == [1.0, 2.0, 4.0, 5.0, 5.0]
    answered(pacer, now)
    pacer.failed(pacer.begin(now), now, TooManyRequests("slower", retry_after=None))
    assert pacer.opens_at(now) == now + 1.0


def test_faults_in_a_row_open_the_breaker_and_one_answer_closes_it() -> None:
    pacer = Pacer(PacingSettings(faults_until_down=3, first_pause=1.0, longest_pause=4.0))
    for now in (10.0, 11.0):
        pacer.failed(pacer.begin(now), now, BROKEN)
    answered(pacer, 11.5)
    for now in (12.0, 13.0):
        pacer.failed(pacer.begin(now), now, BROKEN)
    assert pacer.down_for(13.0) == 0
    pacer.failed(pacer.begin(14.0), 14.0, BROKEN)
    assert pacer.down_for(14.0) == 2.0
    now, pauses = 14.0, []
    for _ in range(4):
        opens = pacer.opens_at(now)
        assert opens is not None
        pauses.append(opens - now)
        assert not pacer.may_send(opens - 0.01, MOST)
        assert pacer.may_send(opens, MOST)
        probe = pacer.begin(opens)
        assert not pacer.may_send(opens + 100, MOST), "one probe at a time"
        now = opens
        pacer.failed(probe, now, BROKEN)
    assert pauses == [1.0, 2.0, 4.0, 4.0]
    probe = pacer.begin(now + 4)
    pacer.succeeded(probe, now + 4, most=MOST, is_short=False)
    assert pacer.down_for(now + 4) == 0
    assert pacer.up_since == now + 4
    assert pacer.may_send(now + 4, MOST)


def test_a_service_that_hangs_is_down_after_two() -> None:
    pacer = Pacer(PacingSettings(faults_until_down=5))
    flights = [pacer.begin(0.0), pacer.begin(0.0)]
    pacer.failed(flights[0], 30.0, BROKEN)
    assert pacer.down_for(30.0) == 0
    pacer.failed(flights[1], 30.0, BROKEN)
    assert pacer.down_for(30.0) == 30.0


def test_too_many_requests_means_that_it_is_up() -> None:
    pacer = Pacer(PacingSettings(faults_until_down=2))
    for _ in range(2):
        pacer.failed(pacer.begin(0.0), 0.0, BROKEN)
    assert pacer.down_for(1.0) == 1.0
    pacer.failed(pacer.begin(1.0), 1.0, TooManyRequests("slower", retry_after=5.0))
    assert pacer.down_for(2.0) == 0
    assert pacer.opens_at(2.0) == 6.0


def test_a_probe_that_is_abandoned_makes_room_for_another() -> None:
    pacer = Pacer(PacingSettings(faults_until_down=1, first_pause=1.0))
    pacer.failed(pacer.begin(0.0), 0.0, BROKEN)
    probe = pacer.begin(1.0)
    assert not pacer.may_send(1.0, MOST)
    pacer.abandoned(probe)
    assert pacer.may_send(1.0, MOST)


@pytest.mark.parametrize(
    "wrong",
    [
        {"request_timeout": 0},
        {"max_outage": -1},
        {"first_limit": 0},
        {"faults_until_down": 0},
    ],
)
def test_settings_out_of_their_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        PacingSettings(**wrong)  # type: ignore[arg-type]


class PacerMachine(RuleBasedStateMachine):
    """Any order of requests, outcomes and times: never above the limit, never stuck."""

    def __init__(self) -> None:
        super().__init__()
        self.pacer = Pacer(PacingSettings(faults_until_down=3))
        self.flights: list[Flight] = []
        self.now = 0.0

    @rule(seconds=st.floats(0, 50))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.pacer.may_send(self.now, MOST))
    @rule()
    def begin(self) -> None:
        assert len(self.flights) < MOST
        self.flights.append(self.pacer.begin(self.now))

    @precondition(lambda self: self.flights)
    @rule(
        data=st.data(),
        how=st.sampled_from(["succeeded", "failed", "pushed_back", "abandoned"]),
        retry_after=st.one_of(st.none(), st.floats(0, 60)),
        is_short=st.booleans(),
    )
    def end(self, data: st.DataObject, how: str, retry_after: float | None, is_short: bool) -> None:
        flight = self.flights.pop(data.draw(st.integers(0, len(self.flights) - 1)))
        if how == "succeeded":
            self.pacer.succeeded(flight, self.now, most=MOST, is_short=is_short)
            assert self.pacer.down_for(self.now) == 0
        elif how == "failed":
            self.pacer.failed(flight, self.now, BROKEN)
        elif how == "pushed_back":
            self.pacer.failed(flight, self.now, TooManyRequests("slower", retry_after=retry_after))
        else:
            self.pacer.abandoned(flight)

    @invariant()
    def it_counts_right_and_opens_again(self) -> None:
        assert self.pacer.in_flight == len(self.flights)
        assert 1 <= self.pacer.limit <= MOST
        opens = self.pacer.opens_at(self.now)
        if opens is None:
            assert self.flights or self.pacer.may_send(self.now, MOST)
        else:
            assert self.now < opens <= self.now + 60
            assert not self.pacer.may_send(self.now, MOST)


TestPacerMachine = PacerMachine.TestCase
TestPacerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
