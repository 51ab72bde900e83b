"""Sharing of first turns, by measured latencies, delays and CPU."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.errors import ConfigurationError
from searchr1_async.rollout.first_turn import Backlog, Sharing, SharingSettings


def taught(seconds: list[float], *, continuing: float = 1.0) -> Sharing:
    """Has seen these single first turns, of which a share continued."""
    sharing = Sharing()
    for number, each in enumerate(seconds):
        sharing.finished(each, samples=1, turn=0)
        if number < continuing * len(seconds):
            sharing.began(0.0, samples=1, turn=1)
    sharing.backlog = Backlog()
    return sharing


def lognormal(median: float, sigma: float, count: int = 256) -> list[float]:
    chance = random.Random(1)
    return [median * chance.lognormvariate(0.0, sigma) for _ in range(count)]


def decisions(sharing: Sharing, groups: int, *, members: int = 8, now: float = 100.0) -> list[bool]:
    """Whether each of a burst of groups is shared, including the effect on the client's thread."""
    found = []
    for _ in range(groups):
        is_shared = sharing.is_worth_it(now, members)
        found.append(is_shared)
        for samples in [members] if is_shared else [1] * members:
            sharing.began(now, samples=samples, turn=0)
    return found


def test_it_begins_by_sharing_and_splits_now_and_then_to_see() -> None:
    found = decisions(Sharing(), 128)
    assert found[:32] == ([True] * 3 + [False]) * 8, "64 single first turns, as needed for a decision"
    assert found[32:].count(False) == 3


def test_a_long_tail_is_split_and_a_short_one_shared() -> None:
    assert decisions(taught(lognormal(10.0, 1.0)), 4) == [False] * 4
    short = decisions(taught(lognormal(10.0, 0.1)), 64)
    assert short.count(False) == 2, "one of 32 is a probe"


def test_a_burst_is_split_as_far_as_the_clients_thread_keeps_up() -> None:
    sharing = taught(lognormal(1.0, 1.0))
    gain = sharing.gain(8)
    assert gain is not None
    found = decisions(sharing, 128)
    assert found.index(True) > 5
    # The delay is then about half of a member's gain, and shared requests add little.
    assert (found.index(True) + 1) * 8 * 0.0033 == pytest.approx(gain / 2, rel=0.2)
    assert found[64:].count(False) == 2, "probes"


def test_a_burst_as_large_as_the_last_is_shared_where_splitting_would_hold_up_those_behind() -> None:
    small, large = (taught(lognormal(3.0, 0.6)) for _ in range(2))
    for sharing, groups in ((small, 32), (large, 512)):
        decisions(sharing, groups)
        found = decisions(sharing, groups, now=200.0)
        if groups == 32:
            assert not any(found), "all are split, and the last waits 0.8 s"
        else:
            # Groups behind would wait for the requests of all members; near the end there are few.
            assert found[:400].count(False) <= 400 // 32 + 1
            assert not all(found[-40:])
    assert decisions(large, 1, now=300.0) == [True], "another burst may follow"
    assert decisions(large, 1, now=400.0) == [False], "the last burst had one group"


def test_turns_so_short_that_the_requests_take_longer_are_shared() -> None:
    assert decisions(taught(lognormal(0.01, 1.0)), 16) == [True] * 16


def test_single_turn_episodes_are_shared_whatever_the_tail() -> None:
    sharing = taught(lognormal(10.0, 1.5), continuing=0.0)
    assert sharing.gain(8) == 0.0
    assert all(decisions(sharing, 64)), "not even probes"
    early = Sharing()
    for _ in range(8):
        early.finished(10.0, samples=8, turn=0)
    assert all(decisions(early, 64))


@pytest.mark.parametrize(("cpu", "is_saturated"), [(0.7, False), (0.2, True)])
def test_a_client_with_no_cpu_to_spare_shares(cpu: float, is_saturated: bool) -> None:
    sharing = taught(lognormal(10.0, 1.0))
    sharing.client_is(seconds=1.0, cpu=cpu, is_saturated=is_saturated)
    assert all(decisions(sharing, 32))
    sharing.client_is(seconds=1.0, cpu=0.3, is_saturated=False)
    assert not any(decisions(sharing, 4))


def test_a_request_costs_what_is_measured_and_no_less_than_the_sdk_takes() -> None:
    sharing = taught(lognormal(1.0, 1.0))
    assert sharing.request_seconds == 0.0033

    def second(cpu: float, requests: int) -> None:
        for _ in range(requests):
            sharing.began(0.0, samples=1, turn=2)
        sharing.client_is(seconds=1.0, cpu=cpu, is_saturated=False)

    before = decisions(sharing, 128, now=100.0).count(False)
    for _ in range(50):
        second(0.5, 50)
    assert sharing.request_seconds == pytest.approx(0.01, rel=0.1)
    assert decisions(sharing, 128, now=200.0).count(False) < before / 2, "requests behind a split group wait longer"
    for _ in range(50):
        second(0.05, 50)
    assert sharing.request_seconds == 0.0033
    for _ in range(50):
        second(0.05, 0)
    assert sharing.request_seconds == 0.0033
    for _ in range(50):
        second(1.0, 1)
    assert sharing.request_seconds == 0.0033, "too few to measure"


def test_the_clients_own_delay_does_not_pass_for_a_tail() -> None:
    sharing = Sharing()
    for number in range(256):
        delay = sharing.began(5.0, samples=1, turn=0)
        assert delay == pytest.approx(number * 0.0033)
        sharing.finished(1.0 + delay, samples=1, turn=0, delay=delay)
    assert sharing.gain(8) == pytest.approx(0.0, abs=1e-9)


def test_one_member_is_one_request_either_way() -> None:
    assert taught(lognormal(10.0, 1.0)).is_worth_it(0.0, 1)


@given(seconds=st.lists(st.floats(0.01, 100.0), min_size=64, max_size=128), members=st.integers(2, 16))
def test_the_slowest_of_some_is_what_drawing_them_gives(seconds: list[float], members: int) -> None:
    sharing = taught(seconds)
    slowest, gain = sharing.slowest(members), sharing.gain(members)
    assert slowest is not None
    assert gain is not None
    assert statistics.fmean(seconds) - 1e-6 <= slowest <= max(seconds) + 1e-6
    assert gain == pytest.approx(slowest - statistics.fmean(seconds), abs=1e-6)
    assert (sharing.slowest(members + 1) or 0.0) >= slowest - 1e-6


def test_the_formula_against_chance() -> None:
    seconds = lognormal(1.0, 0.8)
    chance = random.Random(2)
    drawn = statistics.fmean(max(chance.choices(seconds, k=8)) for _ in range(20_000))
    assert taught(seconds).slowest(8) == pytest.approx(drawn, rel=0.03)


def test_it_follows_what_changes() -> None:
    sharing = taught(lognormal(10.0, 1.0))
    for _ in range(512):
        sharing.finished(10.0, samples=1, turn=0)
        sharing.began(0.0, samples=1, turn=1)
    assert sharing.gain(8) == pytest.approx(0.0)
    for _ in range(2000):  # the model stops searching
        sharing.finished(10.0, samples=8, turn=0)
    assert sharing.continuing < 0.05


@pytest.mark.parametrize(
    "wrong",
    [{"margin": -1.0}, {"request_seconds": -0.1}, {"enough": 0}, {"first_probes": 0}, {"enough": 100, "memory": 50}],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong)) if len(wrong) == 1 else "memory"):
        SharingSettings(**wrong)  # type: ignore[arg-type]
