"""A worker process started, and ended again whatever happens."""

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
"""For a worker to cancel its samples at the service and end; then it is killed."""


@dataclass(frozen=True, slots=True)
class Launched:
    """A worker that is up."""

    process: Process
    channel: Channel[ToWorker, FromWorker]


async def launch(spec: WorkerSpec, *, deadline: float, load_seconds: float, log_path: Path | None) -> Launched:
    """A fresh interpreter that plays.

    It is no ``multiprocessing`` child: that would run ``__main__`` again, which a notebook has not and a script without
    ``if __name__ == "__main__"`` does not survive. It has none of this process's standard input and output; what it logs goes
    to ``log_path``, or where this process's standard error goes.

    Raises:
        ServiceError: it did not come up within ``deadline`` seconds, or said why it cannot.
    """
    if os.name != "posix":
        raise ServiceError("rollout workers need a system with UNIX sockets: play with workers=1")
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = await _start(theirs, log_path)
        except OSError as error:
            ours.close()
            raise ServiceError(f"a rollout worker could not be started: {error}") from error
    launched = None
    try:
        channel: Channel[ToWorker, FromWorker] = await Channel.over(ours)
        launched = Launched(process, channel)
        with anyio.fail_after(deadline):
            await channel.send(Setup(spec, load_seconds))
            answer = await channel.receive()
        if isinstance(answer, Ready):
            return launched
        problem = answer.message if isinstance(answer, CannotStart) else "it does not keep to the order of messages"
        raise ServiceError(f"a rollout worker cannot play: {problem}")
    except TimeoutError:
        await end(launched or process)
        raise ServiceError(f"a rollout worker did not come up within {deadline:g} s{_where(log_path)}") from None
    except ChannelClosedError:
        await end(launched or process)
        raise ServiceError(
            f"a rollout worker ended while starting (exit code {process.returncode}){_where(log_path)}"
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
        # Nothing in a worker computes on several cores, and a tokenizer's threads would take those of its siblings.
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # It would tell everybody that there is no torch.
        "TRANSFORMERS_VERBOSITY": "error",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
    }
    with log or contextlib.nullcontext():
        return await anyio.open_process(
            # -P: the file's own folder, full of modules with common names, stays off the path.
            [sys.executable, "-P", str(_CHILD), str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=log or 2,
            stderr=log,
            env=environment,
            pass_fds=[theirs.fileno()],
        )


def _where(log_path: Path | None) -> str:
    return "; its standard error says why" if log_path is None else f"; see {log_path}"


async def end(worker: Launched | Process) -> int | None:
    """Ends a worker, however it is, and reaps it; returns its exit code. Not to be cancelled."""
    process = worker.process if isinstance(worker, Launched) else worker
    with anyio.CancelScope(shield=True):
        if isinstance(worker, Launched):
            worker.channel.post(Stop())
            worker.channel.close()
            with anyio.move_on_after(STOP_SECONDS) as patience:
                await process.wait()
            if patience.cancelled_caught:
                logger.warning("rollout worker %d did not end in %g s: killing it", process.pid, STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await process.aclose()
    return process.returncode
