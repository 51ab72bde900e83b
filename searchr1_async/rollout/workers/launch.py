"""Starts a worker process, and ends it reliably."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import anyio
from anyio.abc import Process

from searchr1_async.errors import ServiceError
from searchr1_async.rollout.workers.channel import Channel, ChannelClosedError
from searchr1_async.rollout.workers.messages import CannotStart, FromWorker, Ready, Setup, Stop, ToWorker, WorkerSpec

logger = logging.getLogger(__name__)

_CHILD = Path(__file__).with_name("child.py")
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
