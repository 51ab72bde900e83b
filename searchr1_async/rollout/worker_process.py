"""One worker of a pool, seen from the pool: its process, its channel, and its attempts to roll out groups.

Ending a process is shielded from cancellation: none outlives the pool.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import anyio
from anyio.abc import Process, TaskGroup

import searchr1_async.errors as errors
from searchr1_async.episodes.play import SearchTool
from searchr1_async.errors import SearchError, ServiceError
from searchr1_async.rollout.messages import (
    Channel,
    ChannelClosedError,
    Ended,
    Found,
    FromWorker,
    Load,
    Played,
    SearchAsked,
    SearchFailed,
    Setup,
    Started,
    ToWorker,
    Unpacker,
    WorkerSpec,
)
from searchr1_async.rollout.player import Finished, GroupTask

logger = logging.getLogger(__name__)

_CHILD = Path(__file__).with_name("worker_entrypoint.py")
START_SECONDS = 120.0
"""Timeout for a worker's start, which normally takes about 3 s."""
STOP_SECONDS = 5.0
"""Time for a worker to cancel its samples and exit before it is killed."""
LOAD_SECONDS = 1.0
"""Seconds between load reports of a worker."""
HAS_WORKERS = os.name == "posix"
"""This system has what the channel of a worker needs."""
Reply = Callable[[Found | SearchFailed], None]
"""Answers a search without waiting."""


class Attempt:
    """Pool side of a running group. Searches and ``finished`` run in the caller's task group."""

    def __init__(self, task: GroupTask, search: SearchTool, finished: Finished, tasks: TaskGroup) -> None:
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
                self._tasks.start_soon(self._finished, message.member, self._unpacker.unpack(message))
            case Ended():
                self._failure = message.failure
                self._over.set()

    async def _answer(self, asked: SearchAsked, reply: Reply) -> None:
        """Runs a search; a fatal error ends the group."""
        try:
            found = await self._search(asked.queries)
        except SearchError as error:
            if error.is_fatal:
                raise
            reply(SearchFailed(asked.search, _kind(error), str(error), error.is_fatal))
            return
        results = tuple(tuple(passages) for passages in found)
        self._unpacker.found[asked.search] = results
        reply(Found(asked.search, results))


def _kind(error: SearchError) -> str:
    """Name of the nearest error class that the other side knows."""
    names = (kind.__name__ for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)
    return next(names, SearchError.__name__)


@dataclass(eq=False, slots=True)
class WorkerProcess:
    """A running worker."""

    process: Process
    channel: Channel[ToWorker, FromWorker]
    attempts: dict[int, Attempt] = field(default_factory=dict)
    """Groups in progress, by number."""
    load: Load | None = None
    """Last report; None until the first, about a second after the start."""

    @property
    def members(self) -> int:
        """Episodes in progress."""
        return sum(len(attempt.left) for attempt in self.attempts.values())

    async def end(self) -> int | None:
        """Ends the worker in any state and reaps it; returns its exit code."""
        self.channel.close()
        with anyio.CancelScope(shield=True):
            with anyio.move_on_after(STOP_SECONDS) as patience:
                await self.process.wait()
            if patience.cancelled_caught:
                logger.warning("rollout worker %d did not exit within %g s: killing it", self.process.pid, STOP_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()
            await self.process.aclose()
        return self.process.returncode


async def launch(spec: WorkerSpec) -> WorkerProcess:
    """Starts a worker and waits until it is ready.

    Raises:
        ServiceError: it failed to start in time.
    """
    if not HAS_WORKERS:
        raise ServiceError("rollout workers need UNIX sockets, which this system lacks: use workers=1")
    ours, theirs = socket.socketpair()
    with theirs:
        channel: Channel[ToWorker, FromWorker] = await Channel.over(ours)
        try:
            worker = WorkerProcess(await _start(theirs), channel)
        except BaseException as error:
            channel.close()
            if isinstance(error, OSError):
                raise ServiceError(f"cannot start a rollout worker: {error}") from error
            raise
    try:
        with anyio.fail_after(START_SECONDS):
            await channel.send(Setup(spec, LOAD_SECONDS))
            answer = await channel.receive()
        if isinstance(answer, Started) and answer.problem is None:
            return worker
        problem = answer.problem if isinstance(answer, Started) else f"unexpected message {type(answer).__name__}"
        raise ServiceError(f"a rollout worker failed to start: {problem}")
    except BaseException as error:
        code = await worker.end()
        if isinstance(error, TimeoutError):
            problem = f"did not start within {START_SECONDS:g} s"
        elif isinstance(error, ChannelClosedError):
            problem = f"exited during startup (exit code {code})"
        else:
            raise
        raise ServiceError(f"a rollout worker {problem}; see its standard error") from None


async def _start(theirs: socket.socket) -> Process:
    """Starts the process in a fresh interpreter, with detached standard input and output.

    Not a ``multiprocessing`` child, which would re-run ``__main__``: notebooks have none, and scripts without
    ``if __name__ == "__main__"`` break.
    """
    environment = {
        # Workers do no multithreaded computation, and tokenizer threads would compete with the other workers.
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Silences the warning that torch is missing.
        "TRANSFORMERS_VERBOSITY": "error",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
    }
    return await anyio.open_process(
        # -P keeps this folder, whose module names are common, off the path.
        [sys.executable, "-P", str(_CHILD), str(theirs.fileno())],
        stdin=subprocess.DEVNULL,
        stdout=2,
        stderr=None,
        env=environment,
        pass_fds=[theirs.fileno()],
    )
