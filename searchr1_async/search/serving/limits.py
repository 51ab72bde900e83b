"""What a served search takes, and for how long."""

from __future__ import annotations

from dataclasses import dataclass, fields

from searchr1_async.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class ServingLimits:
    """What one request may hold, and how many there may be.

    Raises:
        ConfigurationError: a limit out of its range.
    """

    body_bytes: int = 8 << 20
    """Of a request; larger ones get 413. A request of 256 vectors of 3,072 numbers has 4.2 MB."""
    texts: int = 256
    """To embed, in one request."""
    vectors: int = 256
    """To look up, in one request."""
    queries: int = 4_096
    """Of one ``/retrieve``: the original asks for all episodes of a batch at once, 2,560 by its own settings."""
    results: int = 100
    """Passages for each query, 1 to 100."""
    requests: int = 64
    """At work at once; others get 429 with ``Retry-After``."""
    seconds: float = 120.0
    """For one request, the reading of its body included; then it gets 504."""
    grace: float = 5.0
    """Seconds that requests in the air have to be finished in when the service stops."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ConfigurationError(f"the limit {field.name} is {getattr(self, field.name)}: give more than 0")
        if self.results > 100:
            raise ConfigurationError(f"the limit results is {self.results}: give 1 to 100")
