"""How the service replies: promises of results, kept until fetched plus a grace period; JSON bodies; errors with a ``detail``.

A request of a model or a sampler is answered at once with the id of a :class:`Promise`, which a job settles later.
:class:`PromiseStore` belongs to one event loop; nothing here is thread-safe. Its callers pass the time (monotonic seconds).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

import anyio.to_thread
from aiohttp import web
from anyio.abc import TaskGroup

from searchr1_async.errors import CheckpointError
from searchr1_async.local.backend import UserFault
from searchr1_async.local.checkpoint_files import NoSuchCheckpoint

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Handler = Callable[[web.Request], Awaitable[Any]]
"""Returns the fields of a JSON reply, None for an empty one, or a response. Errors become JSON too: :func:`as_json`."""
API = "/api/v1"
SIGNED_ROUTE = "external_weights/{run}/{name}/{file}"
_WITHOUT_KEY = {f"{API}/healthz", f"{API}/{SIGNED_ROUTE}"}
_REASONS = {
    "trace_export": "it records no request traces",
    "/billing/": "it bills nothing, since it computes on this machine; checkpoint sizes are in the listing (tinker checkpoint list)",
    "/audit": "it has one user and no audit log; it logs to standard error",
    "/auth/": "its one key was printed at its start: export it as TINKER_API_KEY instead of logging in",
}
"""Why it lacks some routes of the cloud, by a word of their path."""
_GATHER = 0.01
"""Seconds a poll waits for further results after the first: one answer for many."""
LARGE_BYTES = 256 << 10
"""Larger bodies are encoded and decoded in a worker thread; for smaller ones the hop costs more than the work."""


class MalformedRequest(Exception):
    """An unparseable body; ``status`` is 400 (not JSON or protobuf) or 422 (a field is missing or invalid)."""

    def __init__(self, detail: str, status: int = 422) -> None:
        super().__init__(detail)
        self.status = status


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


@dataclass(frozen=True, slots=True)
class Failure:
    """``{"error", "category"}`` on the wire."""

    error: str
    category: Literal["unknown", "server", "user"]


@dataclass(frozen=True, slots=True)
class Reply:
    """A serialized response: JSON or protobuf."""

    body: bytes
    content_type: str = "application/json"


@dataclass(slots=True, eq=False)
class Promise:
    """One unit of work. ``outcome`` is set once, by :meth:`PromiseStore.settle`."""

    request_id: str
    owner: str
    """The session, model or sampler that requested it."""
    key: Hashable | None
    listener: Hashable | None = None
    """Whose :meth:`PromiseStore.completions` report it; None: nobody's."""
    outcome: Reply | Failure | None = None
    on_cancel: Callable[[], Any] | None = None
    """Called when the client cancels; None: not cancellable."""
    settled_at: float = 0.0
    settled_as: int = 0
    """Its number among the settled promises of the store, from 1."""
    fetched_at: float = 0.0
    done: asyncio.Event = field(default_factory=asyncio.Event)


class PromiseStore:
    """All open and recently settled promises.

    A settled promise is dropped ``grace`` seconds after its last fetch (clients may retry a lost response), or earlier,
    oldest first, if fetched results exceed ``fetched_bytes``. A result never fetched is dropped after ``unfetched`` seconds.
    """

    def __init__(self, *, grace: float = 60.0, unfetched: float = 3600.0, fetched_bytes: int = 256 << 20) -> None:
        self.grace = grace
        self.unfetched = unfetched
        self.fetched_bytes = fetched_bytes
        self._prefix = secrets.token_hex(4)
        self._opened = self._settled = 0
        self._just_settled = asyncio.Event()
        self._by_id: dict[str, Promise] = {}
        self._by_key: dict[Hashable, Promise] = {}
        # Ordered by settled_at and fetched_at, so that sweep stops early.
        self._unfetched: dict[str, Promise] = {}
        self._fetched: dict[str, Promise] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def find(self, key: Hashable | None) -> Promise | None:
        """The promise with this idempotency key, if still kept."""
        return None if key is None else self._by_key.get(key)

    def open(self, owner: str, key: Hashable | None = None, listener: Hashable | None = None) -> Promise:
        """Opens a promise. ``key`` must be unused (see :meth:`find`)."""
        if key is not None and key in self._by_key:
            raise ValueError(f"the idempotency key {key!r} is in use")
        self._opened += 1
        promise = Promise(f"{self._prefix}-{self._opened}", owner, key, listener)
        self._by_id[promise.request_id] = promise
        if key is not None:
            self._by_key[key] = promise
        return promise

    def settle(self, promise: Promise, outcome: Reply | Failure, now: float) -> bool:
        """Sets the outcome and wakes waiters. False if it was already settled (cancelled)."""
        if promise.outcome is not None:
            return False
        promise.outcome = outcome
        promise.settled_at = now
        self._settled += 1
        promise.settled_as = self._settled
        promise.on_cancel = None
        promise.done.set()
        if promise.request_id in self._by_id:
            self._unfetched[promise.request_id] = promise
        self._just_settled.set()
        return True

    def get(self, request_id: str) -> Promise:
        """Raises :class:`Gone` if this store once had it, else :class:`NotFound`."""
        promise = self._by_id.get(request_id)
        if promise is not None:
            return promise
        prefix, _, number = request_id.partition("-")
        if prefix == self._prefix and number.isdecimal() and 0 < int(number) <= self._opened:
            raise Gone(f"the result of request {request_id!r} was fetched and is no longer kept")
        raise NotFound(f"no request {request_id!r}: unknown id, or the service was restarted")

    async def wait(self, promise: Promise, seconds: float) -> Reply | Failure | None:
        """The outcome, or None after ``seconds``."""
        if promise.outcome is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await promise.done.wait()
        return promise.outcome

    async def completions(self, listener: Hashable, cursor: int, seconds: float) -> tuple[list[Promise], int]:
        """The listener's promises that were settled after ``cursor`` (of an earlier call; 0: ever) and not fetched yet, oldest
        first, and the new cursor. Waits up to ``seconds`` for the first, and then a moment for more."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self._settled_after(listener, cursor):
                    self._just_settled.clear()
                    await self._just_settled.wait()
                await asyncio.sleep(_GATHER)
        done = self._settled_after(listener, cursor)
        # Not the newest of all: a client polls again at once where its cursor has moved.
        return done, done[-1].settled_as if done else cursor

    def _settled_after(self, listener: Hashable, cursor: int) -> list[Promise]:
        newest_first = itertools.takewhile(lambda each: each.settled_as > cursor, reversed(self._unfetched.values()))
        return [promise for promise in newest_first if promise.listener == listener][::-1]

    def release(self, request_ids: Iterable[str]) -> None:
        """Drops results that the client says it has; unknown ones are ignored."""
        for request_id in request_ids:
            if request_id in self._fetched:
                self._forget(self._fetched[request_id])

    def fetched(self, promise: Promise, now: float) -> None:
        """Marks the outcome as sent to the client; it is kept for ``grace`` more seconds."""
        promise.fetched_at = now
        if self._unfetched.pop(promise.request_id, None) is not None:
            self._bytes += _size(promise)
        elif self._fetched.pop(promise.request_id, None) is None:
            return
        self._fetched[promise.request_id] = promise

    def cancel(self, promise: Promise, now: float, reason: str = "cancelled by the client") -> bool:
        """Settles an open promise as cancelled and stops its work. False if it is settled or not cancellable."""
        stop = promise.on_cancel
        if promise.outcome is not None or stop is None:
            return False
        self.settle(promise, Failure(reason, "user"), now)
        stop()
        return True

    def open_of(self, owner: str) -> Iterator[Promise]:
        return (promise for promise in list(self._by_id.values()) if promise.owner == owner and promise.outcome is None)

    def sweep(self, now: float) -> int:
        """Drops expired promises and those over the memory limit; returns how many."""
        gone: list[Promise] = []
        excess = self._bytes - self.fetched_bytes
        for promise in self._fetched.values():
            if excess <= 0 and now - promise.fetched_at < self.grace:
                break
            excess -= _size(promise)
            gone.append(promise)
        for promise in self._unfetched.values():
            if now - promise.settled_at < self.unfetched:
                break
            gone.append(promise)
        for promise in gone:
            self._forget(promise)
        return len(gone)

    def _forget(self, promise: Promise) -> None:
        del self._by_id[promise.request_id]
        if promise.key is not None:
            del self._by_key[promise.key]
        if self._unfetched.pop(promise.request_id, None) is None:
            del self._fetched[promise.request_id]
            self._bytes -= _size(promise)


def _size(promise: Promise) -> int:
    return len(promise.outcome.body) if isinstance(promise.outcome, Reply) else 0


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


def json_reply(fields: Mapping[str, Any]) -> Reply:
    return Reply(json.dumps(fields).encode())


def json_response(status: int, /, **fields: Any) -> web.Response:
    return web.Response(status=status, body=json.dumps(fields).encode(), content_type="application/json")


@web.middleware
async def as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Middleware: replies with what a handler returns or raises, as JSON with the matching status."""
    try:
        reply = await handler(request)
    except MalformedRequest as error:
        return json_response(error.status, detail=str(error))
    except tuple(_STATUSES) as error:
        status = next(status for kind, status in _STATUSES.items() if isinstance(error, kind))
        return json_response(status, detail=str(error))
    except (web.HTTPNotFound, web.HTTPMethodNotAllowed) as error:
        reason = next((f": {reason}" for word, reason in _REASONS.items() if word in request.path), "")
        refused = f"the embedded service does not support {request.method} {request.path}{reason}"
        return json_response(error.status, detail=refused)
    except web.HTTPException as error:
        return json_response(error.status, detail=error.reason)
    except Exception as error:
        logger.exception("%s %s failed", request.method, request.path)
        return json_response(500, detail=f"{type(error).__name__}: {error}")
    if reply is None:
        return web.Response(status=204)
    return reply if isinstance(reply, web.StreamResponse) else json_response(200, **reply)


def key_check(api_key: str) -> Any:
    """Middleware: answers 401 to requests without this key, except on routes that need none."""
    expected = api_key.encode()

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> Any:
        given = request.headers.get("X-API-Key") or request.headers.get("Authorization", "").removeprefix("Bearer ")
        resource = request.match_info.route.resource
        is_open = resource is not None and resource.canonical in _WITHOUT_KEY
        if not is_open and not hmac.compare_digest(given.encode("utf-8", "replace"), expected):
            refusal = json_response(
                401, detail="the API key is missing or wrong: this service was started with a different key"
            )
            refusal.force_close()
            return refusal
        return await handler(request)

    return check


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
