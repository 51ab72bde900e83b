"""Whether a group's first turns go as one request or as one each: decided from what was measured, no clock, no task.

One request for G samples costs the client about as much as one for a single sample: 8 samples in one took 0.38 ms of CPU
each, alone 3.3 ms each. But each member then waits for the slowest of G. What a member gains of its own request is

    gain = share of first turns that a second follows * (E[slowest of G] - E[one])

(a group of single-turn episodes is done when its slowest is, however they are sent). E[slowest of G] follows from the
times x_1 <= ... <= x_n of single first turns by the distribution of a maximum: sum of x_i * ((i/n)^G - ((i-1)/n)^G).

What it costs: the SDK has one thread, which handles about 300 requests a second, so all that is sent behind a split group
waits longer. The delay there is followed as a bucket that fills by each request's cost and empties by one second a second;
the cost is the process's CPU a request as measured, since whatever else runs here takes its time from that thread.
A group is split where all of these hold:

- the gain is at least ``least_gain`` of E[slowest of G]: the tail is long;
- the gain is at least ``margin`` times the delay that the group meets in the SDK's thread and makes there: its own, and that of
  the groups of the same burst behind it, of which as many are expected as the last burst had (with 6.5 ms a request,
  splitting each of 128 groups took the mean episode from 19 s to 26 s; splitting each of 32 from 13 s to 10 s);
- the process uses less than ``most_cpu`` of a core, and is not saturated.

It begins by sharing. As a request for all tells only how long the slowest took, now and then a group is split to see: one of
four until that gives the 64 first turns that a decision needs, then one of 32; none without CPU to spare.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from searchr1_async.boundary.settings import Count, NotNegative, check_settings
from searchr1_async.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class SharingSettings:
    """What splitting must bring.

    Raises:
        ConfigurationError: a value out of its range.
    """

    request_seconds: NotNegative = 0.0033
    """CPU of the SDK for one request, of one sample or of eight (500 prompt tokens; 2.6-3.3 ms measured): what it is taken to
    cost at least, and until it was measured."""
    least_gain: NotNegative = 0.25
    """Of E[slowest of G]. Eight times the client's work for less is seldom worth it: that is a lognormal spread under 0.25."""
    margin: NotNegative = 2.0
    """The gain over the delay in the SDK's thread. Over 1, since later turns of other groups wait there too."""
    most_cpu: NotNegative = 0.6
    """Of one core."""
    enough: Count = 64
    """Single first turns seen before anything is split for gain: the slowest of 8 is then known from 8 groups' worth."""
    memory: Count = 512
    """Single first turns kept."""
    first_probes: Count = 4
    """One group of so many is split to see, until enough were seen."""
    later_probes: Count = 32
    """One group of so many afterwards."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.memory < self.enough:
            raise ConfigurationError(f"memory is {self.memory}: it must be at least enough ({self.enough})")


@dataclass(slots=True)
class Backlog:
    """Seconds of work that wait in the SDK's one thread, as far as the costs of its requests tell."""

    seconds_then: float = 0.0
    then: float = 0.0

    def at(self, now: float) -> float:
        """Seconds that a request sent now waits there."""
        return max(0.0, self.seconds_then - (now - self.then))

    def add(self, now: float, seconds: float) -> None:
        """A request that takes the thread so long."""
        self.seconds_then, self.then = self.at(now) + seconds, now


@dataclass(slots=True)
class Sharing:
    """Decides it, a group at a time. Times are seconds of one monotonic clock."""

    settings: SharingSettings = field(default_factory=SharingSettings)
    backlog: Backlog = field(default_factory=Backlog)
    asked: int = 0
    """Groups it was asked for."""
    split: int = 0
    """Of which it split so many."""
    first_turns: float = 0.0
    """Finished, each weighing less the longer ago."""
    second_turns: float = 0.0
    """Begun, weighed alike."""
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
        """A request goes out; returns the seconds that it waits in the SDK's thread, to be given to :meth:`finished`."""
        delay = self.backlog.at(now)
        self.backlog.add(now, self.request_seconds)
        self._new_requests += 1
        if turn == 1:
            self.second_turns += samples
        return delay

    def finished(self, seconds: float, *, samples: int, turn: int, delay: float = 0.0) -> None:
        """A request was answered after so many seconds, of which it waited ``delay`` in the SDK's thread."""
        if turn:
            return
        self.first_turns += samples
        if self.first_turns > 2 * FORGETTING:
            self.first_turns /= 2
            self.second_turns /= 2
        if samples == 1:
            # Else the spread of the client's own delays in a burst would pass for a tail, and call for more requests.
            self._singles.append(max(seconds - delay, 0.0))
            if len(self._singles) > self.settings.memory:
                self._singles.popleft()
            self._sorted = None

    def client_is(self, *, seconds: float, cpu: float, is_saturated: bool) -> None:
        """How this process did in the last ``seconds``: seconds of CPU a second, and whether it can do no more."""
        self._cpu, self._is_saturated = cpu, is_saturated
        if self._new_requests:  # without requests, its CPU went into something else
            self._cpu_seconds = 0.9 * self._cpu_seconds + cpu * seconds
            self._requests = 0.9 * self._requests + self._new_requests
            self._new_requests = 0

    @property
    def request_seconds(self) -> float:
        """CPU seconds a request, as measured lately; never less than the SDK's own, nor over 10 times as much."""
        least = self.settings.request_seconds
        if self._requests < MEASURED_REQUESTS:
            return least
        return min(max(self._cpu_seconds / self._requests, least), 10 * least)

    @property
    def continuing(self) -> float:
        """The share of first turns that a second follows; 1 before any is known."""
        return min(1.0, self.second_turns / self.first_turns) if self.first_turns else 1.0

    def slowest(self, members: int) -> float | None:
        """E[slowest of so many first turns] in seconds; None before enough were seen."""
        times = self._times()
        if times is None:
            return None
        count = len(times)
        return sum(
            seconds * (((rank + 1) / count) ** members - (rank / count) ** members)
            for rank, seconds in enumerate(times)
        )

    def gain(self, members: int) -> float | None:
        """Seconds that a member gains of its own request, delays left aside; None before enough were seen."""
        times, slowest = self._times(), self.slowest(members)
        if times is None or slowest is None:
            return None
        return self.continuing * (slowest - sum(times) / len(times))

    def is_worth_it(self, now: float, members: int) -> bool:
        """Whether one request for the first turns of so many members costs less than one request each."""
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
            # No second turn follows: whatever the tail is, nothing is to be gained, and nothing to be seen.
            is_pointless = self.first_turns >= settings.enough and not self.second_turns
            # Of a burst, no more groups than are needed: they are still under way when the next are asked about.
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
"""Seconds without a new group that end a burst of them, as the first of a batch are."""
MEASURED_REQUESTS = 100
"""Requests from which on the CPU of one counts as measured."""
FORGETTING = 4096
"""First turns after which the share of those that go on weighs half: it changes while a model learns to search."""
