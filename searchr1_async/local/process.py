"""Runs the embedded service as a child process.

The child reads its key and settings as one JSON line from stdin and writes one JSON line to stdout when ready. Its stdin
stays open: when it closes, however the parent died, the child exits.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import random
import secrets
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from anyio.abc import Process

from searchr1_async.boundary.waits import Notify, bounded_wait, notify_nobody
from searchr1_async.errors import ConfigurationError, ModelError, PortInUseError, ServiceError, ServiceStartError
from searchr1_async.local.model_files import DEFAULT_MODEL

logger = logging.getLogger(__name__)

CHILD_FLAG = "--child"
REFUSALS = {"model": ModelError, "port": PortInUseError, "configuration": ConfigurationError}
"""Errors that the child reports by name."""
_HOST = "127.0.0.1"
_STOP_SECONDS = 5.0
_LOG_LINES = 20


@dataclass(frozen=True)
class LocalService:
    """A running service. Pass ``url`` and ``api_key`` to ``tinker.ServiceClient``."""

    url: str
    api_key: str = field(repr=False)
    model_name: str
    """The ``base_model`` it serves."""
    tokenizer_path: str
    """A local folder or hub name for ``AutoTokenizer.from_pretrained``; empty if there is no tokenizer."""
    pid: int


@dataclass(frozen=True, slots=True)
class Latency:
    """Latency of one sample: ``max(floor, prompt * prefill + tokens * decode) * lognormal(jitter)`` seconds.

    Drawn per continuation; a request takes as long as its slowest one.
    """

    prefill: float = 0.0
    """Seconds per prompt token."""
    decode: float = 0.0
    """Seconds per new token."""
    floor: float = 0.0
    """Minimum seconds, before jitter."""
    jitter: float = 0.0
    """Sigma of the lognormal factor; its median is 1."""

    def draw(self, prompt_tokens: int, new_tokens: int, chance: random.Random) -> float:
        seconds = max(self.floor, prompt_tokens * self.prefill + new_tokens * self.decode)
        return seconds * math.exp(chance.gauss(0.0, self.jitter)) if self.jitter else seconds


@dataclass(frozen=True, slots=True)
class TrainingTimes:
    """Durations in seconds on the training device, which runs one call at a time."""

    per_token: float = 0.0
    """Forward and backward of one token; forward alone takes a third."""
    optim_step: float = 0.0
    save: float = 0.0
    """Export or snapshot."""


@dataclass(frozen=True, slots=True)
class Scripted:
    """A reply function instead of a model: see :class:`~searchr1_async.local.scripted_backend.ScriptedBackend`."""

    reply: str
    """``package.module:function``, importable in the child."""
    latency: Mapping[str, float] = field(default_factory=dict)
    """Fields of :class:`Latency`."""
    training: Mapping[str, float] = field(default_factory=dict)
    """Fields of :class:`TrainingTimes`."""
    max_concurrent: int = 1 << 20
    seed: int = 0
    tokenizer_path: str = ""
    latency_log: str | None = None
    """File to which all requests are written as JSON Lines of :class:`Served` when the service ends."""


@dataclass(frozen=True, slots=True)
class TimedReply:
    """A script's reply with an explicit latency and a label for the log."""

    content: list[int] | str
    """New tokens, or text."""
    seconds: float | None = None
    """None draws it from the latency model."""
    label: str = ""
    """Only written to the log."""


@dataclass(frozen=True, slots=True)
class ServedSequence:
    label: str
    seconds: float
    """Its own latency; the request takes as long as its slowest sequence."""
    tokens: int
    """New tokens."""


@dataclass(frozen=True, slots=True)
class Served:
    """A request of the log."""

    kind: str
    """``sample``, ``forward_backward``, ``forward``, ``optim_step``, ``snapshot`` (weights for sampling), ``export``
    (a checkpoint), ``import`` or ``create``."""
    began: float
    """Start, in :func:`time.monotonic` seconds (shared by all processes of a machine on Linux)."""
    seconds: float
    version: int
    """Optimizer steps of the weights sampled from or saved, or of those before the training call."""
    tokens: int = 0
    """Prompt tokens, or tokens of all examples."""
    examples: int = 0
    sequences: tuple[ServedSequence, ...] = ()

    @property
    def ended(self) -> float:
        """When its result was ready, unless cancelled."""
        return self.began + self.seconds


@asynccontextmanager
async def local_service(
    model: str = DEFAULT_MODEL,
    *,
    folder: Path,
    port: int = 0,
    threads: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    scripted: Scripted | None = None,
    start_timeout: float = 120.0,
    log_path: Path | None = None,
    options: Mapping[str, Any] | None = None,
    backend_options: Mapping[str, Any] | None = None,
    notify: Notify = notify_nobody,
) -> AsyncIterator[LocalService]:
    """Runs the embedded service out-of-process until the block exits.

    Args:
        model: a folder or hub name; with ``scripted`` only a name.
        folder: keeps the checkpoints, across processes.
        port: 0 picks a free one.
        threads: the model's compute threads; None: all processors.
        start_timeout: seconds.
        log_path: the child's log; default ``<folder>/service.log``.
        options: fields of :class:`~searchr1_async.local.server.ServiceOptions`.
        backend_options: further arguments of ``TorchBackend.load``.
        notify: receives a message if the start takes over 5 seconds.

    Raises:
        ModelError, PortInUseError, ConfigurationError: a setting is invalid.
        ServiceStartError: the service did not start within ``start_timeout``.
        ServiceError: in an exception group, if the service dies later.
    """
    if threads is not None and threads < 1:
        raise ConfigurationError(f"threads: must be at least 1, got {threads}")
    settings = {
        "model": model,
        "folder": str(folder),
        "port": port,
        "threads": threads,
        "dtype": dtype,
        "device": device,
    }
    settings["scripted"] = None if scripted is None else asdict(scripted)
    settings |= {"options": dict(options or {}), "backend_options": dict(backend_options or {})}
    async with _started(settings, log_path or folder / "service.log", start_timeout, notify) as service:
        yield service


@asynccontextmanager
async def _started(
    settings: dict[str, Any], log_path: Path, start_timeout: float, notify: Notify
) -> AsyncIterator[LocalService]:
    api_key = f"tml-local-{secrets.token_hex(16)}"
    settings |= {"api_key": api_key, "parent": os.getpid()}
    async with _child(log_path, settings["threads"]) as process:
        try:
            with bounded_wait(f"the embedded service is loading {settings['model']}", notify, start_timeout):
                ready = await _handshake(process, settings, log_path)
        except TimeoutError:
            limit = f"within {start_timeout:g} s"
            raise ServiceStartError(f"the embedded service did not start {limit}; {_tail(log_path)}") from None
        logger.info("the embedded service is serving %s at %s (pid %d)", ready["model_name"], ready["url"], process.pid)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_raise_when_ended, process, log_path)
            yield LocalService(ready["url"], api_key, ready["model_name"], ready["tokenizer_path"], process.pid)
            tasks.cancel_scope.cancel()


async def _raise_when_ended(process: Process, log_path: Path) -> None:
    """Ends the block with an error: the SDK would retry a dead service forever."""
    code = await process.wait()
    raise ServiceError(f"the embedded service exited unexpectedly (exit code {code}); {_tail(log_path)}")


def thread_settings(threads: int | None) -> dict[str, str]:
    """Environment variables of a process with this many compute threads, to be set before it imports torch; None: one per core."""
    settings = {"OMP_NUM_THREADS": str(threads or os.cpu_count() or 1)}
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        # Between two products a waiting thread spins for some 30 µs: to wake it would take as long as a product of one row.
        settings["GOMP_SPINCOUNT"] = "3000"
    return settings


@asynccontextmanager
async def _child(log_path: Path, threads: int | None) -> AsyncIterator[Process]:
    """The child process; always ended when the block exits."""
    package = str(Path(__file__).parents[2])
    path = [entry for entry in sys.path if entry and isinstance(entry, str)]  # imports ignore a Path in it
    environment = {
        **os.environ,
        **thread_settings(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(path if package in path else [package, *path]),
    }
    try:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log = log_path.open("ab")
    except OSError as error:
        raise ServiceStartError(f"cannot write the service's log {log_path}: {error}") from error
    with log:
        process = await anyio.open_process(
            # -P: sys.path is the parent's, without the current folder.
            [sys.executable, "-P", "-m", "searchr1_async.local", CHILD_FLAG],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            # Ctrl-C signals the whole process group, but the parent decides when this child ends.
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with anyio.CancelScope(shield=True):
            await _stop(process)


async def _stop(process: Process) -> None:
    """Stops and reaps the child; kills it if it takes too long."""
    assert process.stdin is not None
    # By closing stdin: the child ignores SIGTERM, which schedulers send to all processes of a job.
    await process.stdin.aclose()
    with anyio.move_on_after(_STOP_SECONDS) as scope:
        await process.wait()
    if scope.cancelled_caught:
        logger.warning("the embedded service (pid %d) did not exit within %g s: killing it", process.pid, _STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    await process.aclose()


async def _handshake(process: Process, settings: Mapping[str, Any], log_path: Path) -> Mapping[str, Any]:
    """Sends the settings; returns the child's ready line, or raises what the child could not start for."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(anyio.BrokenResourceError):
        await process.stdin.send(json.dumps(settings).encode() + b"\n")
    received = b""
    try:
        while b"\n" not in received:
            received += await process.stdout.receive()
        ready = json.loads(received.partition(b"\n")[0])
    except (anyio.EndOfStream, anyio.BrokenResourceError, ValueError):
        raise ServiceStartError(f"the embedded service exited during startup; {_tail(log_path)}") from None
    if "error" not in ready:
        return ready
    refusal = REFUSALS.get(ready.get("kind", ""))
    if refusal is not None:
        raise refusal(ready["error"])
    raise ServiceStartError(f"the embedded service could not start: {ready['error']}; {_tail(log_path)}")


def _tail(log_path: Path) -> str:
    try:
        lines = log_path.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    except OSError:
        lines = []
    return f"end of its log {log_path}:\n" + "\n".join(lines or ["(empty)"])


def listener_at(port: int) -> socket.socket:
    """A socket bound to this port of the loopback interface; 0 is a free one.

    Raises :class:`PortInUseError`, or :class:`ConfigurationError` for an invalid port.
    """
    if not 0 <= port <= 65535:
        raise ConfigurationError(f"port: must be between 0 and 65535, got {port}")
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # Reuse a port whose server has just exited; a port in use still fails to bind.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((_HOST, port))
    except OSError as error:
        listener.close()
        raise PortInUseError(
            f"port {port} on {_HOST} cannot be used ({error.strerror}): choose another, or 0 for a free one"
        ) from None
    return listener
