"""How many requests a service is given at once, when it is left alone, and when it counts as down: no clock, no task.

The caller passes the time and what it observed; :class:`Pacer` decides. Three mechanisms, each of one service:

- *Additive increase, multiplicative decrease* of the requests at once, with slow start, as in TCP (RFC 5681). The limit
  grows only where more requests would help: while a whole batch is waiting. So under load batches grow first.
- *Pauses*: after "too many requests" nothing is sent until ``Retry-After`` has passed (within a bound), or a pause that doubles.
- A *circuit breaker*: after faults in a row with no success between them the service counts as down; one probe at a time
  goes out, in growing intervals, until one is answered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from searchr1_async.boundary.settings import Count, Range, Seconds, check_settings


@dataclass(frozen=True, slots=True)
class PacingSettings:
    """How requests to one service are paced, retried and given up.

    Raises:
        ConfigurationError: a setting out of its range.
    """

    request_timeout: Seconds = 30.0
    """Seconds for one request; one that takes longer is tried again."""
    retry_budget: Seconds = 120.0
    """Seconds for which one batch is tried again, outages not counted; then its searches fail."""
    first_pause: Seconds = 0.25
    """Seconds; the mean of the first pause after a fault. It doubles with every further one, with full jitter."""
    longest_pause: Seconds = 20.0
    """Seconds; no pause is longer, unless the service itself asks for more."""
    max_outage: Seconds = 300.0
    """Seconds for which searches wait for a service that is down; then the run stops with its last checkpoint."""
    faults_until_down: Count = 5
    """Faults in a row after which a service counts as down. Of requests that fail at random one time in ten, five in a
    row are one in 100,000; and a false alarm costs one probe."""
    first_limit: Count = 4
    """Requests at once to begin with. With fewer, a lone search waits behind another; with more, batches stay small."""
    hedged_fraction: Annotated[float, Range(at_least=0, at_most=0.2)] = 0.0
    """Of the requests: the slowest are sent a second time, and the first answer counts. 0.05 makes the slowest 5 % about as
    fast as the others for 5 % more requests; 0 is off, since a quota pays for them."""
    longest_wait: Seconds = 300.0
    """Seconds that a service may ask to be left alone (``Retry-After``). If it asks for more, searches fail at once: earlier
    requests would be refused again."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(eq=False, frozen=True, slots=True)
class Flight:
    """One request on its way."""

    began: float
    items: int = 1
    """That it carries."""
    is_probe: bool = False
    """It finds out whether a service that was down is back."""


SLOW_TO_FAIL = 10.0
"""Seconds without a success after which two faults in a row are enough: a service that hangs fails seldom."""


class Pacer:
    """The state of one service, as seen from here.

    Args:
        settings: see :class:`PacingSettings`.

    Every request is begun by :meth:`begin` and ended by exactly one of :meth:`succeeded`, :meth:`pushed_back`,
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
        """Requests at once, now."""
        return max(1, int(self._limit))

    @property
    def in_flight(self) -> int:
        """Requests that are on their way."""
        return self._in_flight

    @property
    def items_in_flight(self) -> int:
        """In all requests that are on their way."""
        return self._items_in_flight

    @property
    def up_since(self) -> float:
        """When the last outage ended; minus infinity before the first."""
        return self._up_since

    def may_send(self, now: float, most: int) -> bool:
        """Whether a request may go now, of at most ``most`` at once."""
        if now < self._resume_at:
            return False
        if self._down_since is not None:
            return not self._probing and now >= self._probe_at
        return self._in_flight < min(self.limit, max(1, most))

    def opens_at(self, now: float) -> float | None:
        """When the service may be asked again; None where only another request's end can make room."""
        times = [self._resume_at]
        if self._down_since is not None and not self._probing:
            times.append(self._probe_at)
        later = max(times)
        return later if later > now else None

    @property
    def is_failing(self) -> bool:
        """Nothing was answered since at least two faults: it may be down, though that is not certain yet."""
        return self._faults >= 2

    def down_for(self, now: float) -> float:
        """Seconds since the first fault of an outage; 0 while the service is up."""
        return 0.0 if self._down_since is None else max(0.0, now - self._down_since)

    def begin(self, now: float, items: int = 1) -> Flight:
        """A request goes out, with so many items."""
        self._in_flight += 1
        self._items_in_flight += items
        is_probe = self._down_since is not None
        self._probing = self._probing or is_probe
        return Flight(now, items, is_probe)

    def succeeded(self, flight: Flight, now: float, *, most: int, is_short: bool) -> None:
        """An answer came, be it that the request itself is refused for good.

        Args:
            most: the limit never grows over it.
            is_short: a whole batch waits for room, so that one more request at once would help.
        """
        self._end(flight)
        self._is_up(now)
        self._push_backs = 0
        if is_short:
            self._limit += 1.0 if self._limit < self._threshold else 1.0 / self._limit
        self._limit = min(self._limit, float(max(1, most)))

    def pushed_back(self, flight: Flight, now: float, retry_after: float | None) -> None:
        """The service is up, and says "slower"."""
        self._end(flight)
        self._is_up(now)
        # Requests that were on their way together are told so together: that is one sign, not many.
        if flight.began >= self._last_decrease:
            self._limit = max(1.0, self._limit / 2)
            self._threshold = self._limit
            self._last_decrease = now
            self._push_backs += 1
        # "At once" is obeyed the first time; a service that says so again and again is not to be hammered.
        pause = self._pause(self._push_backs) if retry_after is None or self._push_backs > 1 else 0.0
        asked = min(retry_after or 0.0, self._settings.longest_wait)
        self._resume_at = max(self._resume_at, now + max(asked, pause))

    def failed(self, flight: Flight, now: float) -> None:
        """A passing fault."""
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
            # What it bore before it fell says little about what it bears now.
            self._limit = min(self._limit, float(self._settings.first_limit))

    def _pause(self, times: int) -> float:
        settings = self._settings
        return min(settings.first_pause * 2.0 ** min(max(times, 1) - 1, 30), settings.longest_pause)
