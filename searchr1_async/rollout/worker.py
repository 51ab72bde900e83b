"""Main loop of a worker process: one event loop, one player, and the SDK with its sampling clients."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import tinker
import uvloop
from anyio.abc import TaskGroup

import searchr1_async.errors as errors
from searchr1_async.boundary import compat
from searchr1_async.boundary.paths import raise_limit
from searchr1_async.boundary.sdk import SDK_FAULTS
from searchr1_async.episodes.rendering import load_pretrained_tokenizer
from searchr1_async.episodes.types import Episode, Passage, Turn
from searchr1_async.errors import SearchError, SearchR1Error, ServiceError
from searchr1_async.rollout.event_loop import LITTLE_GARBAGE, Pulse, PulseReading, rare_collections
from searchr1_async.rollout.gate import SampleGate
from searchr1_async.rollout.limit import SampleLimit
from searchr1_async.rollout.messages import (
    Cancel,
    Channel,
    ChannelClosedError,
    Ended,
    Found,
    FromWorker,
    Load,
    Packer,
    Pause,
    Play,
    Results,
    SearchAsked,
    SearchFailed,
    Setup,
    Started,
    ToWorker,
)
from searchr1_async.rollout.player import GroupPolicy, LocalPlayer, Sampler, TinkerPolicy

if TYPE_CHECKING:
    WorkerChannel = Channel[FromWorker, ToWorker]

logger = logging.getLogger(__name__)

SETTLE_SECONDS = 2.0
"""Time for the SDK to send its cancellations at exit."""


def run(descriptor: int) -> None:
    """Serves the socket until it is closed."""
    # For the SDK's thread too: it makes its loop by this policy.
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    with rare_collections(LITTLE_GARBAGE):
        asyncio.run(_serve(socket.socket(fileno=descriptor)))


async def _serve(end: socket.socket) -> None:
    channel: WorkerChannel = await Channel.over(end)
    clients = SamplingClients()
    try:
        # Without a channel the parent is gone, and there is nobody to report to.
        with contextlib.suppress(ChannelClosedError):
            setup = await channel.receive()
            assert isinstance(setup, Setup)
            try:
                worker = await Worker.of(setup, channel, clients)
            except SearchR1Error as error:
                await channel.send(Started(str(error)))
                return
            await channel.send(Started())
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(Pulse(worker.felt, every=setup.load_seconds).run)
                with contextlib.suppress(ChannelClosedError):
                    await worker.listen(tasks)
                tasks.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await clients.settle(SETTLE_SECONDS)
            await channel.aclose()


class Worker:
    """Rolls out the groups requested by the pool, concurrently."""

    def __init__(
        self,
        channel: WorkerChannel,
        gate: SampleGate,
        player: LocalPlayer,
        search: ForwardedSearch,
        clients: SamplingClients,
    ) -> None:
        self.channel = channel
        self.gate = gate
        self._player = player
        self._search = search
        self._policies = WorkerPolicies(clients.open)
        self._scopes: dict[int, anyio.CancelScope] = {}
        self._pulse = PulseReading(1.0, 0.0, 0.0, 0.0, 0.0)

    @classmethod
    async def of(cls, setup: Setup, channel: WorkerChannel, clients: SamplingClients) -> Worker:
        """Loads the tokenizer and makes the worker of a spec.

        Raises:
            ModelError: the tokenizer is missing, or no renderer fits.
        """
        spec = setup.spec
        dialect = await anyio.to_thread.run_sync(lambda: spec.dialect(load_pretrained_tokenizer(spec.tokenizer)))
        gate = SampleGate(SampleLimit(spec.samples.within(raise_limit())))
        search = ForwardedSearch(channel)
        player = LocalPlayer(dialect, search.search, spec.limits, gate, spec.first_turn, spec.method)
        return cls(channel, gate, player, search, clients)

    async def listen(self, tasks: TaskGroup) -> None:
        """Handles the pool's messages in order.

        Raises:
            ChannelClosedError: the pool closed the channel, or is gone.
        """
        while True:
            match await self.channel.receive():
                case Play() as play:
                    # Before the next messages, one of which may cancel it. Opening a client takes milliseconds.
                    policy = await self._policies.use(play.sampler)
                    self._scopes[play.group] = anyio.CancelScope()
                    tasks.start_soon(self._play, play, policy)
                case Found() | SearchFailed() as answer:
                    self._search.answered(answer)
                case Cancel(group):
                    if group in self._scopes:
                        self._scopes[group].cancel()
                case Pause(is_paused):
                    self._player.pause(is_paused)
                case Setup():
                    raise AssertionError("a worker is set up once")

    def felt(self, pulse: PulseReading) -> None:
        """Records the process's load and reports it to the pool."""
        self.gate.client_is(pulse)
        self._pulse = pulse
        self._post_load()

    def _post_load(self) -> None:
        self.channel.post(Load(time.process_time(), self._pulse, self.gate.statistics))

    async def _play(self, play: Play, policy: GroupPolicy) -> None:
        packer = Packer(play.group)
        _packer.set(packer)

        async def finished(member: int, episode: Episode) -> None:
            await self.channel.send(packer.pack(member, episode))

        failure = None
        try:
            with self._scopes[play.group] as scope:
                try:
                    await self._player.play(play.task, policy, finished)
                except Exception as error:
                    failure = place_of(error)
            if len(self._scopes) == 1:
                self._post_load()  # the worker is idle next: report its usage without delay
            if not scope.cancelled_caught:
                self.channel.post(Ended(play.group, failure))
        finally:
            del self._scopes[play.group]
            self._policies.release(play.sampler)


_packer: ContextVar[Packer] = ContextVar("packer")
"""Packer of the current group, inherited by the group's tasks."""


class ForwardedSearch:
    """Forwards searches to the pool, whose search is shared by all workers."""

    def __init__(self, channel: WorkerChannel) -> None:
        self._channel = channel
        self._asked = itertools.count()
        self._waiting: dict[int, asyncio.Future[Results]] = {}

    async def search(self, queries: Sequence[str]) -> Sequence[Sequence[Passage]]:
        """See :data:`~searchr1_async.episodes.play.SearchTool`; the pool's search sets the deadline."""
        packer, number = _packer.get(), next(self._asked)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            await self._channel.send(SearchAsked(packer.group, number, tuple(queries)))
            results = await answer
        finally:
            del self._waiting[number]
        packer.learn(number, results)
        return results

    def answered(self, answer: Found | SearchFailed) -> None:
        """Delivers the pool's answer; ignored if the search was cancelled."""
        waiting = self._waiting.get(answer.search)
        if waiting is None or waiting.done():
            return
        if isinstance(answer, Found):
            waiting.set_result(answer.results)
        else:
            waiting.set_exception(_search_error(answer))


def _search_error(failure: SearchFailed) -> SearchError:
    kind = getattr(errors, failure.kind, SearchError)
    return kind(failure.message, is_fatal=failure.is_fatal)


def place_of(error: BaseException) -> str:
    """Type and location of an unexpected error, without its message, which may quote an episode."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return type(error).__name__ + "".join(f" at {frame.filename}:{frame.lineno} ({frame.name})" for frame in last)


class SamplingClients:
    """A worker's sampling clients; those of one session share connections, heartbeat and telemetry."""

    def __init__(self) -> None:
        self._connections: dict[tuple[str, str], Any] = {}
        self._kept: dict[tuple[str, str], tinker.SamplingClient] = {}

    def open(self, sampler: Sampler) -> tinker.SamplingClient:
        """Opens a client; blocks for some milliseconds.

        Raises:
            ServiceError: the SDK refused the handle, or has no credentials.
        """
        try:
            handle, session = compat.with_shared_connections(sampler.handle, self._connections)
            client = tinker.SamplingClient.from_sampler_handle(handle, api_key=sampler.api_key)
        except (*SDK_FAULTS, TypeError) as error:
            raise ServiceError(
                f"a rollout worker cannot open a sampler from its handle ({type(error).__name__})"
            ) from error
        # The SDK closes connections when their last client is gone.
        self._kept.setdefault(session, client)
        return client

    async def settle(self, seconds: float) -> None:
        """Waits up to ``seconds`` per session until the SDK has sent the cancellations of cancelled samples."""
        for client in self._kept.values():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await compat.cancellations_sent(client)


class WorkerPolicies:
    """A worker's policies: those of the groups in progress, and the newest, which the next group is likely to use."""

    def __init__(self, open_client: Callable[[Sampler], tinker.SamplingClient]) -> None:
        self._open_client = open_client
        self._opened: dict[Sampler, GroupPolicy] = {}
        """Oldest first."""
        self._users: Counter[Sampler] = Counter()
        """Groups in progress."""

    async def use(self, sampler: Sampler) -> GroupPolicy:
        """The policy of a group that begins; each call needs a :meth:`release`."""
        if sampler not in self._opened:
            try:
                client = await anyio.to_thread.run_sync(self._open_client, sampler)
            except ServiceError as error:
                logger.warning("%s", error)
                self._opened[sampler] = UnopenedPolicy(error)
            else:
                self._opened[sampler] = TinkerPolicy(client, sampler.version, sampler.settings)
        self._users[sampler] += 1
        return self._opened[sampler]

    def release(self, sampler: Sampler) -> None:
        """A group has ended: drops the policies that none uses any more."""
        self._users[sampler] -= 1
        for other in list(self._opened)[:-1]:
            if not self._users[other]:
                del self._opened[other], self._users[other]


@dataclass(frozen=True, slots=True)
class UnopenedPolicy:
    """Stands in for a policy whose sampler could not be opened; sampling fails."""

    error: ServiceError

    async def sample(self, *args: object, **kwargs: object) -> Turn:
        raise self.error

    async def sample_many(self, *args: object, **kwargs: object) -> list[Turn]:
        raise self.error
