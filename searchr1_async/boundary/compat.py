"""Interfaces of the ``tinker`` SDK that are not public, all of them here. Checked with tinker 0.38.

Each has a fallback on public ways, which its docstring names. :func:`missing` lists what the installed SDK lacks, which is logged when
the first sampling client of a session is used.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import os
import threading
import weakref
from collections.abc import Awaitable, Callable, Mapping
from operator import attrgetter
from typing import Any

import anyio
import anyio.to_thread
import tinker

from searchr1_async.boundary.sdk import PASSING_FAULTS, SDK_FAULTS

logger = logging.getLogger(__name__)

BACK_OFF = "_sample_backoff_until"
OBSERVER = "on_queue_state_change"
RETRIES = "execute_with_retries"
PAUSED = "PAUSED_CAPACITY"
"""Queue state of a service short of capacity. (Fewer samples do not help with PAUSED_RATE_LIMIT, which limits the number of
weights sampled from.)"""
_USED = {
    BACK_OFF: 'its "too many requests" does not lower the limit of samples',
    "shadow_config.api_key": "samplers cannot be sent to other processes, use workers=1",
    "_cancel_queue": "a worker process may end before its samples are cancelled",
    "_client_pools": "a worker process may end before its samples are cancelled",
    RETRIES: "its calls fail after 5 minutes without an answer, however long max_service_outage is",
    "aclient": "weights cannot be imported into the embedded service",
}
"""Attributes of a session's holder, with what happens without them."""


def missing(client: Any) -> list[str]:
    """What the SDK of an open sampling client lacks, with what happens instead; empty for a version that was checked."""
    lacks = (
        [] if hasattr(client, OBSERVER) else [f"no {OBSERVER}: it does not tell that the service is short of capacity"]
    )
    for name, effect in _USED.items():
        try:
            attrgetter(name)(client.holder)
        except AttributeError:
            lacks.append(f"no {name}: {effect}")
    return lacks


class PushBackProbe:
    """Detects back-pressure from the service, which the SDK hides. Call :meth:`watch` and :meth:`take` on one thread.

    On "too many requests" (429) the SDK delays all samples of its session by 1 to 5 s, and on "paused for capacity" it retries;
    callers see only longer waits. It leaves two traces: the session holder's back-off time, and the queue-state callback of a
    sampling client. If one is missing the other is used, and without both nothing is detected.
    """

    def __init__(self) -> None:
        self._holders: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        """The last seen back-off time of each."""
        # The SDK reports queue states on its own thread.
        self._paused = threading.Event()

    def watch(self, client: Any) -> None:
        """Adds a sampling client; clients are dropped when garbage-collected."""
        holder = getattr(client, "holder", None)
        with contextlib.suppress(TypeError):  # not weakly referenceable, and must not be kept alive
            if holder not in self._holders:
                self._holders[holder] = getattr(holder, BACK_OFF, None)
                for text in missing(client):
                    logger.warning("tinker %s has %s", tinker.__version__, text)
            if hasattr(client, OBSERVER) and OBSERVER not in vars(client):
                setattr(client, OBSERVER, self._observer(weakref.ref(client)))

    def take(self) -> bool:
        """Whether the service pushed back since the last call."""
        if pushed := self._paused.is_set():
            self._paused.clear()
        for holder, seen in list(self._holders.items()):
            if (now := getattr(holder, BACK_OFF, None)) != seen:
                self._holders[holder] = now
                pushed = pushed or now is not None
        return pushed

    def _observer(self, reference: weakref.ref[Any]) -> Callable[[Any, str | None], None]:
        """Wraps the queue-state callback of a client, which a strong reference would keep alive."""
        paused = self._paused

        def observe(queue_state: Any, queue_state_reason: str | None) -> None:
            if getattr(queue_state, "name", "") == PAUSED:
                paused.set()
            if (client := reference()) is not None:
                getattr(type(client), OBSERVER)(client, queue_state, queue_state_reason)

        return observe


def api_key_of(client: tinker.SamplingClient) -> str | None:
    """The key of a client's session: one passed in code is not in the environment. Raises AttributeError without the SDK's field."""
    return client.holder.shadow_config.api_key


def with_shared_connections(handle: str, connections: dict[tuple[str, str], Any]) -> tuple[str, tuple[str, str]]:
    """A sampler's handle with the connection settings of the first one of its session, and that session.

    The SDK shares connections, heartbeat and telemetry only between byte-identical settings; those of one run are refreshed every 5
    minutes. Raises ValueError, KeyError or TypeError for no handle of a known form.

    Args:
        handle: from ``SamplingClient.get_sampler_handle()``.
        connections: the settings by session; a new session is added.
    """
    fields = json.loads(base64.urlsafe_b64decode(handle))
    session = (fields["session_id"], fields["holder"]["base_url"])
    fields["holder"] = connections.setdefault(session, fields["holder"])
    return base64.urlsafe_b64encode(json.dumps(fields).encode()).decode(), session


async def extend_retries(client: Any, may_wait: Callable[[], bool]) -> None:
    """Until cancelled, makes a service client retry its calls for as long as ``may_wait()``, instead of the SDK's own 5 minutes.

    Without the SDK's method it does nothing, and an outage of over 5 minutes fails the calls that were sent before it.
    """
    try:
        holder = await anyio.to_thread.run_sync(lambda: getattr(client, "holder", None), abandon_on_cancel=True)
    except SDK_FAULTS:  # the first call raises it again
        return
    original = getattr(holder, RETRIES, None)
    if holder is None or original is None or RETRIES in vars(holder):
        return

    async def retrying(func: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                return await original(func, *args, **kwargs)
            except PASSING_FAULTS:
                if not may_wait():
                    raise

    vars(holder)[RETRIES] = retrying
    try:
        await anyio.sleep_forever()
    finally:
        vars(holder).pop(RETRIES, None)  # the client may be the user's, and outlive the run


async def cancellations_sent(client: tinker.SamplingClient) -> None:
    """Waits until the SDK has sent the cancellations of cancelled samples: its thread dies with the process.

    Without the SDK's queue it does not wait, and the service drops abandoned samples at the end of their session.
    """
    await client.holder.run_coroutine_threadsafe(_until_quiet(client.holder))


async def _until_quiet(holder: Any) -> None:
    """Runs on the SDK's thread. A cancelled sample queues its cancellation within the next loop iterations."""
    from tinker.lib.client_connection_pool_type import ClientConnectionPoolType

    quiet = 0
    while quiet < 3:
        queue = getattr(holder, "_cancel_queue", None)
        pool = getattr(holder, "_client_pools", {}).get(ClientConnectionPoolType.RETRIEVE_PROMISE)
        is_busy = (queue is not None and not queue.empty()) or any(getattr(pool, "_client_active_refcount", ()))
        quiet = 0 if is_busy else quiet + 1
        await asyncio.sleep(0.005)


def posting(client: tinker.ServiceClient, route: str, body: Mapping[str, Any]) -> Callable[[], Any]:
    """A call, as the SDK's own, of a route that the SDK does not know; its result is the JSON answer."""
    from tinker.lib.client_connection_pool_type import ClientConnectionPoolType

    async def send() -> Any:
        with client.holder.aclient(ClientConnectionPoolType.TRAIN) as connection:
            return await connection.post(f"/api/v1/{route}", body=dict(body), cast_to=object)

    return lambda: client.holder.run_coroutine_threadsafe(send())


def address_of(client: tinker.ServiceClient | None) -> str:
    """The base URL of a client; None: the one that a client opened now would use."""
    url = getattr(client, "_base_url", None)
    try:
        from tinker.lib.base_url import resolve_base_url
    except ImportError:
        return str(url or os.environ.get("TINKER_BASE_URL") or "https://tinker.thinkingmachines.dev")
    return resolve_base_url(url)


def has_stored_credentials() -> bool:
    """Whether the SDK finds credentials other than ``TINKER_API_KEY``. Raises ValueError or OSError if they cannot be read."""
    try:
        from tinker.lib._auth_token_provider import resolve_auth_provider
    except ImportError:
        return False
    try:
        resolve_auth_provider(None, enforce_cmd=False)
    except (tinker.TinkerError, TypeError, RuntimeError):  # none; a different signature; no home folder
        return False
    return True
