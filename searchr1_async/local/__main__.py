"""``python -m searchr1_async.local``: the standalone embedded Tinker service, for any client of the protocol.

With ``--child`` it serves :mod:`searchr1_async.local.process`, its parent.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import logging
import os
import secrets
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from searchr1_async.boundary.paths import path_argument, raise_limit
from searchr1_async.errors import ConfigurationError, SearchR1Error
from searchr1_async.local.backend import Backend
from searchr1_async.local.model_files import DEFAULT_MODEL
from searchr1_async.local.process import CHILD_FLAG, REFUSALS, listener_at, thread_settings

_FORCED_EXIT_SECONDS = 4.0
_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def main() -> int:
    """Runs the service until SIGTERM or SIGINT, or for a parent until that closes stdin or dies."""
    arguments = _parser().parse_args()
    if not arguments.child:
        return _run_standalone(arguments)
    status = _serve_parent()
    logging.shutdown()
    sys.stderr.flush()
    # Everything is closed; a normal interpreter exit with torch loaded takes a second.
    os._exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m searchr1_async.local", description="The embedded Tinker service.")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a folder or a hub name (default: %(default)s)")
    parser.add_argument(
        "--folder", type=path_argument, default="runs/service", help="folder for checkpoints (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=0, help="port (default: a free one)")
    parser.add_argument("--threads", type=int, help="compute threads of the model (default: all processors)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--scripted", metavar="MODULE:FUNCTION", help="reply from a function instead of a model")
    parser.add_argument(CHILD_FLAG, action="store_true", help=argparse.SUPPRESS)
    return parser


def _run_standalone(arguments: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT)
    given_key = os.environ.get("TINKER_API_KEY")
    api_key = given_key or f"tml-local-{secrets.token_hex(16)}"
    settings = vars(arguments) | {"api_key": api_key, "options": {}, "backend_options": {}}
    if arguments.scripted:
        settings["scripted"] = {"reply": arguments.scripted}
    os.environ.update(thread_settings(arguments.threads))

    def ready(fields: Mapping[str, Any]) -> None:
        key = ": the current value of $TINKER_API_KEY" if given_key else f"={api_key}"
        print(f"Serving {fields['model_name']} at {fields['url']}")
        print("To use it from any tinker client:")
        print(f"  export TINKER_BASE_URL={fields['url']}")
        print(f"  {'' if given_key else 'export '}TINKER_API_KEY{key}")
        print("Press Ctrl-C to stop.", flush=True)

    try:
        asyncio.run(_serve(settings, ready, asyncio.Event(), (signal.SIGINT, signal.SIGTERM)))
    except SearchR1Error as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _serve_parent() -> int:
    # Reserve the real stdout for the ready line: anything libraries print goes to the log.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Ctrl-C and a scheduler's SIGTERM reach all processes, but the parent decides when this one exits.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT)
    line = sys.stdin.buffer.readline()
    if not line:
        return 1
    settings = json.loads(line)

    def ready(fields: Mapping[str, Any]) -> None:
        print(json.dumps(dict(fields)), file=answers, flush=True)

    async def run() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        watcher = threading.Thread(
            target=_watch_parent, args=(settings["parent"], lambda: loop.call_soon_threadsafe(stop.set)), daemon=True
        )
        watcher.start()
        await _serve(settings, ready, stop, ())

    try:
        asyncio.run(run())
    except Exception as error:
        traceback.print_exc()
        kind = next((name for name, refusal in REFUSALS.items() if isinstance(error, refusal)), "other")
        ready({"error": str(error) or type(error).__name__, "kind": kind})
        return 2
    return 0


def _watch_parent(parent: int, stop: Callable[[], object]) -> None:
    """Blocks until the parent is gone, then stops the service; exits the process if that takes too long.

    Stdin closes when the parent dies, but the parent id is checked too, since a sibling may have inherited the pipe.
    """
    while os.getppid() == parent:
        readable, _, _ = select.select([0], [], [], 1.0)
        if readable and not os.read(0, 4096):
            break
    try:
        stop()
    finally:
        threading.Event().wait(_FORCED_EXIT_SECONDS)
        os._exit(1)


async def _serve(
    settings: Mapping[str, Any],
    ready: Callable[[Mapping[str, Any]], None],
    stop: asyncio.Event,
    signals: tuple[signal.Signals, ...],
) -> None:
    from searchr1_async.local.checkpoint_files import CheckpointStore
    from searchr1_async.local.server import ServiceOptions, serve

    raise_limit()
    loop = asyncio.get_running_loop()
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    # Before the slow model load, so that these fail fast.
    listener = listener_at(settings["port"])
    checkpoints = CheckpointStore(Path(settings["folder"]) / "checkpoints")
    options = ServiceOptions(**settings["options"])
    backend = await _until(stop, asyncio.to_thread(_load_backend, settings))
    try:
        async with serve(
            backend, checkpoints=checkpoints, api_key=settings["api_key"], listener=listener, options=options
        ) as url:
            ready({"url": url, "model_name": backend.model_name, "tokenizer_path": backend.tokenizer_path})
            await stop.wait()
    finally:
        backend.close()


async def _until(stop: asyncio.Event, loading: Any) -> Any:
    """Awaits the backend; exits the process if the service is stopped while loading."""
    task = asyncio.ensure_future(loading)
    stopped = asyncio.ensure_future(stop.wait())
    await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not task.done():
        # A thread cannot be stopped, only the process can.
        logging.shutdown()
        os._exit(1)
    return task.result()


def _load_backend(settings: Mapping[str, Any]) -> Backend:
    scripted = settings["scripted"]
    if scripted:
        return _load_script(settings["model"], scripted)
    from searchr1_async.local.torch_backend import TorchBackend

    return TorchBackend.load(
        settings["model"],
        threads=settings["threads"],
        dtype=settings["dtype"],
        device=settings["device"],
        **settings["backend_options"],
    )


def _load_script(model: str, fields: Mapping[str, Any]) -> Backend:
    """Raises :class:`ConfigurationError` if the reply function cannot be found."""
    from searchr1_async.local.process import Latency, TrainingTimes
    from searchr1_async.local.scripted_backend import ScriptedBackend

    module, _, name = fields["reply"].partition(":")
    try:
        reply = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"cannot find the reply function {fields['reply']!r}: {error}") from error
    log = fields.get("latency_log")
    return ScriptedBackend(
        reply,
        model_name=model,
        tokenizer_path=fields.get("tokenizer_path", ""),
        latency=Latency(**fields.get("latency", {})),
        training=TrainingTimes(**fields.get("training", {})),
        max_concurrent=fields.get("max_concurrent", 1 << 20),
        seed=fields.get("seed", 0),
        latency_log=None if log is None else Path(log),
    )


if __name__ == "__main__":
    sys.exit(main())
