"""The inside of a worker process: one event loop, one player, and the SDK."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from searchr1_async import errors
from searchr1_async.episodes.dialect import Dialect, make_dialect
from searchr1_async.episodes.types import Episode, Passage
from searchr1_async.errors import SearchError, SearchR1Error, ServiceError
from searchr1_async.rollout.gate import SampleGate
from searchr1_async.rollout.player import LocalPlayer
from searchr1_async.rollout.policy import TinkerPolicy
from searchr1_async.rollout.pulse import Pulse, PulseReading
from searchr1_async.rollout.workers.channel import Channel, ChannelClosedError
from searchr1_async.rollout.workers.messages import (
    Cancel,
    CannotStart,
    DropPolicy,
    Ended,
    Found,
    FromWorker,
    HoldPolicy,
    Load,
    Play,
    Ready,
    SearchAsked,
    SearchFailed,
    Setup,
    Stop,
    ToWorker,
    WorkerSpec,
)
from searchr1_async.rollout.workers.packing import Packer
from searchr1_async.rollout.workers.samplers import HeldPolicy, SamplingClients
from searchr1_async.search.queries import clean_query

if TYPE_CHECKING:
    WorkerChannel = Channel[FromWorker, ToWorker]

logger = logging.getLogger(__name__)

SETTLE_SECONDS = 2.0
"""For the SDK to send its cancellations at the end."""


def run(descriptor: int) -> None:
    """Plays what comes over the socket until it is closed."""
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
            try:
                await worker.listen(tasks)
            finally:
                tasks.cancel_scope.cancel()
    except ChannelClosedError:
        pass  # the parent is gone, and nobody is left to tell
    finally:
        with anyio.CancelScope(shield=True):
            await clients.settle(SETTLE_SECONDS)
            await channel.aclose()


def load_dialect(spec: WorkerSpec) -> Dialect:
    """The dialect of a spec; loads the tokenizer.

    Raises:
        ModelError: no tokenizer is there, or no renderer suits it.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(spec.tokenizer)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise errors.ModelError(
            f"no tokenizer could be loaded from {spec.tokenizer!r} in a rollout worker ({type(error).__name__}): "
            "it must be a folder or a name that AutoTokenizer loads"
        ) from error
    return make_dialect(
        spec.format_name,
        spec.model_name,
        tokenizer,
        renderer_name=spec.renderer_name,
        instructions=spec.instructions,
    )


async def _report(worker: Worker, seconds: float) -> None:
    await Pulse(worker.felt, every=seconds).run()


class Worker:
    """Plays the groups that the pool asks for, all side by side."""

    def __init__(self, channel: WorkerChannel, spec: WorkerSpec, dialect: Dialect, clients: SamplingClients) -> None:
        self.channel = channel
        self.gate = SampleGate()
        self._spec = spec
        self._dialect = dialect
        self._clients = clients
        self._policies: dict[int, HeldPolicy] = {}
        self._scopes: dict[int, anyio.CancelScope] = {}
        self._searches: dict[int, ForwardedSearch] = {}

    async def listen(self, tasks: anyio.abc.TaskGroup) -> None:
        """Does what the pool says, in its order, until it says to stop.

        Raises:
            ChannelClosedError: the pool is gone.
        """
        while True:
            match await self.channel.receive():
                case Play() as play:
                    self._begin(play, tasks)
                case Found(group, search, results):
                    if group in self._searches:
                        self._searches[group].found(search, results)
                case SearchFailed() as failure:
                    if failure.group in self._searches:
                        self._searches[failure.group].failed(failure.search, _search_error(failure))
                case Cancel(group):
                    if group in self._scopes:
                        self._scopes[group].cancel()
                case HoldPolicy() as hold:
                    await self._hold(hold)
                case DropPolicy(policy):
                    self._policies.pop(policy, None)
                case Stop():
                    return
                case Setup():
                    raise AssertionError("a worker is set up once")

    def felt(self, pulse: PulseReading) -> None:
        """Says how busy this process is."""
        gate: Any = getattr(self.gate, "statistics", None)
        self.channel.post(
            Load(
                cpu_seconds=time.process_time(),
                cpu=pulse.cpu,
                lag=pulse.lag_p99,
                lag_max=pulse.lag_max,
                samples=getattr(gate, "in_flight", 0),
                waiting=getattr(gate, "waiting", 0),
                limit=getattr(gate, "limit", None),
            )
        )

    async def _hold(self, hold: HoldPolicy) -> None:
        policy = self._policies.setdefault(hold.policy, HeldPolicy())
        try:
            # In turn, before what follows: those messages play it. It takes milliseconds.
            client = await anyio.to_thread.run_sync(self._clients.open, hold.sampler)
        except ServiceError as error:
            logger.warning("%s", error)
            policy.fail(error)
        else:
            policy.switch(TinkerPolicy(client, hold.sampler.version, hold.sampler.settings))

    def _begin(self, play: Play, tasks: anyio.abc.TaskGroup) -> None:
        packer = Packer(play.group)
        # Here, not in the task: an answer or a cancellation may be the next message.
        self._searches[play.group] = ForwardedSearch(self.channel, packer)
        self._scopes[play.group] = anyio.CancelScope()
        tasks.start_soon(self._play, play, self._policies[play.policy], packer)

    async def _play(self, play: Play, policy: HeldPolicy, packer: Packer) -> None:
        async def finished(member: int, episode: Episode) -> None:
            await self.channel.send(packer.pack(member, episode))

        player = LocalPlayer(
            self._dialect, self._searches[play.group], self._spec.limits, self.gate, self._spec.first_turn
        )
        failure = None
        try:
            with self._scopes[play.group] as scope:
                try:
                    await player.play(play.task, policy, finished)
                except Exception as error:
                    failure = place_of(error)
            if not scope.cancelled_caught:
                self.channel.post(Ended(play.group, failure))
        finally:
            del self._scopes[play.group], self._searches[play.group]


class ForwardedSearch:
    """The search of one group's episodes: asks the pool, whose search is shared by all."""

    def __init__(self, channel: WorkerChannel, packer: Packer) -> None:
        self._channel = channel
        self._packer = packer
        self._asked = 0
        self._waiting: dict[int, asyncio.Future[tuple[tuple[Passage, ...], ...]]] = {}

    async def search(self, queries: Sequence[str]) -> Sequence[Sequence[Passage]]:
        """As :meth:`~searchr1_async.episodes.play.SearchTool.search`; the deadline is that of the pool's search."""
        number, self._asked = self._asked, self._asked + 1
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            await self._channel.send(SearchAsked(self._packer.group, number, tuple(queries)))
            return await answer
        finally:
            del self._waiting[number]

    def clean_query(self, query: str) -> str | None:
        """As the pool's search does it, without asking."""
        return clean_query(query)

    def found(self, number: int, results: tuple[tuple[Passage, ...], ...]) -> None:
        """The answer to a search; of no use to one that was cancelled."""
        if number in self._waiting and not self._waiting[number].done():
            self._packer.learn(number, results)
            self._waiting[number].set_result(results)

    def failed(self, number: int, error: SearchError) -> None:
        """The failure of a search."""
        if number in self._waiting and not self._waiting[number].done():
            self._waiting[number].set_exception(error)


def _search_error(failure: SearchFailed) -> SearchError:
    kind = getattr(errors, failure.kind, SearchError)
    return kind(failure.message, is_fatal=failure.is_fatal)


def place_of(error: BaseException) -> str:
    """What an unforeseen error was and where it arose, without its words: they may quote what an episode said."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return type(error).__name__ + "".join(f" at {frame.filename}:{frame.lineno} ({frame.name})" for frame in last)
