"""What a served search takes, and for how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from searchr1_async.boundary.settings import Count, Range, Seconds, check_settings


@dataclass(frozen=True, slots=True)
class ServingLimits:
    """What one request may hold, and how many there may be.

    Raises:
        ConfigurationError: a limit out of its range.
    """

    body_bytes: Count = 8 << 20
    """Of a request; larger ones get 413. A request of 256 vectors of 3,072 numbers has 4.2 MB."""
    texts: Count = 256
    """To embed, in one request."""
    vectors: Count = 256
    """To look up, in one request."""
    queries: Count = 4_096
    """Of one ``/retrieve``: the original asks for all episodes of a batch at once, 2,560 by its own settings."""
    results: Annotated[int, Range(at_least=1, at_most=100)] = 100
    """Passages for each query, 1 to 100."""
    requests: Count = 64
    """At work at once; others get 429 with ``Retry-After``."""
    seconds: Seconds = 120.0
    """For one request, the reading of its body included; then it gets 504."""
    grace: Seconds = 5.0
    """Seconds that requests in the air have to be finished in when the service stops."""

    def __post_init__(self) -> None:
        check_settings(self, "the limit ")
