"""The kinds of fault that an embedder or a store can meet: which of them a retry mends, and which say "slower"."""

from __future__ import annotations

from searchr1_async.errors import SearchError


class PassingFault(SearchError):
    """May be gone at the next try: a connection that broke, a 5xx, no answer in time, an answer cut short.

    Args:
        message: what happened and where; no key, no query.
        cause: one word or number for the statistics: ``"503"``, ``"reset"``, ``"timeout"``, ``"malformed"``.
        retry_after: seconds that the service asks to wait; None where it does not say.
    """

    def __init__(self, message: str, *, cause: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.cause = cause
        self.retry_after = retry_after


class TooManyRequests(PassingFault):
    """The service is up and says "slower" (429, or 503 with ``Retry-After``): everyone slows down, not only this request."""

    def __init__(self, message: str, *, cause: str = "429", retry_after: float | None = None) -> None:
        super().__init__(message, cause=cause, retry_after=retry_after)


class RefusedInput(SearchError):
    """The service takes none of this request because of something in it; its parts may fare better alone."""
