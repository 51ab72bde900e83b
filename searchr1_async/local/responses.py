"""What the service answers: JSON bodies, errors as JSON with a message in ``detail``, and the jobs behind its promises.

A job runs backend work in a task that ends with the service, and settles its promise.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from typing import Any, TypeVar

import anyio.to_thread
from aiohttp import web
from anyio.abc import TaskGroup

from searchr1_async.errors import CheckpointError
from searchr1_async.local.backend import UserFault
from searchr1_async.local.checkpoint_files import NoSuchCheckpoint
from searchr1_async.local.promises import Failure, Promise, PromiseStore, Reply
from searchr1_async.local.protocol import MalformedRequest

logger = logging.getLogger(__name__)

_REFUSED = {
    "GET /sessions/{session}/trace_export": "the embedded service records no request traces",
    "GET /billing/usage/events": "the embedded service bills nothing: it computes on this machine",
    "GET /billing/usage/checkpoints/current": "the embedded service bills nothing: checkpoint sizes are in "
    "the listing (tinker checkpoint list)",
    "GET /audit": "the embedded service has one user and no audit log: it logs to standard error",
    "GET /auth/apikey/me": "the embedded service has one key, printed at startup: export it as "
    "TINKER_API_KEY instead of logging in",
    "DELETE /auth/apikey/me": "the embedded service's key expires when it stops: unset TINKER_API_KEY instead of logging out",
    "POST /auth/token": "the embedded service exchanges no tokens: send its key as X-API-Key",
}
"""Cloud routes that make no sense for one user on one machine, with the reason."""
Result = TypeVar("Result")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
SIGNED_ROUTE = "signed"
_WITHOUT_KEY = {"healthz", SIGNED_ROUTE}
"""Names of the routes that need no API key."""
LARGE_BYTES = 256 << 10
"""Larger bodies are encoded and decoded in a worker thread; for smaller ones the hop costs more than the work."""


class NotFound(LookupError):
    """No such session, model, sampler or promise (404)."""


class Gone(LookupError):
    """It existed but has ended (410)."""


class TooManySamples(Exception):
    """The queue is full; the client should retry later (429)."""

    def __init__(self) -> None:
        super().__init__("too many samples are queued")


_STATUSES: dict[type[Exception], int] = {
    NoSuchCheckpoint: 404,
    UserFault: 400,
    NotFound: 404,
    Gone: 410,
    CheckpointError: 422,  # not 5xx: clients would retry for minutes
    TooManySamples: 429,
}
"""Status of each error; the first class that fits."""


def json_answer(status: int = 200, /, **fields: Any) -> web.Response:
    return web.Response(status=status, body=json.dumps(fields).encode(), content_type="application/json")


def page_of(request: web.Request, items: Sequence[Any], limit: int = 20) -> tuple[list[Any], dict[str, int]]:
    """The page of a listing selected by ``limit`` and ``offset``, and its cursor.

    Raises :class:`MalformedRequest` for an invalid limit, offset or ``access_scope``.
    """
    try:
        limit, offset = int(request.query.get("limit", limit)), int(request.query.get("offset", 0))
    except ValueError:
        raise MalformedRequest("limit and offset must be integers") from None
    if limit < 0 or offset < 0:
        raise MalformedRequest(f"limit and offset must be at least 0, got {limit} and {offset}")
    scope = request.query.get("access_scope", "owned")
    if scope not in ("owned", "accessible"):
        raise MalformedRequest(f"access_scope: must be owned or accessible, not {scope!r:.80}")
    return list(items[offset : offset + limit]), {"offset": offset, "limit": limit, "total_count": len(items)}


def timestamp(seconds: float) -> str:
    """Seconds since the epoch to the protocol's ISO format."""
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def texts(metadata: Mapping[str, Any] | None) -> dict[str, str] | None:
    """User metadata in the protocol's form: all values are strings."""
    if metadata is None:
        return None
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}


def refuse_routes(app: web.Application, prefix: str) -> None:
    """Adds the routes that answer 404 with a reason."""

    def refusing(reason: str) -> Handler:
        async def refuse(request: web.Request) -> web.StreamResponse:
            raise NotFound(reason)

        return refuse

    for route, reason in _REFUSED.items():
        method, path = route.split()
        app.router.add_route(method, prefix + path, refusing(reason))


def key_check(api_key: str) -> Any:
    """Middleware: answers 401 to requests without this key, except on routes that need none."""
    expected = api_key.encode()

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("X-API-Key") or request.headers.get("Authorization", "").removeprefix("Bearer ")
        is_open = request.match_info.route.name in _WITHOUT_KEY
        if not is_open and not hmac.compare_digest(given.encode("utf-8", "replace"), expected):
            refusal = json_answer(
                401, detail="the API key is missing or wrong: this service was started with a different key"
            )
            refusal.force_close()
            return refusal
        return await handler(request)

    return check


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Middleware: turns every error into JSON with the matching status."""
    try:
        return await handler(request)
    except MalformedRequest as error:
        return json_answer(error.status, detail=str(error))
    except tuple(_STATUSES) as error:
        return json_answer(
            next(status for kind, status in _STATUSES.items() if isinstance(error, kind)), detail=str(error)
        )
    except web.HTTPNotFound:
        return json_answer(404, detail=f"the embedded service does not support {request.method} {request.path}")
    except web.HTTPException as error:
        return json_answer(error.status, detail=error.reason)
    except Exception as error:
        logger.exception("%s %s failed", request.method, request.path)
        return json_answer(500, detail=f"{type(error).__name__}: {error}")


class Jobs:
    """Runs work and settles its promises; errors go into the promise, never into the task group."""

    def __init__(self, promises: PromiseStore, tasks: TaskGroup) -> None:
        self.promises = promises
        self._tasks = tasks

    def start(self, promise: Promise, work: Callable[[], Awaitable[Reply]]) -> None:
        """Runs ``work`` in its own task; its reply or error settles the promise."""
        self._tasks.start_soon(self.run, promise, work)

    def start_loop(self, loop: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> None:
        """Starts a task that runs as long as the service and settles its promises itself."""
        self._tasks.start_soon(loop, *arguments)

    async def run(self, promise: Promise, work: Callable[[], Awaitable[Reply]]) -> None:
        """As :meth:`start`, in the caller's task. Raises only on the caller's own cancellation."""
        try:
            outcome: Reply | Failure = await work()
        except asyncio.CancelledError:
            # No effect if the client cancelled the promise: it is already settled.
            self.settle(promise, Failure("the service is shutting down", "server"))
            raise
        except Exception as error:
            outcome = failure_of(error)
        self.settle(promise, outcome)

    def settle(self, promise: Promise, outcome: Reply | Failure) -> None:
        self.promises.settle(promise, outcome, time.monotonic())


def failure_of(error: Exception) -> Failure:
    """The failure reported to the client. Unexpected errors are logged with their traceback."""
    if isinstance(error, UserFault):
        return Failure(str(error), "user")
    if isinstance(error, CheckpointError):
        logger.error("%s", error)
        return Failure(str(error), "server")
    logger.error("a request failed with an internal error", exc_info=error)
    return Failure(f"the service failed: {type(error).__name__}: {error}", "server")


async def result_of(future: Future[Result]) -> Result:
    """Awaits a backend's future; cancelling the caller cancels it.

    Raises the backend's exception, or :class:`RuntimeError` if the backend cancelled the future (it closed).
    """
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if future.cancelled() and not (task is not None and task.cancelling()):
            raise RuntimeError("the backend cancelled the request") from None
        raise


async def offload(size: int, function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls ``function`` in a worker thread if ``size`` (bytes) is large, else inline."""
    if size < LARGE_BYTES:
        return function(*arguments)
    return await anyio.to_thread.run_sync(function, *arguments)
