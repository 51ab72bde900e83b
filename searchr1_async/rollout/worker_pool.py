"""Pool of rollout workers: each group goes to the least busy one; unfinished members of a dead worker are retried.

The Tinker SDK uses one thread per process, which limits the samples per second. So a pool rolls out in several processes; search,
rewards and training stay in this one.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Literal, Self

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup, TaskStatus

from searchr1_async.billing import TokenUsage
from searchr1_async.episodes.play import SearchTool
from searchr1_async.errors import ConfigurationError, ServiceError, ungrouped
from searchr1_async.rollout.gate import GateStatistics
from searchr1_async.rollout.messages import (
    Cancel,
    ChannelClosedError,
    Ended,
    FromWorker,
    Load,
    Pause,
    Play,
    Played,
    SearchAsked,
    WorkerSpec,
)
from searchr1_async.rollout.player import Finished, GroupPolicy, GroupTask, Sampler, TinkerPolicy
from searchr1_async.rollout.worker_process import HAS_WORKERS, Attempt, WorkerProcess, launch

logger = logging.getLogger(__name__)

SILENT_SECONDS = 300.0
"""Seconds without a load report after which a worker counts as hung and is killed. Long, since this process may be suspended
too (a sleeping laptop)."""
SEED_OFFSET = 1_000_003
"""Added to a group's seed per retry: the same seed with fewer members would repeat samples of finished members."""


@dataclass(slots=True)
class DeathRecord:
    """Deaths in a sliding window. An occasional one is tolerated; many mean a bug or a lack of memory."""

    most: int = 5
    """Tolerated deaths within ``seconds``."""
    seconds: float = 120.0
    count: int = 0
    """Total deaths."""
    _recent: deque[float] = field(default_factory=deque)

    def is_too_many(self, now: float) -> bool:
        """Counts a death; returns whether to give up."""
        self.count += 1
        self._recent.append(now)
        while now - self._recent[0] > self.seconds:
            self._recent.popleft()
        return len(self._recent) > self.most


@dataclass(frozen=True, slots=True)
class WorkerStatistics:
    """Last reported state of a worker."""

    pid: int
    groups: int
    members: int
    """Episodes in progress."""
    load: Load | None
    """None until the first report, about a second after the start."""


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    workers: tuple[WorkerStatistics, ...]
    deaths: int
    """Total workers that died."""
    replayed: int
    """Episodes retried because of that."""


EPISODES_HERE = 512
"""From so many episodes in flight on, `workers="auto"` rolls out in worker processes: in one process with the SDK's thread, the event
loop of 1,024 was late by 119 ms at most, and by 21 ms without it."""
EPISODES_A_WORKER = 1024
"""Episodes in flight for which `workers="auto"` starts one worker."""


def worker_processes(workers: int | Literal["auto"], episodes: int, cores: int) -> int:
    """Number of worker processes that ``workers`` asks for; 0: rollouts run in this process.

    Args:
        episodes: maximum in flight.
        cores: cores usable by this process; one is left to it if there are two.
    """
    if workers != "auto":
        return 0 if workers == 1 else workers
    if episodes < EPISODES_HERE or not HAS_WORKERS:
        return 0
    return max(1, min(cores - 1, episodes // EPISODES_A_WORKER))


class WorkerPool:
    """Rolls out groups in worker processes, which keep their clients and connections while the pool is open::

        async with WorkerPool(spec, search, count=2) as pool:
            await pool.play(task, policy, finished)

    Searches run in this process, requested over the workers' channels, so that batching, cache and rate limits are shared; so do
    ``finished`` and the rewards.

    A dead worker is replaced, and the unfinished members of its groups are rolled out again.

    Args:
        spec: rollout configuration, the same as in this process.
        search: answers the searches of all workers.
        count: number of workers.
        deaths: tolerance for worker deaths.

    Raises, when entered:
        ServiceError: a worker did not start.
    """

    def __init__(
        self, spec: WorkerSpec, search: SearchTool, *, count: int = 1, deaths: DeathRecord | None = None
    ) -> None:
        self._spec = spec
        self._search = search
        self._count = count
        self._deaths = deaths or DeathRecord()
        self._replayed = 0
        self._is_paused = False
        self._gone = TokenUsage()
        self._workers: list[WorkerProcess] = []
        self._attempt_numbers = itertools.count()
        self._failure: ServiceError | None = None
        self._tasks: TaskGroup | None = None
        self._changed = anyio.Event()

    # -- opening and closing ---------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._tasks is not None:
            raise ConfigurationError("the worker pool is already open")
        self._failure = None
        self._changed = anyio.Event()
        self._tasks = await anyio.create_task_group().__aenter__()
        with ungrouped(Exception):
            try:
                async with anyio.create_task_group() as starting:
                    for _ in range(self._count):
                        starting.start_soon(self._tasks.start, self._keep_up)
            except BaseException as error:
                await self.__aexit__(type(error), error, error.__traceback__)
                raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._tasks is not None
        self._fail(ServiceError("the worker pool was closed while groups were running"))
        tasks, self._tasks = self._tasks, None
        # Shielded: processes must be ended in a cancelled run too, each within its deadline.
        tasks.cancel_scope.shield = True
        tasks.cancel_scope.cancel()
        # Without the block's error, which would come out wrapped in a group or, if a cancellation, be swallowed.
        await tasks.__aexit__(None, None, None)

    async def _keep_up(self, *, task_status: TaskStatus[None]) -> None:
        """Serves one worker and its replacements."""
        worker: WorkerProcess | None = await launch(self._spec)
        self._join(worker)
        task_status.started()
        while worker is not None:
            code = await self._attend(worker)
            worker = await self._replacement(code)

    def _join(self, worker: WorkerProcess) -> None:
        self._workers.append(worker)
        if self._is_paused:
            worker.channel.post(Pause(True))
        self._notify_change()

    async def _attend(self, worker: WorkerProcess) -> int | None:
        """Serves one worker until it is gone; returns its exit code. Ends the process when cancelled."""
        try:
            await self._listen(worker)
        finally:
            self._workers.remove(worker)
            if worker.load is not None:
                self._gone += worker.load.gate.usage
            lost = len(worker.attempts)
            for attempt in worker.attempts.values():
                attempt.lose()
            # If cancelled, it is still alive; else it has closed its channel and is exiting.
            code = await worker.end()
        logger.warning(
            "rollout worker %d died (exit code %s) with %d groups in progress; rolling them out again",
            worker.process.pid,
            code,
            lost,
        )
        return code

    async def _replacement(self, code: int | None) -> WorkerProcess | None:
        """A new worker; None if too many have died, which fails the pool."""
        cause: ServiceError | None = None
        while not self._deaths.is_too_many(time.monotonic()):
            try:
                worker = await launch(self._spec)
            except ServiceError as error:
                cause = error
                logger.warning("%s", error)
            else:
                self._join(worker)
                return worker
        self._fail(
            ServiceError(
                f"rollout workers died more than {self._deaths.most} times within {self._deaths.seconds:g} s; last cause: "
                f"{cause or f'exit code {code}'}. Check for free memory, or use workers=1; the workers' log may help"
            )
        )
        return None

    def _fail(self, error: ServiceError) -> None:
        self._failure = self._failure or error
        self._notify_change()

    def _notify_change(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    # -- messages from workers -------------------------------------------------------------------------------------------

    async def _listen(self, worker: WorkerProcess) -> None:
        """Returns when the worker is gone."""
        channel = worker.channel
        with suppress(ChannelClosedError, TimeoutError):
            while True:
                with anyio.fail_after(SILENT_SECONDS):
                    message = await channel.receive()
                self._take(worker, message)
                await anyio.lowlevel.checkpoint()  # messages that have been read already come without waiting

    def _take(self, worker: WorkerProcess, message: FromWorker) -> None:
        match message:
            case SearchAsked() | Played() | Ended():
                # Messages of a group cancelled here may still arrive.
                attempt = worker.attempts.get(message.group)
                if attempt is not None:
                    attempt.receive(message, worker.channel.post)
            case Load():
                worker.load = message

    # -- rollouts --------------------------------------------------------------------------------------------------------

    def pause(self, is_paused: bool) -> None:
        """Stops the workers' new sampling requests until called with False."""
        self._is_paused = is_paused
        for worker in self._workers:
            worker.channel.post(Pause(is_paused))

    @property
    def statistics(self) -> PoolStatistics:
        return PoolStatistics(
            workers=tuple(
                WorkerStatistics(worker.process.pid, len(worker.attempts), worker.members, worker.load)
                for worker in self._workers
            ),
            deaths=self._deaths.count,
            replayed=self._replayed,
        )

    @property
    def gates(self) -> list[GateStatistics]:
        """Last reported gate statistics of the workers."""
        return [worker.load.gate for worker in self.statistics.workers if worker.load is not None]

    @property
    def gone(self) -> TokenUsage:
        """Usage of exited workers, as last reported."""
        return self._gone

    def metrics(self) -> dict[str, float]:
        """By metric name; worker values are the last reported ones."""
        statistics = self.statistics
        loads = [worker.load for worker in statistics.workers if worker.load is not None]
        return {
            "rollout/processes": float(len(statistics.workers)),
            "rollout/worker_deaths": float(statistics.deaths),
            "rollout/replayed_episodes": float(statistics.replayed),
            "rollout/worker_cpu": max((load.pulse.cpu for load in loads), default=0.0),
            "rollout/worker_lag_p99": max((load.pulse.lag_p99 for load in loads), default=0.0),
        }

    async def play(self, task: GroupTask, policy: GroupPolicy, finished: Finished) -> None:
        """Rolls out a group on the least busy worker; see :class:`GroupPlayer`.

        Each call of ``finished`` runs in its own task. The question's metadata is not sent.

        Raises, within an exception group if several occur:
            ServiceError: workers died too often, or the pool was closed.
            SearchError: a fatal one.
            ConfigurationError: the policy cannot be sent to workers.
            RuntimeError: a bug in a worker.
        """
        if not isinstance(policy, TinkerPolicy):
            raise ConfigurationError(
                f"a {type(policy).__name__} cannot be sent to rollout workers: only policies of a Tinker sampling client "
                "can; use workers=1"
            )
        while True:
            left = await self._attempt(await self._free_worker(), task, policy.sampler, finished)
            if not left:
                return
            self._replayed += len(left)
            seed = None if task.seed is None else (task.seed + SEED_OFFSET) % 2**31
            task = replace(task, members=left, seed=seed)

    async def _free_worker(self) -> WorkerProcess:
        """The least busy worker; waits if there is none."""
        while True:
            if self._failure is not None:
                raise self._failure
            if self._tasks is None:
                raise ServiceError("the worker pool is not open")
            if self._workers:
                break
            await self._changed.wait()
        return min(self._workers, key=lambda worker: worker.members)

    async def _attempt(
        self, worker: WorkerProcess, task: GroupTask, sampler: Sampler, finished: Finished
    ) -> tuple[int, ...]:
        """Rolls out on one worker; returns the members unfinished when it died."""
        channel = worker.channel
        number = next(self._attempt_numbers)
        left = task.members
        async with anyio.create_task_group() as tasks:
            attempt = Attempt(task, self._search, finished, tasks)
            worker.attempts[number] = attempt
            try:
                # Metadata is arbitrary user data that episodes do not need.
                question = replace(task.question, metadata={})
                with suppress(ChannelClosedError):  # then the attempt is lost
                    await channel.send(Play(number, replace(task, question=question), sampler))
                if worker in self._workers:
                    await attempt.over()
                left = tuple(attempt.left)
            except BaseException:
                channel.post(Cancel(number))
                raise
            finally:
                del worker.attempts[number]
        return left
