"""Latency histograms: percentiles close to the true ones, and differences of snapshots."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.search.stats import GROWTH, SHORTEST, Latency, LatencyTally


def tally_of(seconds: list[float]) -> LatencyTally:
    tally = LatencyTally()
    for one in seconds:
        tally.add(one)
    return tally


@given(st.lists(st.floats(SHORTEST, 1_000), min_size=1, max_size=200), st.floats(0.01, 1))
def test_quantiles_are_at_most_one_bucket_too_high(seconds: list[float], fraction: float) -> None:
    latency = tally_of(seconds).snapshot()
    true = sorted(seconds)[max(0, math.ceil(fraction * len(seconds) - 1e-9) - 1)]
    assert true * (1 - 1e-9) <= latency.quantile(fraction) <= true * GROWTH * (1 + 1e-9)
    assert latency.count == len(seconds)
    assert latency.mean == pytest.approx(sum(seconds) / len(seconds))


@given(st.lists(st.floats(0, 10)), st.lists(st.floats(0, 10)))
def test_snapshots_differ_by_what_lay_between(before: list[float], after: list[float]) -> None:
    tally = tally_of(before)
    earlier = tally.snapshot()
    for one in after:
        tally.add(one)
    between = tally.snapshot() - earlier
    assert between.counts == tally_of(after).snapshot().counts
    assert between.total == pytest.approx(sum(after), abs=1e-6)


def test_nothing_took_no_time() -> None:
    assert (Latency().p50, Latency().p90, Latency().p99, Latency().mean, Latency().count) == (0, 0, 0, 0, 0)
    assert tally_of([0.0]).snapshot().p99 == SHORTEST
