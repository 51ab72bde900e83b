"""Opens a rollout engine with its player, and closes it reliably."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import anyio

from searchr1_async.billing import TokenUsage
from searchr1_async.boundary.paths import raise_limit
from searchr1_async.boundary.waits import usable_cores
from searchr1_async.config import SamplingSettings
from searchr1_async.episodes.formats import make_dialect
from searchr1_async.episodes.play import SearchTool
from searchr1_async.episodes.rewards import RewardFunction
from searchr1_async.events import Emit, Notice, RolloutSampled
from searchr1_async.rollout.engine import PlayTally, RolloutEngine
from searchr1_async.rollout.garbage import rare_collections
from searchr1_async.rollout.gate import GateStatistics, SampleGate, gate_metrics
from searchr1_async.rollout.limit import LimitSettings, SampleLimit
from searchr1_async.rollout.player import LocalPlayer
from searchr1_async.rollout.pulse import Pulse, PulseReading
from searchr1_async.rollout.sampled import CountedSearch, PlayReading, usage_of_gates
from searchr1_async.rollout.workers.elastic import ElasticPlayer
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
    search_metrics: Callable[[], Mapping[str, float]] = dict,
) -> AsyncIterator[RolloutEngine]:
    """Opens an engine that runs in this process, or in workers as set by ``sampling.workers``.

    While open, it emits :class:`~searchr1_async.events.RolloutSampled` at 4 Hz.

    Args:
        spec: rollout configuration, the same for all processes.
        tokenizer: the loaded tokenizer of ``spec``.
        search_metrics: search totals to emit.

    Raises:
        ModelError: the format or renderer is unknown.
        ServiceError: a worker did not start.
    """
    dialect = make_dialect(
        spec.format_name,
        spec.model_name,
        tokenizer,
        renderer_name=spec.renderer_name,
        thinking=spec.thinking,
        instructions=spec.instructions,
        method=spec.method,
    )
    files, bounds = raise_limit(), LimitSettings(most=sampling.max_episodes_in_flight)
    if (warning := files.warning(min(bounds.most, bounds.most_requests))) is not None:
        emit(Notice(warning, is_warning=True))
    gate = SampleGate(SampleLimit(bounds.within(files)))
    counted = CountedSearch(search)
    local = LocalPlayer(dialect, counted, spec.limits, gate, spec.first_turn, spec.method)
    tally = PlayTally()
    reading = PlayReading(emit, tally, counted, search_metrics)

    def hear(pulse: PulseReading) -> None:
        gate.client_is(pulse)
        reading.pulse = pulse

    with rare_collections():
        async with (
            Pulse(hear) as pulse,
            _open_player(local, gate, spec, counted, sampling) as player,
            anyio.create_task_group() as tasks,
        ):

            def gates() -> list[GateStatistics]:
                here = [] if isinstance(player, WorkerPool) else [gate.statistics]
                return here if isinstance(player, LocalPlayer) else [*here, *player.gates]

            def metrics() -> Mapping[str, float]:
                elsewhere = {} if isinstance(player, LocalPlayer) else player.metrics()
                return {**gate_metrics(gates()), **pulse.take().metrics(), **elsewhere}

            def gone() -> TokenUsage:
                return TokenUsage() if isinstance(player, LocalPlayer) else player.gone

            def look() -> RolloutSampled:
                return reading.read(gates(), gone())

            tasks.start_soon(reading.tell, look)
            yield RolloutEngine(
                dialect,
                player,
                sampling,
                reward,
                group_size,
                max_failed_fraction,
                emit,
                metrics,
                tally,
                usage=lambda: usage_of_gates(gates(), gone()),
            )
            tasks.cancel_scope.cancel()
            reading.look_at_search()
            emit(look())  # final totals


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
