"""Counters of the search and of each service behind it.

Latencies are in a histogram with logarithmic buckets: percentiles of any number of requests in constant memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

SHORTEST = 1e-4
"""Seconds; shorter latencies are clamped to this."""
GROWTH = 1.05
"""Ratio of a bucket's edges: percentiles are at most 5 % too high."""
_LOG_GROWTH = math.log(GROWTH)


@dataclass(frozen=True, slots=True)
class Latency:
    """A latency histogram. ``later - earlier`` gives the requests in between."""

    counts: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    """Requests by bucket; bucket ``b`` ends at ``SHORTEST * GROWTH**b`` seconds."""
    total: float = 0.0
    """Sum in seconds."""

    @property
    def count(self) -> int:
        return sum(self.counts.values())

    @property
    def mean(self) -> float:
        """Seconds; 0 if empty."""
        return self.total / self.count if self.counts else 0.0

    def quantile(self, fraction: float) -> float:
        """Seconds, up to 5 % too high; 0 if empty."""
        left = fraction * self.count
        for bucket, count in sorted(self.counts.items()):
            left -= count
            if left <= 1e-9:
                return SHORTEST * GROWTH**bucket
        return 0.0

    @property
    def p50(self) -> float:
        """Median in seconds."""
        return self.quantile(0.5)

    @property
    def p90(self) -> float:
        """Seconds."""
        return self.quantile(0.9)

    @property
    def p99(self) -> float:
        """Seconds."""
        return self.quantile(0.99)

    def __sub__(self, earlier: Latency) -> Latency:
        counts = Counter(self.counts)
        counts.subtract(earlier.counts)
        return Latency(MappingProxyType({b: c for b, c in sorted(counts.items()) if c}), self.total - earlier.total)


class LatencyTally:
    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._total = 0.0

    def add(self, seconds: float) -> None:
        self._counts[max(0, math.ceil(math.log(max(seconds, SHORTEST) / SHORTEST) / _LOG_GROWTH))] += 1
        self._total += seconds

    def snapshot(self) -> Latency:
        return Latency(MappingProxyType(dict(sorted(self._counts.items()))), self._total)


def _none() -> Mapping[int, int]:
    return MappingProxyType({})


def _no_causes() -> Mapping[str, int]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class ServiceStatistics:
    """Requests to the embedder or the store."""

    requests: int = 0
    """Sent, including retries and hedges."""
    batch_sizes: Mapping[int, int] = field(default_factory=_none)
    """Number of requests by number of texts."""
    joined: int = 0
    """Texts that were already pending when requested, so sent once."""
    faults: Mapping[str, int] = field(default_factory=_no_causes)
    """Retried requests by cause (``"429"``, ``"503"``, ``"reset"``, ``"timeout"``, …)."""
    hedged: int = 0
    """Requests sent a second time because the first was slow."""
    latency: Latency = field(default_factory=Latency)
    """Of answered requests."""
    limit: int = 0
    """Current concurrency limit."""
    in_flight: int = 0
    """Requests in flight now."""
    waiting: int = 0
    """Texts waiting for a request now."""
    seconds_down: float = 0.0
    """Length of the current outage; 0 while up."""

    @property
    def texts(self) -> int:
        """Texts in all requests."""
        return sum(size * count for size, count in self.batch_sizes.items())

    @property
    def mean_batch(self) -> float:
        """Texts per request; 0 before the first."""
        return self.texts / self.requests if self.requests else 0.0

    def __str__(self) -> str:
        faults = ", ".join(f"{count:,} × {cause}" for cause, count in self.faults.items()) or "none"
        return (
            f"{self.requests:,} requests of {self.mean_batch:.1f} texts on average, p50 {self.latency.p50:.3f} s, "
            f"p99 {self.latency.p99:.3f} s, faults: {faults}"
        )

    def since(self, earlier: ServiceStatistics) -> ServiceStatistics:
        """Difference of two snapshots; gauges (limit, in flight, waiting, down) are the later one's."""
        return replace(
            self,
            requests=self.requests - earlier.requests,
            batch_sizes=_difference(self.batch_sizes, earlier.batch_sizes),
            joined=self.joined - earlier.joined,
            faults=_difference(self.faults, earlier.faults),
            hedged=self.hedged - earlier.hedged,
            latency=self.latency - earlier.latency,
        )


@dataclass(frozen=True, slots=True)
class SearchStatistics:
    """Totals since the :class:`~searchr1_async.search.Search` was made."""

    requests: int = 0
    """Calls of ``search``."""
    texts: int = 0
    """Queries in these calls."""
    memory_hits: int = 0
    """Queries answered from memory."""
    disk_hits: int = 0
    """Queries answered from the disk cache."""
    failed: int = 0
    """Calls that raised, including deadlines, excluding cancellations."""
    latency: Latency = field(default_factory=Latency)
    """Of successful calls, cache hits included."""
    embedding: ServiceStatistics = field(default_factory=ServiceStatistics)
    querying: ServiceStatistics = field(default_factory=ServiceStatistics)
    """Of the store."""

    def __str__(self) -> str:
        hits = (self.memory_hits + self.disk_hits) / self.texts if self.texts else 0.0
        return (
            f"{self.texts:,} queries in {self.requests:,} calls, {hits:.0%} from the cache, {self.failed:,} calls failed, "
            f"p50 {self.latency.p50:.3f} s, p99 {self.latency.p99:.3f} s\n"
            f"  embedding: {self.embedding}\n  store: {self.querying}"
        )

    def since(self, earlier: SearchStatistics) -> SearchStatistics:
        """Difference of two snapshots of one search."""
        return SearchStatistics(
            requests=self.requests - earlier.requests,
            texts=self.texts - earlier.texts,
            memory_hits=self.memory_hits - earlier.memory_hits,
            disk_hits=self.disk_hits - earlier.disk_hits,
            failed=self.failed - earlier.failed,
            latency=self.latency - earlier.latency,
            embedding=self.embedding.since(earlier.embedding),
            querying=self.querying.since(earlier.querying),
        )

    def metrics(self) -> dict[str, float]:
        """For a run's metrics: ``search/queries``, ``search/cache_hit_rate``, ``search/p99``, …"""
        out = {
            "search/calls": float(self.requests),
            "search/queries": float(self.texts),
            "search/failed": float(self.failed),
            "search/cache_hit_rate": (self.memory_hits + self.disk_hits) / self.texts if self.texts else 0.0,
            "search/p50": self.latency.p50,
            "search/p99": self.latency.p99,
        }
        for name, service in (("embedding", self.embedding), ("store", self.querying)):
            out |= {
                f"search/{name}/requests": float(service.requests),
                f"search/{name}/mean_batch": service.mean_batch,
                f"search/{name}/joined": float(service.joined),
                f"search/{name}/faults": float(sum(service.faults.values())),
                f"search/{name}/p50": service.latency.p50,
                f"search/{name}/p99": service.latency.p99,
                f"search/{name}/limit": float(service.limit),
                f"search/{name}/seconds_down": service.seconds_down,
            }
        return out


def _difference(later: Mapping, earlier: Mapping) -> Mapping:
    return MappingProxyType(
        {key: count - earlier.get(key, 0) for key, count in later.items() if count != earlier.get(key, 0)}
    )


@dataclass(slots=True)
class ServiceTally:
    """The counters behind :class:`ServiceStatistics`."""

    sizes: Counter[int] = field(default_factory=Counter)
    joined: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    hedged: int = 0
    latency: LatencyTally = field(default_factory=LatencyTally)

    def snapshot(self) -> ServiceStatistics:
        return ServiceStatistics(
            requests=self.sizes.total(),
            batch_sizes=MappingProxyType(dict(sorted(self.sizes.items()))),
            joined=self.joined,
            faults=MappingProxyType(dict(sorted(self.faults.items()))),
            hedged=self.hedged,
            latency=self.latency.snapshot(),
        )


@dataclass(slots=True)
class SearchTally:
    """The counters behind :class:`SearchStatistics`."""

    requests: int = 0
    texts: int = 0
    memory_hits: int = 0
    disk_hits: int = 0
    failed: int = 0
    latency: LatencyTally = field(default_factory=LatencyTally)
    embedding: ServiceTally = field(default_factory=ServiceTally)
    querying: ServiceTally = field(default_factory=ServiceTally)

    def snapshot(self) -> SearchStatistics:
        return SearchStatistics(
            requests=self.requests,
            texts=self.texts,
            memory_hits=self.memory_hits,
            disk_hits=self.disk_hits,
            failed=self.failed,
            latency=self.latency.snapshot(),
            embedding=self.embedding.snapshot(),
            querying=self.querying.snapshot(),
        )
