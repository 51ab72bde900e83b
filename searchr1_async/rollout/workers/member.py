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
from searchr1_async.episodes.types import Episode
from searchr1_async.errors import SearchError, ServiceError
from searchr1_async.rollout.player import Finished, GroupTask
from searchr1_async.rollout.workers.messages import (
    CannotStart,
    Channel,
    ChannelClosedError,
    Ended,
    Found,
    FromWorker,
    Load,
    Played,
    Ready,
    SearchAsked,
    SearchFailed,
    Setup,
    Stop,
    ToWorker,
    WorkerSpec,
)
from searchr1_async.rollout.workers.transfer import Unpacker

logger = logging.getLogger(__name__)

_CHILD = Path(__file__).with_name("entrypoint.py")
STOP_SECONDS = 5.0
"""Time for a worker to cancel its samples and exit before it is killed."""
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
            found = await self._search.search(asked.queries)
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


@dataclass(eq=False, slots=True)
class Member:
    number: int
    launched: Launched
    attempts: dict[int, Attempt] = field(default_factory=dict)
    load: Load | None = None

    @property
    def members(self) -> int:
        """Episodes in progress."""
        return sum(len(attempt.left) for attempt in self.attempts.values())
