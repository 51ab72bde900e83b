"""Statistics of the search: differences of snapshots, metrics and text."""

from __future__ import annotations

from types import MappingProxyType

from searchr1_async.search.stats import LatencyTally, SearchStatistics, ServiceTally


def statistics(tally: ServiceTally, calls: int, hits: int, latency: LatencyTally) -> SearchStatistics:
    return SearchStatistics(
        requests=calls,
        texts=2 * calls,
        memory_hits=hits,
        latency=latency.snapshot(),
        embedding=tally.snapshot(),
        querying=tally.snapshot(),
    )


def test_what_lay_between_two_snapshots() -> None:
    tally, latency = ServiceTally(), LatencyTally()
    tally.sizes[10] += 3
    tally.faults["503"] += 2
    latency.add(1.0)
    earlier = statistics(tally, 5, 2, latency)
    tally.sizes[10] += 1
    tally.sizes[4] += 1
    tally.faults["429"] += 1
    latency.add(0.1)
    between = statistics(tally, 8, 4, latency).since(earlier)
    assert (between.requests, between.texts, between.memory_hits) == (3, 6, 2)
    assert between.embedding.batch_sizes == MappingProxyType({4: 1, 10: 1})
    assert between.embedding.faults == {"429": 1}
    assert (between.embedding.requests, between.embedding.texts, between.embedding.mean_batch) == (2, 14, 7.0)
    assert between.latency.count == 1
    assert between.latency.p99 < 0.11
    metrics = between.metrics()
    assert metrics["search/cache_hit_rate"] == 2 / 6
    assert metrics["search/embedding/faults"] == 1
    assert metrics["search/store/mean_batch"] == 7.0
    assert "6 queries in 3 calls, 33% from the cache" in str(between)
    assert "2 requests of 7.0 texts on average" in str(between)
    assert "1 × 429" in str(between)


def test_nothing_searched_has_figures_too() -> None:
    assert SearchStatistics().metrics()["search/cache_hit_rate"] == 0
    assert "0 queries" in str(SearchStatistics())
