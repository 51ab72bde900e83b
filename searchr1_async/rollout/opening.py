"""An engine opened with everything that plays for it, and closed again whatever happens."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from searchr1_async.config import SamplingSettings
from searchr1_async.episodes.dialect import make_dialect
from searchr1_async.episodes.play import SearchTool
from searchr1_async.episodes.reward import RewardFunction
from searchr1_async.events import Emit
from searchr1_async.rollout.engine import RolloutEngine
from searchr1_async.rollout.garbage import rare_collections
from searchr1_async.rollout.gate import SampleGate, gate_metrics
from searchr1_async.rollout.limit import LimitSettings, SampleLimit
from searchr1_async.rollout.player import LocalPlayer
from searchr1_async.rollout.pulse import Pulse
from searchr1_async.rollout.workers.elastic import ElasticPlayer, usable_cores
from searchr1_async.rollout.workers.messages import WorkerSpec
from searchr1_async.rollout.workers.pool import WorkerPool


@asynccontextmanager
async def open_engine(
    spec: WorkerSpec,
    tokenizer: Any,
    *,
    search: SearchTool,
    sampling: SamplingSettings,
    reward: RewardFunction,
    group_size: int,
    max_failed_fraction: float,
    emit: Emit,
) -> AsyncIterator[RolloutEngine]:
    """An engine that plays in this process, or in others where ``sampling.workers`` says so.

    Args:
        spec: how to play, here and there.
        tokenizer: the one that ``spec`` names, loaded.

    Raises:
        ModelError: an unknown format or renderer.
        ServiceError: a worker did not come up.
    """
    dialect = make_dialect(
        spec.format_name,
        spec.model_name,
        tokenizer,
        renderer_name=spec.renderer_name,
        instructions=spec.instructions,
    )
    gate = SampleGate(SampleLimit(LimitSettings(most=sampling.max_episodes_in_flight)))
    local = LocalPlayer(dialect, search, spec.limits, gate, spec.first_turn)
    with rare_collections():
        async with Pulse(gate.client_is) as pulse, _open_player(local, gate, spec, search, sampling) as player:

            def metrics() -> Mapping[str, float]:
                gates = [] if isinstance(player, WorkerPool) else [gate.statistics]
                elsewhere: Mapping[str, float] = {}
                if not isinstance(player, LocalPlayer):
                    gates, elsewhere = [*gates, *player.gates], player.metrics()
                return {**gate_metrics(gates), **pulse.take().metrics(), **elsewhere}

            yield RolloutEngine(dialect, player, sampling, reward, group_size, max_failed_fraction, emit, metrics)


@asynccontextmanager
async def _open_player(
    local: LocalPlayer, gate: SampleGate, spec: WorkerSpec, search: SearchTool, sampling: SamplingSettings
) -> AsyncIterator[LocalPlayer | WorkerPool | ElasticPlayer]:
    if sampling.workers == 1:
        yield local
        return
    processes = usable_cores() if sampling.workers == "auto" else sampling.workers
    spec = replace(spec, samples=LimitSettings(most=max(1, sampling.max_episodes_in_flight // processes)))
    if sampling.workers == "auto":
        async with WorkerPool(spec, search, count=0) as pool, ElasticPlayer(local, gate, pool, grows=True) as elastic:
            yield elastic
    else:
        async with WorkerPool(spec, search, count=sampling.workers) as pool:
            yield pool
