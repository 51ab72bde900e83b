"""Decides whether a group's first turns are one shared request or one request each. Pure: based on measurements passed in.

A request for G samples costs the client about as much CPU as a request for one, but each member then waits for the slowest
of G. A separate request gains each member

    gain = share of first turns followed by a second * (E[slowest of G] - E[one])

(a group of single-turn episodes always waits for its slowest). E[slowest of G] follows from the latencies x_1 <= ... <= x_n of
single first turns by the distribution of a maximum: sum of x_i * ((i/n)^G - ((i-1)/n)^G).

The cost: the SDK has one thread, handling about 300 requests per second, so everything sent behind a split group waits longer.
That delay is modelled as a bucket filled by each request's cost and drained by one second per second; the cost is the measured
CPU per request of the process, which shares that thread's time. A group is split if all of these hold:

- the gain is at least ``least_gain`` of E[slowest of G]: the tail is long;
- the gain is at least ``margin`` times the delay that the group meets and causes in the SDK's thread, for itself and for the
  groups behind it in the same burst (estimated by the size of the last burst);
- the process uses less than ``most_cpu`` of a core and is not saturated.

It starts with sharing. Shared requests reveal only the slowest latency, so some groups are split as probes: one of four until
64 single first turns are known, then one of 32; none without spare CPU.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from searchr1_async.boundary.settings import Count, NotNegative, check_settings
from searchr1_async.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class SharingSettings:
    """Thresholds for splitting.

    Raises:
        ConfigurationError: a value is out of range.
    """

    request_seconds: NotNegative = 0.0033
    """SDK CPU seconds per request, of one sample or eight: the initial estimate and lower bound."""
    least_gain: NotNegative = 0.25
    """Fraction of E[slowest of G]. Excludes lognormal latencies with a spread under 0.25."""
    margin: NotNegative = 2.0
    """Gain over the delay in the SDK's thread. Above 1, since later turns of other groups wait there too."""
    most_cpu: NotNegative = 0.6
    """Cores."""
    enough: Count = 64
    """Single first turns needed before a decision."""
    memory: Count = 512
    """Single first turns kept."""
    first_probes: Count = 4
    """One group of this many is a probe until ``enough`` first turns are known."""
    later_probes: Count = 32
    """One group of this many is a probe afterwards."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.memory < self.enough:
            raise ConfigurationError(f"memory is {self.memory}: it must be at least enough ({self.enough})")


@dataclass(slots=True)
class Backlog:
    """Estimated seconds of work queued in the SDK's single thread."""

    seconds_then: float = 0.0
    then: float = 0.0

    def at(self, now: float) -> float:
        """Seconds that a request sent now waits."""
        return max(0.0, self.seconds_then - (now - self.then))

    def add(self, now: float, seconds: float) -> None:
        """Adds a request that occupies the thread for this long."""
        self.seconds_then, self.then = self.at(now) + seconds, now


@dataclass(slots=True)
class Sharing:
    """Decides per group. Times are seconds on one monotonic clock."""

    settings: SharingSettings = field(default_factory=SharingSettings)
    backlog: Backlog = field(default_factory=Backlog)
    asked: int = 0
    """Groups decided."""
    split: int = 0
    """Groups split."""
    first_turns: float = 0.0
    """Finished first turns, exponentially decayed."""
    second_turns: float = 0.0
    """Started second turns, decayed alike."""
    _cpu: float = 0.0
    _cpu_seconds: float = 0.0
    _requests: float = 0.0
    _new_requests: int = 0
    _probed: int = 0
    _asked_at: float = 0.0
    _burst: int = 0
    _last_burst: int = 0
    _is_saturated: bool = False
    _singles: deque[float] = field(default_factory=deque)
    _sorted: list[float] | None = None

    def began(self, now: float, *, samples: int, turn: int) -> float:
        """Records a sent request; returns its delay in the SDK's thread, to pass to :meth:`finished`."""
        delay = self.backlog.at(now)
        self.backlog.add(now, self.request_seconds)
        self._new_requests += 1
        if turn == 1:
            self.second_turns += samples
        return delay

    def finished(self, seconds: float, *, samples: int, turn: int, delay: float = 0.0) -> None:
        """Records an answer after ``seconds``, ``delay`` of them in the SDK's thread."""
        if turn:
            return
        self.first_turns += samples
        if self.first_turns > 2 * FORGETTING:
            self.first_turns /= 2
            self.second_turns /= 2
        if samples == 1:
            # Without the client's own delays, which would look like a tail and cause more requests.
            self._singles.append(max(seconds - delay, 0.0))
            if len(self._singles) > self.settings.memory:
                self._singles.popleft()
            self._sorted = None

    def client_is(self, *, seconds: float, cpu: float, is_saturated: bool) -> None:
        """Records the load of this process over the last ``seconds``: cores used, and whether it is saturated."""
        self._cpu, self._is_saturated = cpu, is_saturated
        if self._new_requests:  # without requests, the CPU went elsewhere
            self._cpu_seconds = 0.9 * self._cpu_seconds + cpu * seconds
            self._requests = 0.9 * self._requests + self._new_requests
            self._new_requests = 0

    @property
    def request_seconds(self) -> float:
        """Recent CPU seconds per request, clamped to 1 to 10 times the SDK's own."""
        least = self.settings.request_seconds
        if self._requests < MEASURED_REQUESTS:
            return least
        return min(max(self._cpu_seconds / self._requests, least), 10 * least)

    @property
    def continuing(self) -> float:
        """Share of first turns followed by a second; 1 if unknown."""
        return min(1.0, self.second_turns / self.first_turns) if self.first_turns else 1.0

    def slowest(self, members: int) -> float | None:
        """E[slowest of ``members`` first turns] in seconds; None until enough were seen."""
        times = self._times()
        if times is None:
            return None
        count = len(times)
        return sum(
            seconds * (((rank + 1) / count) ** members - (rank / count) ** members)
            for rank, seconds in enumerate(times)
        )

    def gain(self, members: int) -> float | None:
        """Seconds a member gains from a separate request, ignoring delays; None until enough were seen."""
        times, slowest = self._times(), self.slowest(members)
        if times is None or slowest is None:
            return None
        return self.continuing * (slowest - sum(times) / len(times))

    def is_worth_it(self, now: float, members: int) -> bool:
        """Whether one shared request for the first turns is cheaper than one per member."""
        self.asked += 1
        if now - self._asked_at > BURST_GAP:
            self._last_burst, self._burst = self._burst, 0
        self._burst, self._asked_at = self._burst + 1, now
        is_shared = members == 1 or not (self._has_cpu_to_spare and self._is_split(now, members))
        self.split += not is_shared
        return is_shared

    @property
    def _has_cpu_to_spare(self) -> bool:
        return not self._is_saturated and self._cpu < self.settings.most_cpu

    def _is_split(self, now: float, members: int) -> bool:
        settings = self.settings
        behind = max(0, self._last_burst - self._burst)
        delay = self.backlog.at(now) + (members + (members - 1) * behind) * self.request_seconds
        gain, slowest = self.gain(members), self.slowest(members)
        if gain is None or slowest is None:
            # Without second turns there is nothing to gain, whatever the tail.
            is_pointless = self.first_turns >= settings.enough and not self.second_turns
            # Probes in flight count too, so that a burst is not split more than needed.
            every = settings.first_probes if self._probed < settings.enough else settings.later_probes
            is_probe = not is_pointless and self.asked % every == 0
            self._probed += members * is_probe
            return is_probe
        if gain >= settings.least_gain * slowest and gain >= settings.margin * delay:
            return True
        return self.second_turns > 0 and self.asked % settings.later_probes == 0

    def _times(self) -> list[float] | None:
        if len(self._singles) < self.settings.enough:
            return None
        if self._sorted is None:
            self._sorted = sorted(self._singles)
        return self._sorted


BURST_GAP = 0.5
"""Seconds without a new group that end a burst, such as the start of a batch."""
MEASURED_REQUESTS = 100
"""Requests from which on their CPU cost counts as measured."""
FORGETTING = 4096
"""Half-life, in first turns, of the share that continues: it changes while a model learns to search."""
