"""Placement of groups and scaling; ``test_pool`` covers real processes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import pytest

from searchr1_async.config import EpisodeLimits
from searchr1_async.episodes.types import Episode, Question, StopReason
from searchr1_async.errors import ServiceError
from searchr1_async.rollout import elastic
from searchr1_async.rollout.elastic import ElasticPlayer
from searchr1_async.rollout.event_loop import PulseReading
from searchr1_async.rollout.gate import SampleGate
from searchr1_async.rollout.messages import Load, WorkerSpec
from searchr1_async.rollout.player import Finished, GroupTask
from searchr1_async.rollout.worker_pool import PoolStatistics, WorkerPool, WorkerStatistics
from searchr1_async.testing import DictSearch, ScriptedPolicy
from tests.virtual_time import VirtualTimeLoop

SPEC = WorkerSpec("tags", "scripted", str(Path("nowhere")), EpisodeLimits())
POLICY = ScriptedPolicy(lambda prompt: ())
CALM = PulseReading(1.0, 0.0, 0.0, 0.0, 0.1)
BUSY = PulseReading(1.0, 0.5, 1.0, 1.5, 0.99)


class Here:
    """Runs groups until told to end, and counts them."""

    def __init__(self) -> None:
        self.groups = 0
        self.end = anyio.Event()

    async def play(self, task: GroupTask, policy: Any, finished: Finished) -> None:
        self.groups += 1
        await self.end.wait()
        for member in task.members:
            await finished(member, Episode(task.question, (), (), StopReason.ANSWER))


class Pool(WorkerPool):
    """A pool of fake workers."""

    def __init__(self, workers: int = 0, *, refuses: bool = False, takes: bool = True) -> None:
        super().__init__(SPEC, DictSearch(), count=0)
        self.player = Here()
        self.size = workers
        self.refuses, self.takes = refuses, takes
        self.load = Load(1.0, CALM, SampleGate().statistics)
        self.asked_at: list[float] = []

    def can_play(self, policy: Any) -> bool:  # type: ignore[override]
        return self.takes

    @property
    def least_members(self) -> int | None:
        return -(-8 * self.player.groups // self.size) if self.size else None

    @property
    def statistics(self) -> PoolStatistics:
        worker = WorkerStatistics(1, 0, 8 * self.player.groups, self.load)
        return PoolStatistics((worker,) * self.size, deaths=0, replayed=0)

    async def add_worker(self) -> None:
        self.asked_at.append(asyncio.get_running_loop().time())
        if self.refuses:
            raise ServiceError("no memory")
        self.size += 1

    async def play(self, task: GroupTask, policy: Any, finished: Finished) -> None:
        await self.player.play(task, policy, finished)


def run(main: Any) -> None:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(main)


def task(place: int) -> GroupTask:
    return GroupTask(place, Question(str(place), "?", ("yes",)), tuple(range(8)))


async def unheard(member: int, episode: Episode) -> None: ...


async def start(player: ElasticPlayer, groups: anyio.abc.TaskGroup, count: int) -> None:
    for place in range(count):
        groups.start_soon(player.play, task(place), POLICY, unheard)
        await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize(("workers", "takes", "here"), [(0, True, 12), (1, True, 6), (2, True, 4), (2, False, 12)])
def test_groups_go_where_the_fewest_episodes_are(workers: int, takes: bool, here: int) -> None:
    async def main() -> None:
        local, pool = Here(), Pool(workers, takes=takes)
        async with ElasticPlayer(local, SampleGate(), pool, grows=False) as player:
            async with anyio.create_task_group() as groups:
                await start(player, groups, 12)
                assert (local.groups, pool.player.groups) == (here, 12 - here)
                assert player.loads[0].members == 8 * here
                local.end.set()
                pool.player.end.set()
            assert player.loads[0].members == 0
            assert player.metrics()["rollout/processes"] == 1 + workers

    run(main())


def test_a_cancelled_group_counts_no_longer() -> None:
    async def main() -> None:
        local = Here()
        async with ElasticPlayer(local, SampleGate(), Pool(), grows=False) as player:
            async with anyio.create_task_group() as groups:
                await start(player, groups, 3)
                assert player.loads[0].members == 24
                groups.cancel_scope.cancel()
            assert player.loads[0].members == 0

    run(main())


def test_it_grows_while_all_are_saturated_and_cores_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic, "machine_load", lambda: 1.0)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        gate = SampleGate(clock=loop.time)
        local, pool = Here(), Pool()
        began = loop.time()

        async def pulse() -> None:
            while True:
                gate.client_is(BUSY if loop.time() - began > 10 else CALM)
                if pool.size and loop.time() - pool.asked_at[-1] > 20:
                    # Then the first worker is saturated too.
                    pool.load = replace(pool.load, gate=gate.statistics)
                await anyio.sleep(1.0)

        async with ElasticPlayer(local, gate, pool, grows=True, cores=3) as player, anyio.create_task_group() as groups:
            groups.start_soon(pulse)
            await start(player, groups, 40)
            await anyio.sleep(9)
            assert pool.asked_at == [], "not saturated"
            await anyio.sleep(16)
            assert len(pool.asked_at) == 1, "its first worker is free"
            await anyio.sleep(100)
            assert len(pool.asked_at) == 2, "three processes on three cores"
            assert 15 <= pool.asked_at[0] - began <= 18
            groups.cancel_scope.cancel()

    run(main())


def test_it_goes_on_without_a_worker_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic, "machine_load", lambda: 1.0)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        gate = SampleGate(clock=loop.time)
        local, pool = Here(), Pool(refuses=True)

        async def pulse() -> None:
            while True:
                gate.client_is(BUSY)
                await anyio.sleep(1.0)

        async with ElasticPlayer(local, gate, pool, grows=True, cores=8) as player, anyio.create_task_group() as groups:
            groups.start_soon(pulse)
            await start(player, groups, 10)
            await anyio.sleep(60)
            assert len(pool.asked_at) == 1
            await start(player, groups, 1)
            assert local.groups == 11
            groups.cancel_scope.cancel()

    run(main())


@pytest.mark.parametrize("cancels", ["the scope", "the task"])
def test_what_ends_the_block_comes_out_of_it(cancels: str) -> None:
    async def main() -> None:
        async def fail() -> None:
            async with (
                WorkerPool(SPEC, DictSearch(), count=0) as pool,
                ElasticPlayer(Here(), SampleGate(), pool, grows=True),
            ):
                raise ValueError("of the block")

        with pytest.raises(ValueError, match="of the block"):
            await fail()
        opened, is_over = asyncio.Event(), False

        async def wait() -> None:
            nonlocal is_over
            async with (
                WorkerPool(SPEC, DictSearch(), count=0) as pool,
                ElasticPlayer(Here(), SampleGate(), pool, grows=True),
            ):
                opened.set()
                await anyio.sleep_forever()
            is_over = True

        if cancels == "the scope":
            async with anyio.create_task_group() as group:
                group.start_soon(wait)
                await opened.wait()
                group.cancel_scope.cancel()
        else:
            waiting = asyncio.ensure_future(wait())
            await opened.wait()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        assert not is_over

    run(main())
