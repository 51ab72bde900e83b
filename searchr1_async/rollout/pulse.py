"""The pulse of the event loop: how late its timers are, and how much CPU the process takes."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import anyio

INTERVAL = 0.02
"""Seconds between two beats of a busy process. What holds the loop is seen as shorter by at most so much."""
IDLE_INTERVAL = 0.1
"""Seconds between two beats of an idle process, where each has to wake it: up to 0.2 ms of CPU on a virtual machine."""
IDLE_CPU = 0.1
"""Of one core: below it the process is idle."""
LONGEST_FOLLOWED = 1000
"""Beats that one long piece of work may stand for."""
_SMALLEST, _GROWTH, _BUCKETS = 1e-5, 1.1, 200
"""Of the histogram: 10 us to 30 minutes, each bucket a tenth wider than the last."""
_LOG_GROWTH = math.log(_GROWTH)


@dataclass(frozen=True, slots=True)
class PulseReading:
    """What was measured in some time."""

    seconds: float
    """How long that was."""
    lag_p50: float
    """Seconds by which something due at a moment of this time was late, in the median (to 10 %)."""
    lag_p99: float
    """At the 99th percentile."""
    lag_max: float
    """At worst; exact."""
    cpu: float
    """Seconds of CPU a second, all threads of the process."""

    def metrics(self) -> dict[str, float]:
        """By the names under which a run reports them."""
        return {"loop/lag_p99": self.lag_p99, "loop/lag_max": self.lag_max, "loop/cpu": self.cpu}


class Lags:
    """A histogram of delays: its size does not grow with the time."""

    def __init__(self) -> None:
        self._counts = [0] * _BUCKETS
        self._count = 0
        self.max = 0.0

    def add(self, lag: float, interval: float = INTERVAL) -> None:
        """One beat that was late by so many seconds, when it was due ``interval`` after the last.

        A piece of work that holds the loop for many intervals delays one beat only, though whatever became due meanwhile
        waited too. So the beats that it kept from happening are counted with it, each with its own delay (Tene,
        "How NOT to Measure Latency", on coordinated omission); and a long interval for the quiet beats left out of it.
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
        """The upper edge of the bucket in which that share of all delays is reached; 0 when there are none."""
        below = 0
        for bucket, count in enumerate(self._counts):
            below += count
            if count and below >= share * self._count:
                return min(_SMALLEST * _GROWTH**bucket, self.max)
        return 0.0


class _Measure:
    """One time span being measured."""

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
    """Measures the event loop that it runs in, as a task of a task group (``tasks.start_soon(pulse.run)``) or by itself::

        async with Pulse(gate.client_is) as pulse:
            ...
            pulse.take().metrics()

    Args:
        hear: gets a reading every ``every`` seconds, and decides by it.
        every: seconds; so long a time that a moment's load does not count as saturation.
        clock: in seconds, monotonic.
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
        """What was measured since this was last asked for."""
        reading = self._long.read(self._clock(), self._cpu_clock())
        self._long = self._begin()
        return reading

    async def run(self) -> None:
        """Measures until it is cancelled. One at a time."""
        loop = asyncio.get_running_loop()
        broken: asyncio.Future[None] = loop.create_future()
        clock, cpu_clock = self._clock, self._cpu_clock
        self._short, self._long = self._begin(), self._begin()
        last, last_cpu, interval = clock(), cpu_clock(), INTERVAL

        # Callbacks of the loop itself: waking a task costs half as much again, and beats are all that this costs.
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
