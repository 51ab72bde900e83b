"""Latency histogram with logarithmic buckets: percentiles of any number of requests in constant memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
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
