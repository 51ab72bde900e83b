"""Counters of the search and of each service behind it."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import dataclass, field, replace

SHORTEST = 1e-4
"""Seconds; shorter latencies are clamped to this."""
GROWTH = 1.05
"""Ratio of a bucket's edges: percentiles are at most 5 % too high."""
_LOG_GROWTH = math.log(GROWTH)


@dataclass(slots=True)
class Latency:
    """A latency histogram with logarithmic buckets: percentiles of any number of requests in constant memory."""

    counts: Counter[int] = field(default_factory=Counter)
    """Requests by bucket; bucket ``b`` ends at ``SHORTEST * GROWTH**b`` seconds."""

    def add(self, seconds: float) -> None:
        self.counts[max(0, math.ceil(math.log(max(seconds, SHORTEST) / SHORTEST) / _LOG_GROWTH))] += 1

    def quantile(self, fraction: float) -> float:
        """Seconds, up to 5 % too high; 0 if empty."""
        left = fraction * self.counts.total()
        for bucket, count in sorted(self.counts.items()):
            left -= count
            if left <= 1e-9:
                return SHORTEST * GROWTH**bucket
        return 0.0

    def since(self, earlier: Latency) -> Latency:
        return Latency(self.counts - earlier.counts)


@dataclass(slots=True)
class ServiceStatistics:
    """Requests to the embedder or the store."""

    batch_sizes: Counter[int] = field(default_factory=Counter)
    """Number of requests, retries included, by number of texts."""
    joined: int = 0
    """Texts that were already pending when requested, so sent once."""
    faults: Counter[str] = field(default_factory=Counter)
    """Retried requests by cause (``"429"``, ``"503"``, ``"reset"``, ``"timeout"``, …)."""
    latency: Latency = field(default_factory=Latency)
    """Of answered requests."""
    limit: int = 0
    """Requests allowed at once now."""
    in_flight: int = 0
    """Requests now."""
    waiting: int = 0
    """Texts waiting for a request now."""
    seconds_down: float = 0.0
    """Of the current outage."""

    @property
    def requests(self) -> int:
        return self.batch_sizes.total()

    @property
    def texts(self) -> int:
        return sum(size * count for size, count in self.batch_sizes.items())

    @property
    def mean_batch(self) -> float:
        return self.texts / self.requests if self.requests else 0.0

    def since(self, earlier: ServiceStatistics) -> ServiceStatistics:
        return replace(
            self,
            batch_sizes=self.batch_sizes - earlier.batch_sizes,
            joined=self.joined - earlier.joined,
            faults=self.faults - earlier.faults,
            latency=self.latency.since(earlier.latency),
        )

    def metrics(self) -> dict[str, float]:
        return {
            "requests": float(self.requests),
            "mean_batch": self.mean_batch,
            "joined": float(self.joined),
            "faults": float(self.faults.total()),
            "p50": self.latency.quantile(0.5),
            "p99": self.latency.quantile(0.99),
            "limit": float(self.limit),
            "seconds_down": self.seconds_down,
        }


@dataclass(slots=True)
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

    @property
    def hit_rate(self) -> float:
        """Share of queries answered from memory or disk."""
        return (self.memory_hits + self.disk_hits) / self.texts if self.texts else 0.0

    def snapshot(self) -> SearchStatistics:
        return copy.deepcopy(self)

    def since(self, earlier: SearchStatistics) -> SearchStatistics:
        """What lies between two snapshots of one search; limit, in flight, waiting and down are those of the later one."""
        counts = ("requests", "texts", "memory_hits", "disk_hits", "failed")
        parts = ("latency", "embedding", "querying")
        return SearchStatistics(
            **{name: getattr(self, name) - getattr(earlier, name) for name in counts},
            **{name: getattr(self, name).since(getattr(earlier, name)) for name in parts},
        )

    def metrics(self) -> dict[str, float]:
        """For a run's metrics: ``search/queries``, ``search/cache_hit_rate``, ``search/p99``, …"""
        services = {"embedding": self.embedding, "store": self.querying}
        return {
            "search/calls": float(self.requests),
            "search/queries": float(self.texts),
            "search/failed": float(self.failed),
            "search/cache_hit_rate": self.hit_rate,
            "search/p50": self.latency.quantile(0.5),
            "search/p99": self.latency.quantile(0.99),
            **{f"search/{of}/{name}": value for of, each in services.items() for name, value in each.metrics().items()},
        }
