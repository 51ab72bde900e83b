"""Faults of an embedder or a store: transient, rate-limited or refused."""

from __future__ import annotations

from searchr1_async.errors import SearchError


class PassingFault(SearchError):
    """Transient: a broken connection, a 5xx, a timeout, a truncated answer.

    ``message`` contains no key and no query, ``cause`` is for the statistics (``"503"``, ``"reset"``, ``"timeout"``,
    ``"malformed"``), ``retry_after`` is in seconds, None if the service gave none.
    """

    def __init__(self, message: str, *, cause: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.cause = cause
        self.retry_after = retry_after


class TooManyRequests(PassingFault):
    """Rate limit (429, or 503 with ``Retry-After``): slows down all requests, not only this one."""

    def __init__(self, message: str, *, cause: str = "429", retry_after: float | None = None) -> None:
        super().__init__(message, cause=cause, retry_after=retry_after)


class RefusedInput(SearchError):
    """The service refuses the request because of an item in it; its parts may succeed on their own."""
