"""Adaptive limit on samples in flight. Pure: the caller passes times and observations to :class:`SampleLimit`.

It falls when the service pushes back (multiplicative decrease, as in TCP: RFC 5681, with CUBIC's factor, RFC 9438), and does not grow
while the service queues, this process is saturated, or fewer samples are wanted. High latency that does not depend on the load does
not hold it down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum

from searchr1_async.boundary.paths import OpenFiles
from searchr1_async.boundary.settings import Count, check_settings


class Cause(StrEnum):
    """Why no more samples are in flight."""

    GROWING = "growing"
    """More are wanted; the limit is growing."""
    WORK = "work"
    """No more are wanted."""
    SETTINGS = "settings"
    """The settings' maximum is reached."""
    SERVICE = "service"
    """The service pushed back recently."""
    QUEUE = "queue"
    """The service queues: more in flight gives no more samples per second."""
    CLIENT = "client"
    """This process is saturated."""


@dataclass(frozen=True, slots=True)
class LimitSettings:
    """Bounds of the limit."""

    first: Count = 2048
    """Initial samples in flight: two batches of 128 groups of 8. Doubles each round trip while more are wanted."""
    least: Count = 8
    """The first turns of one group."""
    most: Count = 4096
    """This process's share of ``SamplingSettings.max_episodes_in_flight``: an episode samples one turn at a time."""
    most_requests: Count = 1900
    """Requests in flight. The SDK queues requests first come, first served from 2,000 per client; the rest is for evaluation and
    log-probabilities on the same client."""

    def __post_init__(self) -> None:
        check_settings(self)

    def within(self, files: OpenFiles) -> LimitSettings:
        """Lowers ``most_requests`` to the open-file limit: each request holds a connection."""
        requests = files.requests
        return self if requests is None else replace(self, most_requests=min(self.most_requests, requests))


@dataclass(eq=False, frozen=True, slots=True)
class Flight:
    """One request in flight."""

    began: float
    samples: int
    in_flight: int
    """Samples in flight when it began, including its own."""


BACK_OFF = 0.7
"""Factor by which back-pressure lowers the limit (CUBIC). Not 0.5, since the SDK also throttles itself."""
QUIET_SECONDS = 10.0
"""Seconds after back-pressure in which the SDK sends only 10 requests at a time, so capacity cannot be observed."""
CAREFUL_GROWTH = 1 / 16
"""Growth per round trip, relative to the limit, after any back-pressure; before, the limit doubles."""
SATURATED_CPU = 0.85
"""Cores. The SDK's thread and the event loop share the GIL: at 0.9 to 1.0 cores, more in flight only waits."""
SATURATED_LAG = 0.02
"""Median event loop lag in seconds. The median, since one long task is no saturation; an idle loop has under 1 ms."""
RELIEF = 0.85
"""Fraction of both thresholds below which the process is no longer saturated."""
QUEUE_ELASTICITY = 0.7
"""d log(latency) / d log(in flight) from which the service counts as queueing: doubling the load then gives at most 23 % more
samples per second. A pure queue has 1, a service with spare capacity 0."""


class SampleLimit:
    """Adaptive limit on samples in flight.

    Every request is opened by :meth:`begin` and closed by either :meth:`finished` or :meth:`ended`. Times are seconds on one monotonic clock.
    """

    def __init__(self, settings: LimitSettings | None = None) -> None:
        self.settings = settings or LimitSettings()
        self._most = float(self.settings.most)
        self._least = min(float(self.settings.least), self._most)
        self._limit = min(max(float(self.settings.first), self._least), self._most)
        self.in_flight = self.requests = 0
        """Samples and requests in flight."""
        self._round_trip: float | None = None
        self._pushed_back_at = self._lowered_at = self._relieved_at = -math.inf
        self.is_saturated = False
        """This process is at capacity."""
        self._single, self._shared = LoadCurve(), LoadCurve()

    @property
    def limit(self) -> int:
        """Current maximum of samples in flight."""
        return int(self._limit)

    @property
    def is_queueing(self) -> bool:
        """More in flight gives no more samples per second."""
        return self._single.is_steep or self._shared.is_steep

    def may_begin(self, samples: int) -> bool:
        """Whether a request may be sent now. One larger than the limit is sent when nothing else is in flight."""
        if not self.in_flight:
            return True
        return self.in_flight + samples <= int(self._limit) and self.requests < self.settings.most_requests

    def cause(self, now: float, wanted: int) -> Cause:
        """Why no more are in flight; ``wanted`` is the number of waiting samples."""
        if now - self._pushed_back_at < QUIET_SECONDS:
            return Cause.SERVICE
        if self.is_saturated:
            return Cause.CLIENT
        if not wanted:
            return Cause.WORK
        if self._limit >= self._most or self.requests >= self.settings.most_requests:
            return Cause.SETTINGS
        return Cause.QUEUE if self.is_queueing else Cause.GROWING

    def begin(self, now: float, samples: int = 1) -> Flight:
        """Records a sent request."""
        self.in_flight += samples
        self.requests += 1
        return Flight(now, samples, self.in_flight)

    def finished(self, flight: Flight, now: float, *, is_short: bool) -> None:
        """Records an answer; ``is_short`` if others wait for room, so that a higher limit would be used."""
        self.ended(flight)
        seconds = max(now - flight.began, 1e-6)
        self._round_trip = seconds if self._round_trip is None else self._round_trip + (seconds - self._round_trip) / 64
        # Time spent waiting in this process or throttled in the SDK says nothing about the service.
        waited_here = self.is_saturated or self._relieved_at > flight.began
        if not waited_here and self._pushed_back_at + QUIET_SECONDS < flight.began:
            curve = self._single if flight.samples == 1 else self._shared
            curve.add(flight.in_flight, seconds)
        if is_short and self._may_grow(now):
            # Each answer adds its own samples, so one round trip doubles the limit.
            self._limit += flight.samples * (CAREFUL_GROWTH if self._pushed_back_at > -math.inf else 1.0)
            self._limit = min(self._limit, self._most)

    def ended(self, flight: Flight) -> None:
        """Records a request without an answer, which says nothing about capacity."""
        self.in_flight -= flight.samples
        self.requests -= 1

    def pushed_back(self, now: float) -> None:
        """Records back-pressure; lowers the limit at most once per round trip."""
        self._pushed_back_at = now
        # Above the limit, requests sent before the last decrease still drain: the new limit is untested.
        if self.in_flight > self._limit or now - self._lowered_at < max(1.0, self._round_trip or 0.0):
            return
        self._limit = max(self._least, BACK_OFF * min(self._limit, self.in_flight))
        self._lowered_at = now

    def client_is(self, now: float, *, cpu: float, lag: float) -> None:
        """Records the load of this process.

        Args:
            cpu: cores used, over all threads.
            lag: median event loop lag in seconds.
        """
        if cpu >= SATURATED_CPU or lag >= SATURATED_LAG:
            self.is_saturated = True
        elif self.is_saturated and cpu < RELIEF * SATURATED_CPU and lag < RELIEF * SATURATED_LAG:
            self.is_saturated = False
            self._relieved_at = now

    def _may_grow(self, now: float) -> bool:
        return not self.is_saturated and not self.is_queueing and now - self._pushed_back_at >= QUIET_SECONDS


@dataclass(slots=True)
class _Load:
    """Averages at one load, of logarithms so that a long tail weighs little."""

    count: int = 0
    log_in_flight: float = 0.0
    log_seconds: float = 0.0
    seen: int = 0
    """Number of the last observation."""


@dataclass(slots=True)
class LoadCurve:
    """Latency as a function of the samples in flight, in powers of two.

    A burst starts requests at every load from 1 up, so one round trip gives the whole curve.
    """

    loads: dict[int, _Load] = field(default_factory=dict)
    top: int = 0
    """Highest power of two with enough recent requests."""
    seen: int = 0

    ENOUGH = 64
    """Requests before a load counts, and window of its averages. 64 give the slope within 0.3 if latency varies like an
    exponential."""
    STALE = 20_000
    """Requests after which an average without new data is dropped, since the service may have changed."""

    def add(self, in_flight: int, seconds: float) -> None:
        """Adds a request's latency, with the samples in flight when it began."""
        self.seen += 1
        power = in_flight.bit_length() - 1
        load = self.loads.get(power)
        if load is None or self.seen - load.seen > self.STALE:
            load = self.loads[power] = _Load()
        load.count += 1
        load.seen = self.seen
        share = 1 / min(load.count, self.ENOUGH)
        load.log_in_flight += (math.log(in_flight) - load.log_in_flight) * share
        load.log_seconds += (math.log(seconds) - load.log_seconds) * share
        if load.count >= self.ENOUGH and (power >= self.top or self.seen - self.loads[self.top].seen > self.STALE):
            self.top = power

    @property
    def elasticity(self) -> float | None:
        """d log(latency) / d log(in flight) between the two highest known loads; None if too few requests were seen."""
        high = self.loads.get(self.top)
        if high is None or high.count < self.ENOUGH:
            return None
        for power in (self.top - 1, self.top - 2):
            low = self.loads.get(power)
            if low is not None and low.count >= self.ENOUGH and self.seen - low.seen <= self.STALE:
                return (high.log_seconds - low.log_seconds) / (high.log_in_flight - low.log_in_flight)
        return None

    @property
    def is_steep(self) -> bool:
        """The service queues at the highest load."""
        elasticity = self.elasticity
        return elasticity is not None and elasticity >= QUEUE_ELASTICITY
