"""Keeps this process's event loop free: measures its lag and CPU use, collects garbage rarely, and shares the loop fairly among
small pieces of blocking work.
"""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

import anyio

INTERVAL = 0.02
"""Seconds between beats of a busy process; also the resolution of the measured lag."""
IDLE_INTERVAL = 0.1
"""Seconds between beats of an idle process, where each beat costs a wake-up."""
IDLE_CPU = 0.1
"""Cores below which the process counts as idle."""
LONGEST_FOLLOWED = 1000
"""Maximum number of missed beats counted for one blocking task."""
_SMALLEST, _GROWTH, _BUCKETS = 1e-5, 1.1, 200
"""Histogram: 10 us to 30 minutes, each bucket 10 % wider than the last."""
_LOG_GROWTH = math.log(_GROWTH)


@dataclass(frozen=True, slots=True)
class PulseReading:
    """Measurements over one time span."""

    seconds: float
    """Length of the span."""
    lag_p50: float
    """Median event loop lag in seconds, within 10 %."""
    lag_p99: float
    """99th percentile of the lag."""
    lag_max: float
    """Maximum lag, exact."""
    cpu: float
    """Cores used, over all threads of the process."""

    def metrics(self) -> dict[str, float]:
        return {"loop/lag_p99": self.lag_p99, "loop/lag_max": self.lag_max, "loop/cpu": self.cpu}


class Lags:
    """Histogram of delays, of fixed size."""

    def __init__(self) -> None:
        self._counts = [0] * _BUCKETS
        self._count = 0
        self.max = 0.0

    def add(self, lag: float, interval: float = INTERVAL) -> None:
        """Adds a beat that was ``lag`` seconds late, due ``interval`` after the last.

        Work that blocks the loop for many intervals delays one beat, though everything due meanwhile waited. So the missed beats
        are counted too, each with its own delay (Tene, "How NOT to Measure Latency", on coordinated omission), and a long
        interval adds the on-time beats it skipped.
        """
        self.max = max(self.max, lag)
        self._tally(0.0, max(0, round(interval / INTERVAL) - 1))
        for missed in range(1 + min(int(lag / INTERVAL), LONGEST_FOLLOWED)):
            self._tally(lag - missed * INTERVAL, 1)

    def _tally(self, lag: float, times: int) -> None:
        bucket = 0 if lag <= _SMALLEST else min(_BUCKETS - 1, 1 + int(math.log(lag / _SMALLEST) / _LOG_GROWTH))
        self._counts[bucket] += times
        self._count += times

    def quantile(self, share: float) -> float:
        """Upper edge of the bucket where this share of all delays is reached; 0 if there are none."""
        below = 0
        for bucket, count in enumerate(self._counts):
            below += count
            if count and below >= share * self._count:
                return min(_SMALLEST * _GROWTH**bucket, self.max)
        return 0.0


class _Measure:
    """One time span in progress."""

    def __init__(self, now: float, cpu: float) -> None:
        self.began = now
        self._cpu = cpu
        self.lags = Lags()

    def read(self, now: float, cpu: float) -> PulseReading:
        seconds = max(now - self.began, 1e-9)
        lags = self.lags
        return PulseReading(
            seconds, lags.quantile(0.5), lags.quantile(0.99), lags.max, max(0.0, cpu - self._cpu) / seconds
        )


class Pulse:
    """Measures the event loop it runs in, as a task (``tasks.start_soon(pulse.run)``) or as a context manager::

        async with Pulse(gate.client_is) as pulse:
            ...
            pulse.take().metrics()

    Args:
        hear: receives a reading every ``every`` seconds.
        every: seconds; long enough that a short peak does not count as saturation.
        clock: monotonic, in seconds.
        cpu_clock: CPU seconds of the process.
    """

    def __init__(
        self,
        hear: Callable[[PulseReading], None] | None = None,
        *,
        every: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.process_time,
    ) -> None:
        self._hear = hear
        self._every = every
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._short = self._long = self._begin()
        self._tasks: anyio.abc.TaskGroup | None = None

    def take(self) -> PulseReading:
        """Measurements since the last call."""
        reading = self._long.read(self._clock(), self._cpu_clock())
        self._long = self._begin()
        return reading

    async def run(self) -> None:
        """Measures until cancelled. Run one at a time."""
        loop = asyncio.get_running_loop()
        broken: asyncio.Future[None] = loop.create_future()
        clock, cpu_clock = self._clock, self._cpu_clock
        self._short, self._long = self._begin(), self._begin()
        last, last_cpu, interval = clock(), cpu_clock(), INTERVAL

        # Loop callbacks, since waking a task would cost half as much again.
        def beat() -> None:
            nonlocal last, last_cpu, interval, timer
            try:
                now, cpu = clock(), cpu_clock()
                lag = max(0.0, now - last - interval)
                self._short.lags.add(lag, interval)
                self._long.lags.add(lag, interval)
                if self._hear is not None and now - self._short.began >= self._every:
                    reading, self._short = self._short.read(now, cpu), _Measure(now, cpu)
                    self._hear(reading)
                is_idle = cpu - last_cpu < IDLE_CPU * (now - last)
                last, last_cpu, interval = now, cpu, IDLE_INTERVAL if is_idle else INTERVAL
                timer = loop.call_later(interval, beat)
            except Exception as error:
                if not broken.done():
                    broken.set_exception(error)

        timer = loop.call_later(interval, beat)
        try:
            await broken
        finally:
            timer.cancel()

    async def __aenter__(self) -> Pulse:
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self.run, name="pulse")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        assert self._tasks is not None
        tasks, self._tasks = self._tasks, None
        tasks.cancel_scope.cancel()
        return await tasks.__aexit__(kind, error, trace)

    def _begin(self) -> _Measure:
        return _Measure(self._clock(), self._cpu_clock())


SHORT_PAUSES = (5_000, 10, 100)
"""Collection thresholds of the three generations, for pauses under 40 ms and little garbage.

Every response of the SDK's HTTP client is a cycle of about 20 KB. If two young collections find it in use, it stays until a full one,
which visits everything in flight and takes 100 ms and more. So young collections are rarer than by default: a tenth of the responses
stay, not a third (at 1,000). And full ones are rare, but not too rare: every 18,000 samples, with about 130 MB of garbage."""

LITTLE_GARBAGE = (50_000, 5, 10)
"""Thresholds for a worker process, whose pauses nobody feels. With 4,000 episodes in flight its thread is so busy that at
:data:`SHORT_PAUSES` 40 % of the responses were in use when collections came: 32,000 samples took 818 MB, now 520."""

_users = 0
_before = gc.get_threshold()


@contextmanager
def rare_collections(thresholds: tuple[int, int, int] = SHORT_PAUSES) -> Iterator[None]:
    """Freezes existing objects and makes collections rare while the block runs.

    Reentrant, also across concurrent runs in a process: the first entry's thresholds hold, and the last exit restores the settings.
    """
    global _users, _before
    if not _users:
        _before = gc.get_threshold()
        gc.collect()
        gc.freeze()
        gc.set_threshold(*thresholds)
    _users += 1
    try:
        yield
    finally:
        _users -= 1
        if not _users:
            gc.set_threshold(*_before)
            gc.unfreeze()


PIECES = 2
"""Pieces per loop iteration, of 1 to 3 ms each. With 4 the loop was late by a third more."""


class LoopTurns:
    """Runs a few waiting pieces of work per event loop iteration, in order of arrival.

    When many samples arrive at once, their coroutines all become ready in one iteration and block the loop until the last is
    parsed. Awaiting :meth:`turn` before such work spreads it out. Bound to the event loop of its first use.
    """

    def __init__(self, pieces: int = PIECES) -> None:
        self._pieces = pieces
        self._left = pieces
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_scheduled = False

    async def turn(self) -> None:
        """Returns at once if this loop iteration has room, else in a later one."""
        loop = asyncio.get_running_loop()
        if not self._is_scheduled:
            self._is_scheduled = True
            loop.call_soon(self._renew, loop)
        if self._left and not self._waiting:
            self._left -= 1
            return
        place = loop.create_future()
        self._waiting.append(place)
        await place

    def _renew(self, loop: asyncio.AbstractEventLoop) -> None:
        self._left = self._pieces
        while self._left and self._waiting:
            place = self._waiting.popleft()
            if not place.done():  # its task may have been cancelled
                place.set_result(None)
                self._left -= 1
        self._is_scheduled = bool(self._waiting)
        if self._is_scheduled:
            loop.call_soon(self._renew, loop)
