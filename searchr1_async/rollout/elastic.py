"""Rolls out groups in this process, plus workers that are started when it is saturated.

:func:`wants_more_workers` decides that and is pure.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import anyio
from anyio.abc import TaskGroup

from searchr1_async.billing import TokenUsage
from searchr1_async.boundary.waits import usable_cores
from searchr1_async.config import SamplingSettings
from searchr1_async.episodes.play import SearchTool
from searchr1_async.episodes.types import Episode
from searchr1_async.errors import ConfigurationError, ServiceError
from searchr1_async.rollout.gate import GateStatistics, SampleGate
from searchr1_async.rollout.limit import LimitSettings
from searchr1_async.rollout.messages import WorkerSpec
from searchr1_async.rollout.player import Finished, GroupPlayer, GroupPolicy, GroupTask, LocalPlayer
from searchr1_async.rollout.worker_pool import WorkerPool

logger = logging.getLogger(__name__)

SATURATED_SECONDS = 5.0
"""Minimum uninterrupted saturation: a shorter peak is not worth the CPU of a worker's start."""
WORTH_MEMBERS = 64
"""Minimum episodes in the busiest process. With fewer, something other than rollouts saturates it."""


@dataclass(frozen=True, slots=True)
class ProcessLoad:
    """Load of one rollout process."""

    saturated_seconds: float
    """Time saturated without a break; 0 if it is not (:attr:`GateStatistics.saturated_seconds`)."""
    members: int
    """Episodes in progress."""


def wants_more_workers(processes: Sequence[ProcessLoad], *, cores: int, machine_load: float) -> bool:
    """Whether to start another worker: every process is saturated and a core is free.

    Args:
        processes: all rollout processes, including this one.
        cores: cores usable by this process.
        machine_load: runnable threads, averaged over a minute (``os.getloadavg()[0]``); 0 if unknown. Accounts for other
            programs, such as the embedded service.
    """
    if not processes or len(processes) >= cores or machine_load >= cores:
        return False
    if max(process.members for process in processes) < WORTH_MEMBERS:
        return False
    return all(process.saturated_seconds >= SATURATED_SECONDS for process in processes)


LOOK_SECONDS = 1.0
"""Between scaling decisions."""


class ElasticPlayer:
    """Rolls out in this process and a worker pool; each group goes to the least busy process::

        async with WorkerPool(spec, search, count=0) as pool, ElasticPlayer(local, gate, pool, grows=True) as player:
            await player.play(task, policy, finished)

    A group stays in its process. A policy that cannot be sent to workers runs in this process.

    Args:
        local: player of this process.
        gate: gate of ``local``, which measures this process's load.
        pool: an open pool; its owner closes it.
        grows: add workers while all processes are saturated and cores are free (``workers="auto"``).
        cores: maximum number of processes; None: the cores usable by this process.
    """

    def __init__(
        self, local: GroupPlayer, gate: SampleGate, pool: WorkerPool, *, grows: bool, cores: int | None = None
    ) -> None:
        self._local = local
        self._gate = gate
        self._pool = pool
        self._grows = grows
        self._cores = usable_cores() if cores is None else cores
        self._members = 0
        self._tasks: TaskGroup | None = None

    async def __aenter__(self) -> Self:
        if self._tasks is not None:
            raise ConfigurationError("this player is already open")
        self._tasks = await anyio.create_task_group().__aenter__()
        if self._grows:
            self._tasks.start_soon(self._grow)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._tasks is not None
        tasks, self._tasks = self._tasks, None
        tasks.cancel_scope.cancel()
        # Without the block's error, which would come out wrapped in a group or, if a cancellation, be swallowed.
        await tasks.__aexit__(None, None, None)

    async def play(self, task: GroupTask, policy: GroupPolicy, finished: Finished) -> None:
        """See :class:`GroupPlayer`; raises as :meth:`WorkerPool.play`."""
        elsewhere = self._pool.least_members
        if elsewhere is not None and elsewhere <= self._members and self._pool.can_play(policy):
            await self._pool.play(task, policy, finished)
            return
        left = set(task.members)
        self._members += len(left)

        async def finished_here(member: int, episode: Episode) -> None:
            if member in left:
                left.discard(member)
                self._members -= 1
            await finished(member, episode)

        try:
            await self._local.play(task, policy, finished_here)
        finally:
            self._members -= len(left)

    def pause(self, is_paused: bool) -> None:
        """See :meth:`WorkerPool.pause`; also pauses this process."""
        self._local.pause(is_paused)
        self._pool.pause(is_paused)

    @property
    def loads(self) -> list[ProcessLoad]:
        """Load of every process, this one first."""
        here = ProcessLoad(self._gate.statistics.saturated_seconds, self._members)
        return [
            here,
            *(
                ProcessLoad(0.0 if worker.load is None else worker.load.gate.saturated_seconds, worker.members)
                for worker in self._pool.statistics.workers
            ),
        ]

    @property
    def gates(self) -> list[GateStatistics]:
        """Gate statistics of every process, this one first."""
        return [self._gate.statistics, *self._pool.gates]

    @property
    def gone(self) -> TokenUsage:
        """See :attr:`WorkerPool.gone`."""
        return self._pool.gone

    def metrics(self) -> dict[str, float]:
        """By metric name; excludes this process's gate and pulse."""
        metrics = self._pool.metrics()
        return {**metrics, "rollout/processes": 1.0 + metrics["rollout/processes"]}

    async def _grow(self) -> None:
        while True:
            await anyio.sleep(LOOK_SECONDS)
            loads = self.loads
            if not wants_more_workers(loads, cores=self._cores, machine_load=machine_load()):
                continue
            logger.info("all %d rollout processes are saturated: starting one more", len(loads))
            try:
                await self._pool.add_worker()
            except ServiceError as error:
                logger.warning("continuing with %d rollout processes: %s", len(loads), error)
                return


def machine_load() -> float:
    """Runnable threads, averaged over a minute; 0 if unknown."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return 0.0


@asynccontextmanager
async def open_player(
    local: LocalPlayer, gate: SampleGate, spec: WorkerSpec, search: SearchTool, sampling: SamplingSettings
) -> AsyncIterator[LocalPlayer | WorkerPool | ElasticPlayer]:
    """The player that ``sampling.workers`` asks for: ``local``, workers, or both.

    Raises:
        ServiceError: a worker did not start.
    """
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
