"""Weights across processes: what a pool tells of a policy, and how a worker samples from it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import tinker
from tinker.lib.client_connection_pool_type import ClientConnectionPoolType

from searchr1_async.boundary.sdk import SDK_FAULTS
from searchr1_async.config import SamplingSettings
from searchr1_async.episodes.play import SampledTurn
from searchr1_async.errors import ConfigurationError, ServiceError
from searchr1_async.rollout.workers.messages import Sampler


@runtime_checkable
class Sendable(Protocol):
    """One version of the weights that another process can sample from: a :class:`TinkerPolicy`."""

    client: tinker.SamplingClient
    version: int
    settings: SamplingSettings


def sampler_of(policy: Sendable) -> Sampler:
    """What a worker needs to sample from a policy.

    Raises:
        ConfigurationError: the SDK has no handle for its client.
    """
    client = policy.client
    try:
        handle = client.get_sampler_handle()
        # A handle carries no credentials, and a key that was given in code is in no environment of a worker.
        api_key = client.holder.shadow_config.api_key
    except (AttributeError, AssertionError, TypeError) as error:
        raise ConfigurationError(
            f"this sampling client cannot be sent to other processes ({type(error).__name__}): play with workers=1"
        ) from error
    return Sampler(handle, api_key, policy.version, policy.settings)


class SamplingClients:
    """A worker's clients: all that are of one session share its connections, its heartbeat and its telemetry for life.

    The SDK shares these between handles that are alike to the byte. Those of one run are not: they hold the service's
    settings as they were when each was made, and those are fetched anew every 5 minutes.
    """

    def __init__(self) -> None:
        self._connections: dict[tuple[str, str], Any] = {}
        self._kept: dict[tuple[str, str], tinker.SamplingClient] = {}

    def open(self, sampler: Sampler) -> tinker.SamplingClient:
        """A client for the sampler; blocks for some milliseconds, the first of a session for some more.

        Raises:
            ServiceError: the SDK refused the handle, or has no credentials here.
        """
        try:
            fields = json.loads(base64.urlsafe_b64decode(sampler.handle))
            session = (fields["session_id"], fields["holder"]["base_url"])
            fields["holder"] = self._connections.setdefault(session, fields["holder"])
            handle = base64.urlsafe_b64encode(json.dumps(fields).encode()).decode()
            client = tinker.SamplingClient.from_sampler_handle(handle, api_key=sampler.api_key)
        except (*SDK_FAULTS, TypeError) as error:
            raise ServiceError(
                f"a rollout worker could not open a sampler from its handle ({type(error).__name__})"
            ) from error
        # The SDK itself keeps connections only while some client of theirs is there.
        self._kept.setdefault(session, client)
        return client

    async def settle(self, seconds: float) -> None:
        """Waits until the SDK has sent what cancelled samples have it send, for so many seconds at most.

        Its own thread sends it, and ends with the process. What is asked here is internal to the SDK: where that is
        missing, there is nothing to wait for, and the service ends abandoned samples when their session is over.
        """
        for client in self._kept.values():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await client.holder.run_coroutine_threadsafe(_until_quiet(client.holder))


async def _until_quiet(holder: Any) -> None:
    """On the SDK's thread: a cancelled sample queues its request to cancel within the next turns of that loop."""
    quiet = 0
    while quiet < 3:
        queue = getattr(holder, "_cancel_queue", None)
        pool = getattr(holder, "_client_pools", {}).get(ClientConnectionPoolType.RETRIEVE_PROMISE)
        is_busy = (queue is not None and not queue.empty()) or any(getattr(pool, "_client_active_refcount", ()))
        quiet = 0 if is_busy else quiet + 1
        await asyncio.sleep(0.005)


@dataclass(frozen=True, slots=True)
class UnopenedPolicy:
    """A policy in a worker whose sampler could not be opened: whatever is sampled from it fails."""

    error: ServiceError

    async def sample(self, *args: object, **kwargs: object) -> SampledTurn:
        """Raises the error."""
        raise self.error

    async def sample_many(self, *args: object, **kwargs: object) -> list[SampledTurn]:
        """Raises the error."""
        raise self.error
