"""Statistics of the search: differences of snapshots, metrics, and latency histograms."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.search.stats import GROWTH, SHORTEST, Latency, SearchStatistics


def test_what_lay_between_two_snapshots() -> None:
    search = SearchStatistics(requests=5, texts=10, memory_hits=2)
    search.embedding.limit = 2
    search.embedding.batch_sizes[10] += 3
    search.embedding.faults["503"] += 2
    search.latency.add(1.0)
    earlier = search.snapshot()
    search.requests, search.texts, search.memory_hits = 8, 16, 4
    search.embedding.limit = 7
    search.embedding.batch_sizes.update([10, 4])
    search.embedding.faults["429"] += 1
    search.latency.add(0.1)
    between = search.snapshot().since(earlier)
    assert (between.requests, between.texts, between.memory_hits) == (3, 6, 2)
    embedding = between.embedding
    assert (embedding.batch_sizes, embedding.faults, embedding.limit) == ({4: 1, 10: 1}, {"429": 1}, 7)
    assert (embedding.requests, embedding.texts, embedding.mean_batch) == (2, 14, 7.0)
    assert between.latency.counts.total() == 1
    assert between.latency.quantile(0.99) < 0.11
    metrics = between.metrics()
    assert metrics["search/cache_hit_rate"] == 2 / 6
    assert metrics["search/embedding/faults"] == 1
    assert metrics["search/embedding/mean_batch"] == 7.0


def test_nothing_searched_has_figures_too() -> None:
    assert SearchStatistics().metrics()["search/cache_hit_rate"] == 0
    assert Latency().quantile(0.99) == 0


@given(st.lists(st.floats(0, 1_000), min_size=1, max_size=200), st.floats(0.01, 1))
def test_quantiles_are_at_most_one_bucket_too_high(seconds: list[float], fraction: float) -> None:
    latency = Latency()
    for one in seconds:
        latency.add(one)
    true = max(SHORTEST, sorted(seconds)[max(0, math.ceil(fraction * len(seconds) - 1e-9) - 1)])
    assert true * (1 - 1e-9) <= latency.quantile(fraction) <= true * GROWTH * (1 + 1e-9)
