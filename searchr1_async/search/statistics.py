"""What the search did, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class SearchStatistics:
    """Totals since the :class:`~searchr1_async.search.Search` was made. Two snapshots differ by what lay between."""

    requests: int = 0
    """Calls of ``search``."""
    texts: int = 0
    """Queries in them."""
    joined: int = 0
    """Queries that were on their way already, or given twice: answered without a search of their own."""
    failed: int = 0
    """Calls that raised, deadlines included, cancellations not."""
    batches: int = 0
    """Requests to the embedder and the store."""
    batch_sizes: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    """How many batches had how many queries."""
    seconds_embedding: float = 0.0
    seconds_querying: float = 0.0
    """In the store."""
    seconds_waiting: float = 0.0
    """From asking to answer, summed over the calls."""

    @property
    def mean_batch(self) -> float:
        """Queries a batch, 0 before the first."""
        return sum(size * count for size, count in self.batch_sizes.items()) / self.batches if self.batches else 0.0


@dataclass(slots=True)
class Tally:
    """The counters behind :class:`SearchStatistics`."""

    requests: int = 0
    texts: int = 0
    joined: int = 0
    failed: int = 0
    sizes: Counter[int] = field(default_factory=Counter)
    seconds_embedding: float = 0.0
    seconds_querying: float = 0.0
    seconds_waiting: float = 0.0

    def snapshot(self) -> SearchStatistics:
        return SearchStatistics(
            requests=self.requests,
            texts=self.texts,
            joined=self.joined,
            failed=self.failed,
            batches=self.sizes.total(),
            batch_sizes=MappingProxyType(dict(sorted(self.sizes.items()))),
            seconds_embedding=self.seconds_embedding,
            seconds_querying=self.seconds_querying,
            seconds_waiting=self.seconds_waiting,
        )
