"""Main loop of a worker process: one event loop, one player, and the SDK."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
import time
import traceback
from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup

import searchr1_async.errors as errors
from searchr1_async.boundary.paths import raise_limit
from searchr1_async.episodes.formats import Dialect
from searchr1_async.episodes.rendering import load_pretrained_tokenizer
from searchr1_async.episodes.types import Episode, Passage
from searchr1_async.errors import SearchError, SearchR1Error, ServiceError
from searchr1_async.rollout.event_loop import Pulse, PulseReading, rare_collections
from searchr1_async.rollout.gate import SampleGate
from searchr1_async.rollout.limit import SampleLimit
from searchr1_async.rollout.player import GroupPolicy, LocalPlayer, TinkerPolicy
from searchr1_async.rollout.workers.messages import (
    Cancel,
    CannotStart,
    Channel,
    ChannelClosedError,
    DropPolicy,
    Ended,
    Found,
    FromWorker,
    HoldPolicy,
    Load,
    Pause,
    Play,
    Ready,
    SearchAsked,
    SearchFailed,
    Setup,
    Stop,
    ToWorker,
    WorkerSpec,
)
from searchr1_async.rollout.workers.transfer import Packer, Results, SamplingClients, UnopenedPolicy

if TYPE_CHECKING:
    WorkerChannel = Channel[FromWorker, ToWorker]

logger = logging.getLogger(__name__)

SETTLE_SECONDS = 2.0
"""Time for the SDK to send its cancellations at exit."""


def run(descriptor: int) -> None:
    """Serves the socket until it is closed."""
    with rare_collections():
        asyncio.run(_serve(socket.socket(fileno=descriptor)))


async def _serve(end: socket.socket) -> None:
    channel: WorkerChannel = await Channel.over(end)
    clients = SamplingClients()
    try:
        setup = await channel.receive()
        assert isinstance(setup, Setup)
        try:
            dialect = await anyio.to_thread.run_sync(load_dialect, setup.spec)
        except SearchR1Error as error:
            await channel.send(CannotStart(str(error)))
            return
        await channel.send(Ready())
        async with anyio.create_task_group() as tasks:
            worker = Worker(channel, setup.spec, dialect, clients)
            tasks.start_soon(_report, worker, setup.load_seconds)
            # The parent is gone, so there is nobody to report to.
            with contextlib.suppress(ChannelClosedError):
                await worker.listen(tasks)
            tasks.cancel_scope.cancel()
    except ChannelClosedError:
        pass  # the same during startup
    finally:
        with anyio.CancelScope(shield=True):
            await clients.settle(SETTLE_SECONDS)
            await channel.aclose()


def load_dialect(spec: WorkerSpec) -> Dialect:
    """Loads the tokenizer and makes the dialect of a spec.

    Raises:
        ModelError: the tokenizer is missing, or no renderer fits.
    """
    return spec.dialect(load_pretrained_tokenizer(spec.tokenizer))


async def _report(worker: Worker, seconds: float) -> None:
    await Pulse(worker.felt, every=seconds).run()


class Worker:
    """Rolls out the groups requested by the pool, concurrently."""

    def __init__(self, channel: WorkerChannel, spec: WorkerSpec, dialect: Dialect, clients: SamplingClients) -> None:
        self.channel = channel
        self.gate = SampleGate(SampleLimit(spec.samples.within(raise_limit())))
        self._clients = clients
        self._search = ForwardedSearch(channel)
        self._player = LocalPlayer(dialect, self._search.search, spec.limits, self.gate, spec.first_turn, spec.method)
        self._policies: dict[int, GroupPolicy] = {}
        self._scopes: dict[int, anyio.CancelScope] = {}
        self._pulse = PulseReading(1.0, 0.0, 0.0, 0.0, 0.0)

    async def listen(self, tasks: TaskGroup) -> None:
        """Handles the pool's messages in order, until the one to stop.

        Raises:
            ChannelClosedError: the pool is gone.
        """
        while True:
            match await self.channel.receive():
                case Play() as play:
                    self._begin(play, tasks)
                case Found() | SearchFailed() as answer:
                    self._search.answered(answer)
                case Cancel(group):
                    if group in self._scopes:
                        self._scopes[group].cancel()
                case Pause(is_paused):
                    self._player.pause(is_paused)
                case HoldPolicy() as hold:
                    await self._open_policy(hold)
                case DropPolicy(policy):
                    self._policies.pop(policy, None)
                case Stop():
                    return
                case Setup():
                    raise AssertionError("a worker is set up once")

    def felt(self, pulse: PulseReading) -> None:
        """Records the process's load and reports it to the pool."""
        self.gate.client_is(pulse)
        self._pulse = pulse
        self._post_load()

    def _post_load(self) -> None:
        self.channel.post(Load(time.process_time(), self._pulse, self.gate.statistics))

    async def _open_policy(self, hold: HoldPolicy) -> None:
        try:
            # Before the next messages, which use the policy. Takes milliseconds.
            client = await anyio.to_thread.run_sync(self._clients.open, hold.sampler)
        except ServiceError as error:
            logger.warning("%s", error)
            self._policies[hold.policy] = UnopenedPolicy(error)
        else:
            self._policies[hold.policy] = TinkerPolicy(client, hold.sampler.version, hold.sampler.settings)

    def _begin(self, play: Play, tasks: TaskGroup) -> None:
        # Not in the task: a cancellation may be the next message.
        self._scopes[play.group] = anyio.CancelScope()
        tasks.start_soon(self._play, play, self._policies[play.policy])

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
