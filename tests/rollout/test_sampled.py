"""Rollout telemetry."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest

from searchr1_async.billing import TokenUsage
from searchr1_async.events import Event, RolloutSampled
from searchr1_async.rollout.engine import SEARCH_EVERY, TELL_EVERY, Telemetry, counted
from searchr1_async.rollout.event_loop import PulseReading
from searchr1_async.rollout.gate import GateStatistics, SampleGate
from searchr1_async.rollout.limit import LimitSettings, SampleLimit
from searchr1_async.testing import DictSearch
from tests.virtual_time import VirtualTimeLoop

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"debug": True, "loop_factory": VirtualTimeLoop}


class SlowSearch(DictSearch):
    async def search(self, queries: Any) -> Any:
        await anyio.sleep(10)
        return await super().search(queries)


class Here:
    """This process, beside workers that are gone."""

    gone = TokenUsage(1000, 300, 2000)

    def __init__(self, gate: SampleGate) -> None:
        self._gate = gate

    @property
    def gates(self) -> list[GateStatistics]:
        return [self._gate.statistics]


async def test_it_says_where_every_episode_is() -> None:
    told: list[Event] = []
    gate = SampleGate(
        SampleLimit(LimitSettings(first=2, least=2, most=2)), clock=lambda: asyncio.get_running_loop().time()
    )
    searched = [0.0]

    def search_metrics() -> dict[str, float]:
        searched[0] += 1
        return {"search/calls": searched[0]}

    reading = Telemetry(told.append, search_metrics, groups=2, episodes=6, finished=3)
    reading.pulse = PulseReading(1.0, 0.001, 0.02, 0.03, 0.5)

    async def sample() -> None:
        async with gate.slot(tokens=100) as slot:
            await anyio.sleep(10)
            slot.finished([7], 40)

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(sample)
        tasks.start_soon(counted(SlowSearch(), reading), ["where"])
        await anyio.sleep(1e-6)
        tasks.start_soon(reading.tell, Here(gate))
        await anyio.sleep(TELL_EVERY * SEARCH_EVERY * 1.5)
        first = told[0]
        assert isinstance(first, RolloutSampled)
        assert (first.episodes, first.sampling, first.queued, first.searching, first.groups) == (6, 2, 1, 1, 2)
        assert (first.finished_episodes, first.prompt_tokens, first.sampled_tokens) == (3, 1200, 2000)
        assert (first.loop_lag_p50, first.loop_lag_p99, first.loop_lag_max, first.cpu) == (0.001, 0.02, 0.03, 0.5)
        assert first.limited_by == "settings"
        assert not first.is_paused
        assert len(told) == SEARCH_EVERY * 1.5
        assert searched == [2.0], "search metrics are read less often"
        gate.pause(True)
        await anyio.sleep(15)
        last = told[-1]
        assert isinstance(last, RolloutSampled)
        assert (last.sampling, last.queued, last.searching) == (0, 1, 0)
        assert (last.prompt_tokens, last.sampled_tokens, last.is_paused) == (1200, 2014, True)
        assert (first.cached_prompt_tokens, last.cached_prompt_tokens) == (300, 380)
        tasks.cancel_scope.cancel()


async def test_a_search_that_fails_is_over() -> None:
    class Broken(DictSearch):
        async def search(self, queries: Any) -> Any:
            raise ValueError("broken")

    telemetry = Telemetry()
    with pytest.raises(ValueError, match="broken"):
        await counted(Broken(), telemetry)(["where"])
    assert telemetry.searching == 0
