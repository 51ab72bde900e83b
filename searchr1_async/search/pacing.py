"""Decides how many requests a service gets at once, when to back off, and when it counts as down. No clock, no task.

The caller passes the time and what it observed; :class:`Pacer` decides. Per service:

- AIMD of the concurrency limit with slow start, as in TCP (RFC 5681), only while a full batch waits: batches grow first.
- After a 429 nothing is sent for ``Retry-After`` (bounded), or for an exponentially growing pause.
- After consecutive faults the service counts as down, and single probes go out at growing intervals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from searchr1_async.boundary.settings import Count, Seconds, check_settings
from searchr1_async.search.faults import PassingFault, TooManyRequests

SLOW_TO_FAIL = 10.0
"""Seconds without a success after which two consecutive faults suffice: a hanging service fails rarely."""


@dataclass(frozen=True, slots=True)
class PacingSettings:
    """Pacing and retries of requests to one service. Raises ConfigurationError if a setting is out of range."""

    request_timeout: Seconds = 30.0
    """Seconds per request; slower ones are retried."""
    retry_budget: Seconds = 120.0
    """Seconds for which a batch is retried, outages excluded; then its searches fail."""
    first_pause: Seconds = 0.25
    """Mean seconds of the first backoff. Doubles with each further fault, with full jitter."""
    longest_pause: Seconds = 20.0
    """Maximum backoff in seconds, unless the service asks for more."""
    max_outage: Seconds = 300.0
    """Seconds for which searches wait for a service that is down; then the run stops at its last checkpoint."""
    faults_until_down: Count = 5
    """Consecutive faults after which a service counts as down. At a 10 % random fault rate, five are 1 in 100,000."""
    first_limit: Count = 4
    """Initial concurrency. Lower makes single searches queue; higher keeps batches small."""
    longest_wait: Seconds = 300.0
    """Longest ``Retry-After`` in seconds that is waited for; beyond it searches fail at once."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(eq=False, frozen=True, slots=True)
class Flight:
    """One request in flight."""

    began: float
    items: int = 1
    is_probe: bool = False
    """Tests whether a service that was down is back."""


class Pacer:
    """The state of one service.

    Every request starts with :meth:`begin` and ends with exactly one of :meth:`succeeded`, :meth:`failed` and :meth:`abandoned`.
    Times are seconds of one monotonic clock.

    Attributes:
        in_flight: requests in flight.
        items_in_flight: items of all requests in flight.
        up_since: when the last outage ended; -inf before the first.
    """

    def __init__(self, settings: PacingSettings) -> None:
        self._settings = settings
        self._limit = float(settings.first_limit)
        self._threshold = math.inf
        self.in_flight = 0
        self.items_in_flight = 0
        self._last_decrease = -math.inf
        self._resume_at = -math.inf
        self._push_backs = 0
        self._faults = 0
        self._faults_since = 0.0
        self._heard_at = -math.inf
        self._down_since: float | None = None
        self.up_since = -math.inf
        self._probing = False
        self._probe_at = -math.inf
        self._probe_pause = settings.first_pause

    @property
    def limit(self) -> int:
        """Current concurrency limit."""
        return max(1, int(self._limit))

    def may_send(self, now: float, most: int) -> bool:
        """Whether a request may be sent now, with at most ``most`` in flight."""
        if now < self._resume_at:
            return False
        if self._down_since is not None:
            return not self._probing and now >= self._probe_at
        return self.in_flight < min(self.limit, max(1, most))

    def opens_at(self, now: float) -> float | None:
        """When the service may be called again; None if only the end of another request makes room."""
        times = [self._resume_at]
        if self._down_since is not None and not self._probing:
            times.append(self._probe_at)
        later = max(times)
        return later if later > now else None

    @property
    def is_failing(self) -> bool:
        """At least two faults in a row: possibly down."""
        return self._faults >= 2

    def down_for(self, now: float) -> float:
        """Seconds since the first fault of the outage; 0 while the service is up."""
        return 0.0 if self._down_since is None else max(0.0, now - self._down_since)

    def begin(self, now: float, items: int = 1) -> Flight:
        """A request of ``items`` items is sent."""
        self.in_flight += 1
        self.items_in_flight += items
        is_probe = self._down_since is not None
        self._probing = self._probing or is_probe
        return Flight(now, items, is_probe)

    def succeeded(self, flight: Flight, now: float, *, most: int, is_short: bool) -> None:
        """The service answered, possibly with a permanent refusal.

        ``most`` bounds the limit; ``is_short`` means that a full batch waits, so a higher limit would help.
        """
        self._end(flight)
        self._is_up(now)
        self._push_backs = 0
        if is_short:
            self._limit += 1.0 if self._limit < self._threshold else 1.0 / self._limit
        self._limit = min(self._limit, float(max(1, most)))

    def failed(self, flight: Flight, now: float, fault: PassingFault) -> None:
        """A rate limit, or a transient fault."""
        self._end(flight)
        if isinstance(fault, TooManyRequests):
            self._push_back(flight, now, fault.retry_after)
            return
        if not self._faults:
            self._faults_since = max(flight.began, self._heard_at)
        self._faults += 1
        is_slow = self._faults >= 2 and now - self._faults_since >= SLOW_TO_FAIL
        if self._down_since is None and (self._faults >= self._settings.faults_until_down or is_slow):
            self._down_since = self._faults_since
            self._probe_pause = self._settings.first_pause
            self._probe_at = now + self._probe_pause
        elif flight.is_probe and self._down_since is not None:
            self._probe_pause = min(2 * self._probe_pause, self._settings.longest_pause)
            self._probe_at = now + self._probe_pause

    def _push_back(self, flight: Flight, now: float, retry_after: float | None) -> None:
        self._is_up(now)
        # Requests in flight together hit the same rate limit: count it once.
        if flight.began >= self._last_decrease:
            self._limit = self._threshold = max(1.0, self._limit / 2)
            self._last_decrease = now
            self._push_backs += 1
        settings, pause = self._settings, 0.0
        # A Retry-After of 0 is honoured once; repeated ones get a backoff.
        if retry_after is None or self._push_backs > 1:
            doublings = min(max(self._push_backs, 1) - 1, 30)
            pause = min(settings.first_pause * 2.0**doublings, settings.longest_pause)
        asked = min(retry_after or 0.0, settings.longest_wait)
        self._resume_at = max(self._resume_at, now + max(asked, pause))

    def abandoned(self, flight: Flight) -> None:
        """Nobody waits for the answer any more."""
        self._end(flight)

    def _end(self, flight: Flight) -> None:
        self.in_flight -= 1
        self.items_in_flight -= flight.items
        if flight.is_probe:
            self._probing = False

    def _is_up(self, now: float) -> None:
        self._faults, self._heard_at = 0, now
        if self._down_since is not None:
            self._down_since, self.up_since = None, now
            # The limit from before the outage may be too high now.
            self._limit = min(self._limit, float(self._settings.first_limit))
