"""Groups played in this process and in others beside it, which are started when this one is saturated."""

from __future__ import annotations

import logging
import os
from types import TracebackType
from typing import Self

import anyio
from anyio.abc import TaskGroup

from searchr1_async.episodes.types import Episode
from searchr1_async.errors import ConfigurationError, ServiceError
from searchr1_async.rollout.gate import GateStatistics, SampleGate
from searchr1_async.rollout.player import Finished, GroupPlayer, GroupPolicy, GroupTask
from searchr1_async.rollout.workers.pool import WorkerPool
from searchr1_async.rollout.workers.scaling import ProcessLoad, wants_more_workers
from searchr1_async.threads import usable_cores
from searchr1_async.usage import TokenUsage

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Between two looks at whether one more process helps."""


class ElasticPlayer:
    """Plays in this process and in those of a pool, each group where the fewest episodes are under way::

        async with WorkerPool(spec, search, count=0) as pool, ElasticPlayer(local, gate, pool, grows=True) as player:
            await player.play(task, policy, finished)

    A group stays where it began. A policy that no other process can sample from is played here.

    Args:
        local: plays in this process.
        gate: that ``local`` samples through: knows how busy this process is.
        pool: open, and closed by whoever opened it.
        grows: adds workers to the pool while every process is saturated and cores are left (``workers="auto"``).
        cores: at most so many processes play; None: as many as this process may use.
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
            raise ConfigurationError("this player is open already")
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
        # Not with the block's own error: it would come out in a group, or, a cancellation, might not come out at all.
        await tasks.__aexit__(None, None, None)

    async def play(self, task: GroupTask, policy: GroupPolicy, finished: Finished) -> None:
        """See :class:`GroupPlayer`, and :meth:`WorkerPool.play` for what it raises."""
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
        """As :meth:`WorkerPool.pause`, for the other processes and this one."""
        self._local.pause(is_paused)
        self._pool.pause(is_paused)

    @property
    def loads(self) -> list[ProcessLoad]:
        """Every process that plays; this one comes first."""
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
        """What goes through the gates of the other processes."""
        return self._pool.gates

    @property
    def gone(self) -> TokenUsage:
        """As :attr:`WorkerPool.gone`."""
        return self._pool.gone

    def metrics(self) -> dict[str, float]:
        """By the names under which a run reports them; those of this process alone are its gate's and its pulse's."""
        metrics = self._pool.metrics()
        return {**metrics, "rollout/processes": 1.0 + metrics["rollout/processes"]}

    async def _grow(self) -> None:
        while True:
            await anyio.sleep(LOOK_SECONDS)
            loads = self.loads
            if not wants_more_workers(loads, cores=self._cores, machine_load=machine_load()):
                continue
            logger.info("every rollout process is saturated: starting one more beside the %d", len(loads))
            try:
                await self._pool.add_worker()
            except ServiceError as error:
                logger.warning("playing goes on with the %d processes that there are: %s", len(loads), error)
                return


def machine_load() -> float:
    """Runnable threads, averaged over a minute; 0 where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return 0.0
