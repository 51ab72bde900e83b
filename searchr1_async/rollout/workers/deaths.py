"""How often workers may die before something is wrong with more than one of them. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True)
class DeathRecord:
    """Deaths within a time. One now and then is played around; many are a bug, or a machine without memory."""

    most: int = 5
    """Deaths within ``seconds`` that are made good; the next is one too many."""
    seconds: float = 120.0
    count: int = 0
    """In all."""
    _recent: deque[float] = field(default_factory=deque)

    def is_too_many(self, now: float) -> bool:
        """Counts a death, and says whether to give up."""
        self.count += 1
        self._recent.append(now)
        while now - self._recent[0] > self.seconds:
            self._recent.popleft()
        return len(self._recent) > self.most
