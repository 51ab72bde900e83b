"""How many samples may be in flight from this process, and why not more: no clock, no task, no client.

The caller passes the time and what it observed; :class:`SampleLimit` decides. What holds the number down is told apart,
since each asks for something else:

- *The service pushes back*: fewer at once, by a factor (as TCP does: RFC 5681; the factor is that of CUBIC, RFC 9438), at most
  once a round trip; more again only when it has been quiet for as long as the SDK itself is throttled after it.
- *The service queues*: samples take longer in proportion to how many are in flight, so more at once gives no more samples a
  second (Little's law: samples a second = in flight / seconds a sample). Then there is no growth.
- *The client is saturated*: this process's CPU, or its event loop. More in flight would only wait here. No growth; more
  processes would help.
- *The work is done*: fewer are wanted than allowed. No growth, since a limit that is not used is not tested.

A service that is slow by nature, whatever the load, holds nothing down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum

from searchr1_async.boundary.open_files import OpenFiles
from searchr1_async.boundary.settings import Count, check_settings


class Cause(StrEnum):
    """Why no more samples are in flight."""

    GROWING = "growing"
    """More are wanted; the limit grows."""
    WORK = "work"
    """No more are wanted."""
    SETTINGS = "settings"
    """The settings allow no more."""
    SERVICE = "service"
    """The service pushed back a short time ago."""
    QUEUE = "queue"
    """The service queues: more in flight gives no more samples a second."""
    CLIENT = "client"
    """This process is saturated."""


@dataclass(frozen=True, slots=True)
class LimitSettings:
    """The bounds of the limit.

    Raises:
        ConfigurationError: a bound below 1, or the least over the most.
    """

    first: Count = 2048
    """Samples in flight to begin with: half of what the ancestor's recipe sends at once (512 groups of 8), and twice a batch of
    128 groups of 8. It doubles with each round trip while more are wanted."""
    least: Count = 8
    """A group's first turns."""
    most: Count = 4096
    """``SamplingSettings.max_episodes_in_flight``, or this process's share of it: an episode samples one turn at a time."""
    most_requests: Count = 1900
    """Requests in flight. From 2,000 on a sampling client the SDK queues them itself, first come first served; what is left is
    for evaluation and for log-probabilities, which use the same client."""

    def __post_init__(self) -> None:
        check_settings(self)

    def within(self, files: OpenFiles) -> LimitSettings:
        """These bounds, as far as this process may open connections: each request holds one, on which it waits."""
        requests = files.requests
        return self if requests is None else replace(self, most_requests=min(self.most_requests, requests))


@dataclass(eq=False, frozen=True, slots=True)
class Flight:
    """One request on its way."""

    began: float
    samples: int
    in_flight: int
    """Samples in flight when it began, its own included."""


BACK_OFF = 0.7
"""The factor by which a push-back lowers the limit: that of CUBIC. The SDK throttles itself besides, so half is not needed."""
QUIET_SECONDS = 10.0
"""For so long after a push-back the SDK sends only 10 requests at a time: whether the service takes more cannot be seen before."""
CAREFUL_GROWTH = 1 / 16
"""Of the limit, each round trip, once the service has pushed back; before, it doubles."""
SATURATED_CPU = 0.85
"""Of one core. The SDK's thread and the event loop share one interpreter lock: at 260-380 samples/s the process used 0.9 to 1.0
of a core and more in flight only waited (2,000 in flight: 6.8 s for a sample of 1 s)."""
SATURATED_LAG = 0.02
"""Seconds of median lag. The median, since one long piece of work is no saturation; an idle loop's is under 1 ms."""
RELIEF = 0.85
"""Of either threshold: below both the process counts as no longer saturated."""
QUEUE_ELASTICITY = 0.7
"""d log(seconds a sample) / d log(in flight) from which on the service counts as queueing: twice as many in flight then give at
most 23 % more samples a second. A pure queue has 1, a service with room 0."""


class SampleLimit:
    """How many samples may be in flight.

    Args:
        settings: its bounds.

    Every request is begun by :meth:`begin` and ended by exactly one of :meth:`finished`, :meth:`failed` and :meth:`abandoned`.
    Times are seconds of one monotonic clock.
    """

    def __init__(self, settings: LimitSettings | None = None) -> None:
        self.settings = settings or LimitSettings()
        self._most = float(self.settings.most)
        self._least = min(float(self.settings.least), self._most)
        self._limit = min(max(float(self.settings.first), self._least), self._most)
        self._in_flight = 0
        self._requests = 0
        self._round_trip: float | None = None
        self._pushed_back_at = -math.inf
        self._lowered_at = -math.inf
        self._has_pushed_back = False
        self._saturated_since: float | None = None
        self._relieved_at = -math.inf
        self._single, self._shared = LoadCurve(), LoadCurve()

    @property
    def limit(self) -> int:
        """Samples at once, now."""
        return int(self._limit)

    @property
    def in_flight(self) -> int:
        """Samples on their way."""
        return self._in_flight

    @property
    def requests(self) -> int:
        """Requests on their way."""
        return self._requests

    @property
    def round_trip(self) -> float | None:
        """Seconds a request, the last ones weighing most; None before the first answer."""
        return self._round_trip

    @property
    def is_saturated(self) -> bool:
        """This process can do no more."""
        return self._saturated_since is not None

    @property
    def is_queueing(self) -> bool:
        """More in flight gives no more samples a second."""
        return self._single.is_steep or self._shared.is_steep

    def saturated_for(self, now: float) -> float:
        """Seconds for which this process has been saturated without a break; 0 while it is not. More processes help where
        this lasts."""
        return 0.0 if self._saturated_since is None else now - self._saturated_since

    def may_begin(self, samples: int) -> bool:
        """Whether a request for so many samples may go now. One larger than the limit goes when nothing else is in flight."""
        if not self._in_flight:
            return True
        return self._in_flight + samples <= int(self._limit) and self._requests < self.settings.most_requests

    def cause(self, now: float, wanted: int) -> Cause:
        """Why no more are in flight.

        Args:
            wanted: samples that wait for room.
        """
        if now - self._pushed_back_at < QUIET_SECONDS:
            return Cause.SERVICE
        if self.is_saturated:
            return Cause.CLIENT
        if not wanted:
            return Cause.WORK
        if self._limit >= self._most or self._requests >= self.settings.most_requests:
            return Cause.SETTINGS
        return Cause.QUEUE if self.is_queueing else Cause.GROWING

    def begin(self, now: float, samples: int = 1) -> Flight:
        """A request goes out."""
        self._in_flight += samples
        self._requests += 1
        return Flight(now, samples, self._in_flight)

    def finished(self, flight: Flight, now: float, *, is_short: bool) -> None:
        """An answer came.

        Args:
            is_short: others wait for room, so a higher limit would be used.
        """
        self._end(flight)
        seconds = max(now - flight.began, 1e-6)
        self._round_trip = seconds if self._round_trip is None else self._round_trip + (seconds - self._round_trip) / 64
        # What waited in this process, or in the SDK after a push-back, says nothing of how the service takes load.
        was_held_here = self.is_saturated or self._relieved_at > flight.began
        if not was_held_here and self._pushed_back_at + QUIET_SECONDS < flight.began:
            curve = self._single if flight.samples == 1 else self._shared
            curve.add(flight.in_flight, seconds)
        if is_short and self._may_grow(now):
            # Each answer adds its own samples, so a round trip's answers double the limit.
            self._limit += flight.samples * (CAREFUL_GROWTH if self._has_pushed_back else 1.0)
            self._limit = min(self._limit, self._most)

    def failed(self, flight: Flight) -> None:
        """The service failed it for good; that says nothing of how many it takes."""
        self._end(flight)

    def abandoned(self, flight: Flight) -> None:
        """Nobody waits for the answer any more."""
        self._end(flight)

    def pushed_back(self, now: float) -> None:
        """The service said "fewer" to some request of this process; at most one step down a round trip."""
        self._pushed_back_at = now
        self._has_pushed_back = True
        # Above the limit, what was sent before it was lowered still drains: the limit itself has not been tested.
        if self._in_flight > self._limit or now - self._lowered_at < max(1.0, self._round_trip or 0.0):
            return
        self._limit = max(self._least, BACK_OFF * min(self._limit, self._in_flight))
        self._lowered_at = now

    def client_is(self, now: float, *, cpu: float, lag: float) -> None:
        """How this process is doing.

        Args:
            cpu: seconds of CPU a second, all threads.
            lag: the event loop's median lag, in seconds.
        """
        if cpu >= SATURATED_CPU or lag >= SATURATED_LAG:
            if self._saturated_since is None:
                self._saturated_since = now
        elif self.is_saturated and cpu < RELIEF * SATURATED_CPU and lag < RELIEF * SATURATED_LAG:
            self._saturated_since = None
            self._relieved_at = now

    def _may_grow(self, now: float) -> bool:
        return not self.is_saturated and not self.is_queueing and now - self._pushed_back_at >= QUIET_SECONDS

    def _end(self, flight: Flight) -> None:
        self._in_flight -= flight.samples
        self._requests -= 1


@dataclass(slots=True)
class _Load:
    """What was seen at one load: averages of logarithms, in which a long tail weighs little."""

    count: int = 0
    log_in_flight: float = 0.0
    log_seconds: float = 0.0
    seen: int = 0
    """The number of the observation that came last."""


@dataclass(slots=True)
class LoadCurve:
    """How long requests take, by how many samples were in flight when they began.

    Loads are kept by powers of two. A burst sends requests at every load from 1 on within a moment, so the curve is known
    after a round trip, without trying more. With a spread of e in seconds a sample, 64 requests tell a mean to 13 %; the slope between
    a load and the one half as high is then off by less than 0.3 in two of three cases.
    """

    loads: dict[int, _Load] = field(default_factory=dict)
    top: int = 0
    """The power of two at which requests last began in number."""
    seen: int = 0

    ENOUGH = 64
    """Requests at a load before it counts; also the memory of its averages, in requests."""
    STALE = 20_000
    """Requests after which an average that got no new one is forgotten: the service may have changed."""

    def add(self, in_flight: int, seconds: float) -> None:
        """One request that took so long, begun with so many samples in flight."""
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
        """d log(seconds) / d log(in flight) at the highest load, from it and the next lower one; None where too few were seen."""
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
