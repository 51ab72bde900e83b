"""An engine opened with everything that plays for it, and closed again whatever happens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from searchr1_async.config import EpisodeLimits, SamplingSettings
from searchr1_async.episodes.dialect import Dialect
from searchr1_async.episodes.play import SearchTool
from searchr1_async.episodes.reward import RewardFunction
from searchr1_async.events import Emit
from searchr1_async.rollout.engine import RolloutEngine
from searchr1_async.rollout.gate import SampleGate
from searchr1_async.rollout.player import LocalPlayer
from searchr1_async.rollout.pulse import Pulse


@asynccontextmanager
async def open_engine(
    *,
    dialect: Dialect,
    search: SearchTool,
    limits: EpisodeLimits,
    sampling: SamplingSettings,
    reward: RewardFunction,
    group_size: int,
    max_failed_fraction: float,
    emit: Emit,
) -> AsyncIterator[RolloutEngine]:
    """An engine that plays in this process, and in others where ``sampling.workers`` says so."""
    gate = SampleGate()
    async with Pulse(gate.client_is) as pulse:

        def metrics() -> dict[str, float]:
            return {**gate.statistics.metrics(), **pulse.take().metrics()}

        player = LocalPlayer(dialect, search, limits, gate, sampling.first_turn)
        yield RolloutEngine(dialect, player, sampling, reward, group_size, max_failed_fraction, emit, metrics)
