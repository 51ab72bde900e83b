"""Event loop lag, busy and idle, in virtual time."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest

from searchr1_async.rollout.event_loop import IDLE_INTERVAL, INTERVAL, Lags, Pulse, PulseReading
from tests.virtual_time import VirtualTimeLoop

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"debug": True, "loop_factory": VirtualTimeLoop}


class Machine:
    """Event loop in virtual time, with simulated blocking work and CPU use."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        assert isinstance(self.loop, VirtualTimeLoop)
        self.background = 0.0
        """Cores used constantly."""
        self.used = 0.0

    def cpu(self) -> float:
        return self.used + self.background * self.loop.time()

    def work(self, seconds: float) -> None:
        self.loop._virtual += seconds  # type: ignore[attr-defined]
        self.used += seconds

    def pulse(self, hear: Any = None) -> Pulse:
        return Pulse(hear, clock=self.loop.time, cpu_clock=self.cpu)


async def test_an_idle_loop_is_not_late() -> None:
    async with Machine().pulse() as pulse:
        await anyio.sleep(10)
        reading = pulse.take()
    assert reading.seconds == pytest.approx(10)
    assert reading.lag_max < 1e-6
    assert reading.cpu == 0


@pytest.mark.parametrize("background", [0.0, 0.5])
async def test_one_long_piece_of_work_is_seen_in_its_length(background: float) -> None:
    machine = Machine()
    machine.background = background
    interval = INTERVAL if background else IDLE_INTERVAL
    async with machine.pulse() as pulse:
        await anyio.sleep(4.5)
        machine.work(0.5)
        await anyio.sleep(5)
        reading = pulse.take()
        assert pulse.take().lag_max == 0
    assert 0.5 - interval <= reading.lag_max <= 0.5
    assert reading.lag_p50 < 0.001
    # In 10 s, timers due within half a second are late by 0 to 0.5 s, uniformly: the 99th percentile is 0.4 s.
    assert 0.25 < reading.lag_p99 <= reading.lag_max
    assert reading.cpu == pytest.approx(background + 0.05, rel=0.02)


async def test_a_loop_that_is_held_again_and_again_is_late_in_the_median() -> None:
    machine = Machine()
    readings: list[PulseReading] = []
    async with machine.pulse(readings.append):
        for _ in range(100):
            machine.work(0.1)
            await anyio.sleep(0.001)
    assert len(readings) >= 8
    for reading in readings[1:]:
        assert 0.02 < reading.lag_p50 < 0.08
        assert reading.cpu == pytest.approx(0.99, abs=0.02)
        assert 1.0 <= reading.seconds < 1.3


async def test_it_ends_with_its_block_and_leaves_nothing() -> None:
    loop = asyncio.get_running_loop()
    before = asyncio.all_tasks()
    async with Machine().pulse():
        await anyio.sleep(1)
    assert asyncio.all_tasks() == before
    assert [timer for timer in loop._scheduled if not timer.cancelled()] == []  # type: ignore[attr-defined]


async def test_it_runs_as_a_task_of_a_group_and_ends_with_it() -> None:
    readings: list[PulseReading] = []
    pulse = Machine().pulse(readings.append)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pulse.run)
        await anyio.sleep(3.5)
        tasks.cancel_scope.cancel()
    assert len(readings) == 3


async def test_what_hears_it_and_fails_fails_the_block() -> None:
    def hear(reading: PulseReading) -> None:
        raise RuntimeError("cannot decide")

    with pytest.raises(ExceptionGroup) as caught:
        async with Machine().pulse(hear):
            await anyio.sleep(60)
    assert caught.group_contains(RuntimeError, match="cannot decide")


def test_quantiles_are_right_to_a_tenth_and_the_size_stays() -> None:
    lags = Lags()
    for number in range(1, 1001):
        lags.add(number * 1e-5)
    assert lags.quantile(0.5) == pytest.approx(0.005, rel=0.1)
    assert lags.quantile(0.99) == pytest.approx(0.0099, rel=0.1)
    assert lags.quantile(1.0) == lags.max == 0.01
    assert Lags().quantile(0.99) == 0
    lags.add(1e9)
    assert lags.quantile(0.99) > 1000


def test_the_names_of_its_metrics() -> None:
    metrics = PulseReading(1.0, 0.001, 0.02, 0.03, 0.4).metrics()
    assert metrics == {"loop/lag_p99": 0.02, "loop/lag_max": 0.03, "loop/cpu": 0.4}


@pytest.mark.parametrize(("background", "beats"), [(0.0, 100), (0.5, 500)])
async def test_it_beats_as_seldom_as_an_idle_process_allows(background: float, beats: int) -> None:
    """Beats are the only cost, since each wakes the process."""
    machine = Machine()
    machine.background = background
    asked = 0

    def cpu() -> float:
        nonlocal asked
        asked += 1
        return machine.cpu()

    async with Pulse(clock=machine.loop.time, cpu_clock=cpu):
        await anyio.sleep(10)
    assert beats * 0.95 <= asked <= beats + 5
