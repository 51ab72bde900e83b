"""Limit on worker deaths. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True)
class DeathRecord:
    """Deaths in a sliding window. An occasional one is tolerated; many mean a bug or a lack of memory."""

    most: int = 5
    """Tolerated deaths within ``seconds``."""
    seconds: float = 120.0
    count: int = 0
    """Total deaths."""
    _recent: deque[float] = field(default_factory=deque)

    def is_too_many(self, now: float) -> bool:
        """Counts a death; returns whether to give up."""
        self.count += 1
        self._recent.append(now)
        while now - self._recent[0] > self.seconds:
            self._recent.popleft()
        return len(self._recent) > self.most
