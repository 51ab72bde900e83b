"""Decides how many requests a service gets at once, when to back off, and when it counts as down. No clock, no task.

The caller passes the time and what it observed; :class:`Pacer` decides. Per service:

- *AIMD* of the concurrency limit with slow start, as in TCP (RFC 5681). The limit grows only while a full batch is
  waiting, so under load batches grow first.
- *Pauses*: after a 429 nothing is sent for ``Retry-After`` (bounded), or for an exponentially growing pause.
- *Circuit breaker*: after consecutive faults the service counts as down, and single probes go out at growing intervals.

Reports each long wait for a service once, and refuses waits that are too long. No clock: the caller passes the time.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Annotated

from searchr1_async.boundary.network import long_wait_text
from searchr1_async.boundary.settings import Count, Range, Seconds, check_settings
from searchr1_async.boundary.waits import REPORT_AFTER, Notify, notify_of_wait
from searchr1_async.errors import SearchUnavailableError
from searchr1_async.search.faults import PassingFault, TooManyRequests


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
    hedged_fraction: Annotated[float, Range(at_least=0, at_most=0.2)] = 0.0
    """Share of requests, the slowest, that are sent twice: 0.05 cuts the tail for 5 % more requests. Costs quota; 0 is off."""
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


SLOW_TO_FAIL = 10.0
"""Seconds without a success after which two consecutive faults suffice: a hanging service fails rarely."""


class Pacer:
    """The state of one service.

    Every request starts with :meth:`begin` and ends with exactly one of :meth:`succeeded`, :meth:`pushed_back`,
    :meth:`failed` and :meth:`abandoned`. Times are seconds of one monotonic clock.
    """

    def __init__(self, settings: PacingSettings) -> None:
        self._settings = settings
        self._limit = float(settings.first_limit)
        self._threshold = math.inf
        self._in_flight = 0
        self._items_in_flight = 0
        self._last_decrease = -math.inf
        self._resume_at = -math.inf
        self._push_backs = 0
        self._faults = 0
        self._faults_since = 0.0
        self._heard_at = -math.inf
        self._down_since: float | None = None
        self._up_since = -math.inf
        self._probing = False
        self._probe_at = -math.inf
        self._probe_pause = settings.first_pause

    @property
    def limit(self) -> int:
        """Current concurrency limit."""
        return max(1, int(self._limit))

    @property
    def in_flight(self) -> int:
        """Requests in flight."""
        return self._in_flight

    @property
    def items_in_flight(self) -> int:
        """Items of all requests in flight."""
        return self._items_in_flight

    @property
    def up_since(self) -> float:
        """When the last outage ended; -inf before the first."""
        return self._up_since

    def may_send(self, now: float, most: int) -> bool:
        """Whether a request may be sent now, with at most ``most`` in flight."""
        if now < self._resume_at:
            return False
        if self._down_since is not None:
            return not self._probing and now >= self._probe_at
        return self._in_flight < min(self.limit, max(1, most))

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
        self._in_flight += 1
        self._items_in_flight += items
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

    def pushed_back(self, flight: Flight, now: float, retry_after: float | None) -> None:
        """The service answered with a rate limit."""
        self._end(flight)
        self._is_up(now)
        # Requests in flight together hit the same rate limit: count it once.
        if flight.began >= self._last_decrease:
            self._limit = max(1.0, self._limit / 2)
            self._threshold = self._limit
            self._last_decrease = now
            self._push_backs += 1
        # A Retry-After of 0 is honoured once; repeated ones get a backoff.
        pause = self._pause(self._push_backs) if retry_after is None or self._push_backs > 1 else 0.0
        asked = min(retry_after or 0.0, self._settings.longest_wait)
        self._resume_at = max(self._resume_at, now + max(asked, pause))

    def failed(self, flight: Flight, now: float) -> None:
        """A transient fault."""
        self._end(flight)
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

    def abandoned(self, flight: Flight) -> None:
        """Nobody waits for the answer any more."""
        self._end(flight)

    def _end(self, flight: Flight) -> None:
        self._in_flight -= 1
        self._items_in_flight -= flight.items
        if flight.is_probe:
            self._probing = False

    def _is_up(self, now: float) -> None:
        self._faults, self._heard_at = 0, now
        if self._down_since is not None:
            self._down_since, self._up_since = None, now
            # The limit from before the outage may be too high now.
            self._limit = min(self._limit, float(self._settings.first_limit))

    def _pause(self, times: int) -> float:
        settings = self._settings
        return min(settings.first_pause * 2.0 ** min(max(times, 1) - 1, 30), settings.longest_pause)


logger = logging.getLogger(__name__)


class Telling:
    """Reports the waits for one service.

    ``tell`` receives every wait over :data:`~searchr1_async.boundary.waits.REPORT_AFTER` seconds once, with its reason and end.
    None for searches of a run, whose view shows outages: then only rate limits are logged.
    """

    def __init__(self, name: str, settings: PacingSettings, pacer: Pacer) -> None:
        self.tell: Notify | None = None
        self._name = name
        self._settings = settings
        self._pacer = pacer
        self._reported_until = -math.inf
        self._outage_reported = False

    def refuse_long(self, fault: PassingFault) -> None:
        """Raises SearchUnavailableError if ``Retry-After`` exceeds ``PacingSettings.longest_wait``."""
        asked, longest = fault.retry_after, self._settings.longest_wait
        if asked is not None and asked > longest:
            words = long_wait_text(self._name, asked, longest, "PacingSettings.longest_wait")
            raise SearchUnavailableError(f"{words} ({fault})") from fault

    def failed(self, fault: PassingFault, now: float) -> None:
        """A request failed; call after updating the pacer."""
        down = self._pacer.down_for(now)
        if isinstance(fault, TooManyRequests):
            self._asked(fault, now, (self._pacer.opens_at(now) or now) - now)
        elif down > REPORT_AFTER and not self._outage_reported and self.tell is not None:
            self._outage_reported = True
            left = max(self._settings.max_outage - down, 2 * REPORT_AFTER)
            notify_of_wait(left, f"{self._name} does not answer ({fault})", self.tell)
        elif not down:
            self._asked(fault, now, fault.retry_after or 0.0)

    def answered(self) -> None:
        """A request was answered; call after updating the pacer."""
        if self._outage_reported and self.tell is not None:
            self._outage_reported = False
            self.tell(f"{self._name} answers again")

    def hangs(self, text: str, until: float) -> None:
        """A request has been pending for long, until it times out at ``until``. Reports only the first of several."""
        if self.tell is not None and self._is_new(until):
            self.tell(text)

    def _asked(self, fault: PassingFault, now: float, seconds: float) -> None:
        if seconds > REPORT_AFTER and self._is_new(now + seconds):
            notify_of_wait(seconds, f"{self._name} asks to back off ({fault})", self.tell or logger.warning)

    def _is_new(self, until: float) -> bool:
        """Whether a wait until then was not reported yet; requests that fail together have about the same end."""
        if until <= self._reported_until + REPORT_AFTER:
            return False
        self._reported_until = until
        return True
