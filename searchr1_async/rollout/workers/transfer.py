"""What goes to a worker and back: sampling clients, which are sent once and dropped when unused, and compact episodes.

The question and passages of an episode stay in the pool, and a group's prompt is sent once: its members share one prompt object,
and passages in the search cache are not copied per episode.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import tinker
from tinker.lib.client_connection_pool_type import ClientConnectionPoolType

from searchr1_async.boundary.network import SDK_FAULTS
from searchr1_async.config import SamplingSettings
from searchr1_async.episodes.play import SampledTurn
from searchr1_async.episodes.types import Episode, Passage, Question, SearchCall, Turn
from searchr1_async.errors import ConfigurationError, ServiceError
from searchr1_async.rollout.workers.messages import DropPolicy, HoldPolicy, Played, Reference, Sampler


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


Results = tuple[tuple[Passage, ...], ...]


@dataclass(slots=True)
class Packer:
    """Worker side of one group."""

    group: int
    _prompt: tuple[int, ...] | None = None
    _known: dict[int, tuple[Reference, tuple[Passage, ...]]] = field(default_factory=dict)
    """By ``id``; keeping the passages keeps the ids unique."""

    def learn(self, search: int, results: Results) -> None:
        for place, passages in enumerate(results):
            if passages:  # the empty tuple is a shared object
                self._known[id(passages)] = ((search, place), passages)

    def pack(self, member: int, episode: Episode) -> Played:
        """Packs a member's episode, not yet scored."""
        is_known = episode.prompt_tokens == self._prompt
        self._prompt = episode.prompt_tokens
        return Played(
            group=self.group,
            member=member,
            prompt_tokens=None if is_known else episode.prompt_tokens,
            turns=tuple(_turn_with(turn, _without_results(turn.call)) for turn in episode.turns),
            found=tuple(self._references(turn.call) for turn in episode.turns),
            stop_reason=episode.stop_reason,
            answer=episode.answer,
            error=episode.error,
            seconds=episode.seconds,
            given=_without_results(episode.given),
            given_found=self._references(episode.given),
        )

    def _references(self, call: SearchCall | None) -> tuple[Reference | tuple[Passage, ...], ...]:
        return () if call is None else tuple(map(self._reference, call.results))

    def _reference(self, passages: tuple[Passage, ...]) -> Reference | tuple[Passage, ...]:
        known = self._known.get(id(passages))
        return passages if known is None else known[0]


@dataclass(slots=True)
class Unpacker:
    """Pool side of one group."""

    question: Question
    found: dict[int, Results] = field(default_factory=dict)
    """Results by search number."""
    _prompt: tuple[int, ...] = ()

    def unpack(self, played: Played) -> Episode:
        """Restores an episode; prompt and passages are shared objects."""
        if played.prompt_tokens is not None and played.prompt_tokens != self._prompt:
            self._prompt = played.prompt_tokens
        return Episode(
            question=self.question,
            prompt_tokens=self._prompt,
            turns=tuple(
                _turn_with(turn, _with_results(turn.call, found, self.found))
                for turn, found in zip(played.turns, played.found, strict=True)
            ),
            stop_reason=played.stop_reason,
            answer=played.answer,
            error=played.error,
            seconds=played.seconds,
            given=_with_results(played.given, played.given_found, self.found),
        )


def _turn_with(turn: Turn, call: SearchCall | None) -> Turn:
    return turn if call is turn.call else replace(turn, call=call)


def _without_results(call: SearchCall | None) -> SearchCall | None:
    return call if call is None or not call.results else replace(call, results=())


def _with_results(
    call: SearchCall | None, found: Sequence[Reference | tuple[Passage, ...]], known: Mapping[int, Results]
) -> SearchCall | None:
    if call is None or not found:
        return call
    results = []
    for item in found:
        match item:
            case (int(search), int(place)):
                results.append(known[search][place])
            case _:
                results.append(item)
    return replace(call, results=tuple(results))


@dataclass(slots=True)
class Shared:
    """A policy in use. Holding it here keeps its ``id`` unique."""

    number: int
    policy: object
    sampler: Sampler
    users: int = 0
    """Groups in progress."""


@dataclass(slots=True)
class PolicyBook:
    """Decides which policy messages each worker gets.

    The newest policy is kept even when unused, since the next group is likely to use it.
    """

    describe: Callable[[Sendable], Sampler] = sampler_of
    _shared: dict[int, Shared] = field(default_factory=dict)
    """By ``id`` of the policy, oldest first."""
    _sent: dict[int, set[int]] = field(default_factory=dict)
    """Per worker, the numbers of its policies."""
    _numbers: int = 0

    def begin(self, policy: object) -> Shared:
        """Registers a group that uses the policy; each call needs an :meth:`end`.

        Raises:
            ConfigurationError: the policy cannot be sent to workers.
        """
        shared = self._shared.get(id(policy))
        if shared is None:
            if not isinstance(policy, Sendable):
                raise ConfigurationError(
                    f"a {type(policy).__name__} cannot be sent to rollout workers: only policies of a Tinker sampling "
                    "client can; use workers=1"
                )
            shared = Shared(self._numbers, policy, self.describe(policy))
            self._shared[id(policy)] = shared
            self._numbers += 1
        shared.users += 1
        return shared

    def end(self, shared: Shared) -> dict[int, list[DropPolicy]]:
        """Unregisters a group; returns the messages per worker number."""
        shared.users -= 1
        unused = [other for other in list(self._shared.values())[:-1] if not other.users]
        for other in unused:
            del self._shared[id(other.policy)]
        dropped = {other.number for other in unused}
        messages: dict[int, list[DropPolicy]] = {}
        for worker, sent in self._sent.items():
            if gone := sent & dropped:
                sent -= gone
                messages[worker] = [DropPolicy(number) for number in sorted(gone)]
        return messages

    def introduce(self, worker: int, shared: Shared) -> list[HoldPolicy]:
        """Messages that a worker needs before it uses the policy."""
        sent = self._sent.setdefault(worker, set())
        if shared.number in sent:
            return []
        sent.add(shared.number)
        return [HoldPolicy(shared.number, shared.sampler)]

    def forget(self, worker: int) -> None:
        """Forgets a worker that is gone."""
        self._sent.pop(worker, None)
