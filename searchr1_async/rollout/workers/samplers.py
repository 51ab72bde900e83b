"""Sends sampling clients to workers, and opens them there."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import tinker
from tinker.lib.client_connection_pool_type import ClientConnectionPoolType

from searchr1_async.boundary.network import SDK_FAULTS
from searchr1_async.config import SamplingSettings
from searchr1_async.episodes.play import SampledTurn
from searchr1_async.errors import ConfigurationError, ServiceError
from searchr1_async.rollout.workers.messages import Sampler


@runtime_checkable
class Sendable(Protocol):
    """A policy that workers can sample from, such as :class:`TinkerPolicy`."""

    client: tinker.SamplingClient
    version: int
    settings: SamplingSettings


def sampler_of(policy: Sendable) -> Sampler:
    """Serializes a policy's sampling client.

    Raises:
        ConfigurationError: the SDK has no handle for it.
    """
    client = policy.client
    try:
        handle = client.get_sampler_handle()
        # Handles carry no credentials, and a key passed in code is not in the worker's environment.
        api_key = client.holder.shadow_config.api_key
    except (AttributeError, AssertionError, TypeError) as error:
        raise ConfigurationError(
            f"this sampling client cannot be sent to other processes ({type(error).__name__}): use workers=1"
        ) from error
    return Sampler(handle, api_key, policy.version, policy.settings)


class SamplingClients:
    """A worker's sampling clients; those of one session share connections, heartbeat and telemetry.

    The SDK shares these only between byte-identical handles. Those of one run differ, since each contains the service settings
    of its time, which are refreshed every 5 minutes.
    """

    def __init__(self) -> None:
        self._connections: dict[tuple[str, str], Any] = {}
        self._kept: dict[tuple[str, str], tinker.SamplingClient] = {}

    def open(self, sampler: Sampler) -> tinker.SamplingClient:
        """Opens a client; blocks for some milliseconds.

        Raises:
            ServiceError: the SDK refused the handle, or has no credentials.
        """
        try:
            fields = json.loads(base64.urlsafe_b64decode(sampler.handle))
            session = (fields["session_id"], fields["holder"]["base_url"])
            fields["holder"] = self._connections.setdefault(session, fields["holder"])
            handle = base64.urlsafe_b64encode(json.dumps(fields).encode()).decode()
            client = tinker.SamplingClient.from_sampler_handle(handle, api_key=sampler.api_key)
        except (*SDK_FAULTS, TypeError) as error:
            raise ServiceError(
                f"a rollout worker cannot open a sampler from its handle ({type(error).__name__})"
            ) from error
        # The SDK closes connections when their last client is gone.
        self._kept.setdefault(session, client)
        return client

    async def settle(self, seconds: float) -> None:
        """Waits up to ``seconds`` per session until the SDK has sent the cancellations of cancelled samples.

        Its thread dies with the process. Uses SDK internals: if they are missing there is no wait, and the service drops abandoned
        samples at the end of their session.
        """
        for client in self._kept.values():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await client.holder.run_coroutine_threadsafe(_until_quiet(client.holder))


async def _until_quiet(holder: Any) -> None:
    """Runs on the SDK's thread. A cancelled sample queues its cancellation within the next loop iterations."""
    quiet = 0
    while quiet < 3:
        queue = getattr(holder, "_cancel_queue", None)
        pool = getattr(holder, "_client_pools", {}).get(ClientConnectionPoolType.RETRIEVE_PROMISE)
        is_busy = (queue is not None and not queue.empty()) or any(getattr(pool, "_client_active_refcount", ()))
        quiet = 0 if is_busy else quiet + 1
        await asyncio.sleep(0.005)


@dataclass(frozen=True, slots=True)
class UnopenedPolicy:
    """Stands in for a policy whose sampler could not be opened; sampling fails."""

    error: ServiceError

    async def sample(self, *args: object, **kwargs: object) -> SampledTurn:
        raise self.error

    async def sample_many(self, *args: object, **kwargs: object) -> list[SampledTurn]:
        raise self.error
