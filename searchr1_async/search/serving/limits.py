"""Limits of a served search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from searchr1_async.boundary.settings import Count, Range, Seconds, check_settings


@dataclass(frozen=True, slots=True)
class ServingLimits:
    """Size and concurrency limits of requests. Raises ConfigurationError if one is out of range."""

    body_bytes: Count = 8 << 20
    """Per request; larger bodies get 413. 256 vectors of 3,072 numbers have 4.2 MB."""
    texts: Count = 256
    """Per ``/embed`` request."""
    vectors: Count = 256
    """Per ``/query`` request."""
    queries: Count = 4_096
    """Per ``/retrieve`` request; the original client sends a whole batch, 2,560 with its settings."""
    results: Annotated[int, Range(at_least=1, at_most=100)] = 100
    """Passages per query, 1 to 100."""
    requests: Count = 64
    """Concurrent requests; further ones get 429 with ``Retry-After``."""
    seconds: Seconds = 120.0
    """Per request, including reading its body; then it gets 504."""
    grace: Seconds = 5.0
    """Seconds to finish requests in flight at shutdown."""

    def __post_init__(self) -> None:
        check_settings(self, "the limit ")
