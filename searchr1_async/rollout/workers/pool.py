"""Pool of rollout workers: each group goes to the least busy one; unfinished members of a dead worker are retried.

One attempt to roll out a group on a worker.

Starts a worker process, and ends it reliably.

Limit on worker deaths. Pure.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import anyio
from anyio.abc import Process, TaskGroup, TaskStatus

from searchr1_async import errors
from searchr1_async.billing import TokenUsage
from searchr1_async.episodes.play import SearchTool
from searchr1_async.episodes.types import Episode
from searchr1_async.errors import ConfigurationError, SearchError, ServiceError, ungrouped
from searchr1_async.rollout.gate import GateStatistics
from searchr1_async.rollout.player import Finished, GroupPolicy, GroupTask
from searchr1_async.rollout.workers.messages import (
    Cancel,
    CannotStart,
    Channel,
    ChannelClosedError,
    Ended,
    Found,
    FromWorker,
    Load,
    Pause,
    Play,
    Played,
    Ready,
    SearchAsked,
    SearchFailed,
    Setup,
    Stop,
    ToWorker,
    WorkerSpec,
)
from searchr1_async.rollout.workers.transfer import PolicyBook, Sendable, Shared, Unpacker

Reply = Callable[[Found | SearchFailed], None]
"""Answers a search without waiting."""


class Attempt:
    """Pool side of a running group. Searches and ``finished`` run in the caller's task group."""

    def __init__(self, number: int, task: GroupTask, search: SearchTool, finished: Finished, tasks: TaskGroup) -> None:
        self.number = number
        self.left = dict.fromkeys(task.members)
        """Unfinished members, in order."""
        self.is_lost = False
        self._search = search
        self._finished = finished
        self._tasks = tasks
        self._unpacker = Unpacker(task.question)
        self._over = anyio.Event()
        self._failure: str | None = None

    async def over(self) -> None:
        """Returns when the group has ended or its worker is gone.

        Raises:
            RuntimeError: a bug in the worker.
        """
        await self._over.wait()
        if self._failure is not None or (self.left and not self.is_lost):
            raise RuntimeError(f"a rollout worker failed: {self._failure or 'a member is missing'}")

    def lose(self) -> None:
        self.is_lost = True
        self._over.set()

    def receive(self, message: Played | Ended | SearchAsked, reply: Reply) -> None:
        """Handles a message about this group without waiting."""
        match message:
            case SearchAsked():
                self._tasks.start_soon(self._answer, message, reply)
            case Played() if message.member in self.left:
                del self.left[message.member]
                self._tasks.start_soon(self._deliver, message.member, self._unpacker.unpack(message))
            case Ended():
                self._failure = message.failure
                self._over.set()

    async def _deliver(self, member: int, episode: Episode) -> None:
        await self._finished(member, episode)

    async def _answer(self, asked: SearchAsked, reply: Reply) -> None:
        """Runs a search; a fatal error ends the group."""
        try:
            found = await self._search(asked.queries)
        except SearchError as error:
            if error.is_fatal:
                raise
            reply(SearchFailed(self.number, asked.search, _kind(error), str(error), error.is_fatal))
            return
        results = tuple(tuple(passages) for passages in found)
        self._unpacker.found[asked.search] = results
        reply(Found(self.number, asked.search, results))


def _kind(error: SearchError) -> str:
    """Name of the nearest error class that the other side knows."""
    names = (kind.__name__ for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)
    return next(names, SearchError.__name__)


logger = logging.getLogger(__name__)

_CHILD = Path(__file__).with_name("entrypoint.py")
STOP_SECONDS = 5.0
"""Time for a worker to cancel its samples and exit before it is killed."""


@dataclass(frozen=True, slots=True)
class Launched:
    process: Process
    channel: Channel[ToWorker, FromWorker]


async def launch(spec: WorkerSpec, *, deadline: float, load_seconds: float, log_path: Path | None) -> Launched:
    """Starts a worker in a fresh interpreter.

    Not a ``multiprocessing`` child, which would re-run ``__main__``: notebooks have none, and scripts without
    ``if __name__ == "__main__"`` break. Its standard input and output are detached; logs go to ``log_path`` or this process's
    standard error.

    Raises:
        ServiceError: it failed to start within ``deadline`` seconds.
    """
    if os.name != "posix":
        raise ServiceError("rollout workers need UNIX sockets, which this system lacks: use workers=1")
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = await _start(theirs, log_path)
        except OSError as error:
            ours.close()
            raise ServiceError(f"cannot start a rollout worker: {error}") from error
    launched = None
    try:
        channel: Channel[ToWorker, FromWorker] = await Channel.over(ours)
        launched = Launched(process, channel)
        with anyio.fail_after(deadline):
            await channel.send(Setup(spec, load_seconds))
            answer = await channel.receive()
        if isinstance(answer, Ready):
            return launched
        problem = answer.message if isinstance(answer, CannotStart) else f"unexpected message {type(answer).__name__}"
        raise ServiceError(f"a rollout worker failed to start: {problem}")
    except TimeoutError:
        await end(launched or process)
        raise ServiceError(f"a rollout worker did not start within {deadline:g} s{_where(log_path)}") from None
    except ChannelClosedError:
        await end(launched or process)
        raise ServiceError(
            f"a rollout worker exited during startup (exit code {process.returncode}){_where(log_path)}"
        ) from None
    except BaseException:
        await end(launched or process)
        raise


async def _start(theirs: socket.socket, log_path: Path | None) -> Process:
    log = None
    if log_path is not None:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log = log_path.open("ab")
    environment = {
        # Workers do no multithreaded computation, and tokenizer threads would compete with the other workers.
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Silences the warning that torch is missing.
        "TRANSFORMERS_VERBOSITY": "error",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
    }
    with log or contextlib.nullcontext():
        return await anyio.open_process(
            # -P keeps this folder, whose module names are common, off the path.
            [sys.executable, "-P", str(_CHILD), str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=log or 2,
            stderr=log,
            env=environment,
            pass_fds=[theirs.fileno()],
        )


def _where(log_path: Path | None) -> str:
    return "; see its standard error" if log_path is None else f"; see {log_path}"


async def end(worker: Launched | Process) -> int | None:
    """Ends a worker in any state and reaps it; returns its exit code. Shielded from cancellation."""
    process = worker.process if isinstance(worker, Launched) else worker
    with anyio.CancelScope(shield=True):
        if isinstance(worker, Launched):
            worker.channel.post(Stop())
            worker.channel.close()
            with anyio.move_on_after(STOP_SECONDS) as patience:
                await process.wait()
            if patience.cancelled_caught:
                logger.warning("rollout worker %d did not exit within %g s: killing it", process.pid, STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await process.aclose()
    return process.returncode


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


START_SECONDS = 120.0
"""Timeout for a worker's start, which normally takes about 3 s."""
LOAD_SECONDS = 1.0
"""Seconds between load reports of a worker."""
SILENT_SECONDS = 300.0
"""Seconds without a load report after which a worker counts as hung and is killed. Long, since this process may be suspended
too (a sleeping laptop)."""
SEED_OFFSET = 1_000_003
"""Added to a group's seed per retry: the same seed with fewer members would repeat samples of finished members."""


@dataclass(eq=False, slots=True)
class Worker:
    number: int
    launched: Launched
    attempts: dict[int, Attempt] = field(default_factory=dict)
    load: Load | None = None

    @property
    def members(self) -> int:
        """Episodes in progress."""
        return sum(len(attempt.left) for attempt in self.attempts.values())


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
        count: initial number of workers; :meth:`add_worker` adds more.
        start_timeout: seconds for a worker to start.
        log_path: log file of the workers; None is this process's standard error.
        deaths: tolerance for worker deaths.

    Raises, when entered:
        ServiceError: a worker did not start.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        search: SearchTool,
        *,
        count: int = 1,
        start_timeout: float = START_SECONDS,
        log_path: Path | None = None,
        deaths: DeathRecord | None = None,
    ) -> None:
        if count < 0:
            raise ConfigurationError(f"{count} workers: the number must be 0 or more")
        self._spec = spec
        self._search = search
        self._count = count
        self._start_timeout = start_timeout
        self._log_path = log_path
        self._deaths = deaths or DeathRecord()
        self._replayed = 0
        self._is_paused = False
        self._gone = TokenUsage()
        self._policies = PolicyBook()
        self._workers: dict[int, Worker] = {}
        self._worker_numbers, self._attempt_numbers = itertools.count(), itertools.count()
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
                        starting.start_soon(self.add_worker)
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

    async def add_worker(self) -> None:
        """Starts a worker and waits until it is ready.

        Raises:
            ServiceError: it did not start, or the pool is closed.
        """
        if self._tasks is None:
            raise ServiceError("the worker pool is not open")
        await self._tasks.start(self._bring_up)

    async def _bring_up(self, *, task_status: TaskStatus[None]) -> None:
        worker = await self._start()
        self._workers[worker.number] = worker
        task_status.started()
        await self._attend(worker)

    async def _start(self) -> Worker:
        launched = await launch(
            self._spec, deadline=self._start_timeout, load_seconds=LOAD_SECONDS, log_path=self._log_path
        )
        return Worker(next(self._worker_numbers), launched)

    async def _attend(self, worker: Worker) -> None:
        """Serves one worker and its replacements; ends the process when cancelled."""
        while True:
            self._workers[worker.number] = worker
            if self._is_paused:
                worker.launched.channel.post(Pause(True))
            self._notify_change()
            lost = 0
            try:
                await self._listen(worker)
            finally:
                del self._workers[worker.number]
                if worker.load is not None:
                    self._gone += worker.load.gate.usage
                self._policies.forget(worker.number)
                lost = len(worker.attempts)
                for attempt in worker.attempts.values():
                    attempt.lose()
                # If cancelled, it is still alive; else it has closed its channel and is exiting.
                code = await end(worker.launched)
            logger.warning(
                "rollout worker %d died (exit code %s) with %d groups in progress; rolling them out again",
                worker.launched.process.pid,
                code,
                lost,
            )
            replacement = await self._replace(code)
            if replacement is None:
                return
            worker = replacement

    async def _replace(self, code: int | None) -> Worker | None:
        cause: ServiceError | None = None
        while not self._deaths.is_too_many(time.monotonic()):
            try:
                return await self._start()
            except ServiceError as error:
                cause = error
                logger.warning("%s", error)
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

    async def _listen(self, worker: Worker) -> None:
        """Returns when the worker is gone."""
        channel = worker.launched.channel
        with suppress(ChannelClosedError, TimeoutError):
            while True:
                with anyio.fail_after(SILENT_SECONDS):
                    message = await channel.receive()
                self._take(worker, message)

    def _take(self, worker: Worker, message: FromWorker) -> None:
        match message:
            case SearchAsked() | Played() | Ended():
                # Messages of a group cancelled here may still arrive.
                attempt = worker.attempts.get(message.group)
                if attempt is not None:
                    attempt.receive(message, worker.launched.channel.post)
            case Load():
                worker.load = message

    # -- rollouts --------------------------------------------------------------------------------------------------------

    def pause(self, is_paused: bool) -> None:
        """Stops the workers' new sampling requests until called with False."""
        self._is_paused = is_paused
        for worker in self._workers.values():
            worker.launched.channel.post(Pause(is_paused))

    @staticmethod
    def can_play(policy: GroupPolicy) -> bool:
        """Whether a policy can be sent to workers."""
        return isinstance(policy, Sendable)

    @property
    def least_members(self) -> int | None:
        """Episodes in progress at the least busy worker; None if there is none."""
        return min((worker.members for worker in self._workers.values()), default=None)

    @property
    def statistics(self) -> PoolStatistics:
        return PoolStatistics(
            workers=tuple(
                WorkerStatistics(worker.launched.process.pid, len(worker.attempts), worker.members, worker.load)
                for worker in self._workers.values()
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
        shared = self._policies.begin(policy)
        try:
            while True:
                worker = await self._free_worker()
                left = await self._attempt(worker, task, shared, finished)
                if not left:
                    return
                self._replayed += len(left)
                seed = None if task.seed is None else (task.seed + SEED_OFFSET) % 2**31
                task = replace(task, members=left, seed=seed)
        finally:
            for number, messages in self._policies.end(shared).items():
                for message in messages:
                    self._workers[number].launched.channel.post(message)

    async def _free_worker(self) -> Worker:
        """The least busy worker; waits if there is none."""
        while True:
            if self._failure is not None:
                raise self._failure
            if self._tasks is None:
                raise ServiceError("the worker pool is not open")
            if self._workers:
                break
            await self._changed.wait()
        return min(self._workers.values(), key=lambda worker: worker.members)

    async def _attempt(self, worker: Worker, task: GroupTask, shared: Shared, finished: Finished) -> tuple[int, ...]:
        """Rolls out on one worker; returns the members unfinished when it died."""
        channel = worker.launched.channel
        number = next(self._attempt_numbers)
        left = task.members
        async with anyio.create_task_group() as tasks:
            attempt = Attempt(number, task, self._search, finished, tasks)
            worker.attempts[number] = attempt
            try:
                for message in self._policies.introduce(worker.number, shared):
                    channel.post(message)
                # Metadata is arbitrary user data that episodes do not need.
                question = replace(task.question, metadata={})
                with suppress(ChannelClosedError):  # then the attempt is lost
                    await channel.send(Play(number, replace(task, question=question), shared.number))
                if worker.number in self._workers:
                    await attempt.over()
                left = tuple(attempt.left)
            except BaseException:
                channel.post(Cancel(number))
                raise
            finally:
                del worker.attempts[number]
        return left
