"""Rolls out groups of episodes: each is run, scored, and passed on the moment it is complete.

:func:`open_engine` opens an engine with its player and emits telemetry at 4 Hz. An engine holds what stays fixed between steps; the
policy comes with each call. A failed episode is data, within the limit of its :class:`FailureBudget`.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import anyio

from searchr1_async.billing import TokenUsage, total_usage
from searchr1_async.boundary.paths import raise_limit
from searchr1_async.boundary.waits import usable_cores
from searchr1_async.config import SamplingSettings
from searchr1_async.episodes.formats import Dialect
from searchr1_async.episodes.play import SearchTool
from searchr1_async.episodes.rewards import RewardFunction, score
from searchr1_async.episodes.types import Episode, Group, Passage, Question
from searchr1_async.errors import TooManyFailuresError
from searchr1_async.events import Emit, EpisodeFinished, Notice, RolloutSampled, emit_nothing
from searchr1_async.rollout.event_loop import Pulse, PulseReading, rare_collections
from searchr1_async.rollout.gate import SampleGate, gate_metrics
from searchr1_async.rollout.limit import LimitSettings, SampleLimit
from searchr1_async.rollout.messages import WorkerSpec
from searchr1_async.rollout.player import GroupPlayer, GroupPolicy, GroupTask, LocalPlayer
from searchr1_async.rollout.worker_pool import WorkerPool, worker_processes


@dataclass(slots=True)
class FailureBudget:
    """Maximum number of failed episodes per batch. A few only cost their work; many bias the remaining sample."""

    planned: int
    max_fraction: float
    failed: int = 0
    last_error: str = ""

    def record(self, episode: Episode) -> None:
        """Counts a finished episode."""
        if not episode.failed:
            return
        self.failed += 1
        self.last_error = episode.error or self.last_error
        if self.failed > self.max_fraction * self.planned:
            raise TooManyFailuresError(
                f"{self.failed} of {self.planned} episodes failed (allowed: {self.max_fraction:.0%}); last error: "
                f"{self.last_error}. Fix the service and resume: all finished work is kept."
            )


@dataclass(frozen=True, slots=True)
class GroupToPlay:
    """A group to roll out, with its policy and callbacks."""

    task: GroupTask
    policy: GroupPolicy
    budget: FailureBudget
    """Counts failed episodes; groups may share one."""
    on_finished: Callable[[Group], None]
    """Called with the group when all members have finished; must not block."""
    on_episode: Callable[[int, Episode], None] | None = None
    """Called with the member number and scored episode as each member finishes; must not block."""


TELL_EVERY = 0.25
"""Seconds between events."""
SEARCH_EVERY = 4
"""Events per update of the search metrics, whose percentiles are slower to compute."""


def usage_of(player: GroupPlayer) -> TokenUsage:
    """Tokens used by all of a player's processes, exited ones included."""
    return total_usage((player.gone, *(gate.usage for gate in player.gates)))


@dataclass(slots=True)
class Telemetry:
    """What an engine is doing: counts that it keeps, emitted with the state of its processes."""

    emit: Emit = field(default=emit_nothing)
    search_metrics: Callable[[], Mapping[str, float]] = field(default=dict)
    groups: int = 0
    """In progress, like episodes and searches."""
    episodes: int = 0
    searching: int = 0
    finished: int = 0
    """Episodes."""
    pulse: PulseReading = field(default_factory=lambda: PulseReading(1.0, 0.0, 0.0, 0.0, 0.0))
    """Latest reading of the event loop."""
    searched: Mapping[str, float] = field(default_factory=dict)
    """Latest metrics of the search."""

    async def tell(self, player: GroupPlayer) -> None:
        """Emits the current state until cancelled."""
        for turn in itertools.count():
            self.tell_once(player, with_search=turn % SEARCH_EVERY == 0)
            await anyio.sleep(TELL_EVERY)

    def tell_once(self, player: GroupPlayer, *, with_search: bool = True) -> None:
        """Emits the current state; without a search with its metrics as they were."""
        if with_search:
            self.searched = self.search_metrics()
        pulse, gates, used = self.pulse, player.gates, usage_of(player)
        # Report the cause of the busiest process, which is the bottleneck.
        busiest = max(gates, key=lambda gate: gate.waiting, default=None)
        self.emit(
            RolloutSampled(
                episodes=self.episodes,
                sampling=sum(gate.in_flight for gate in gates),
                queued=sum(gate.waiting for gate in gates),
                searching=self.searching,
                groups=self.groups,
                finished_episodes=self.finished,
                prompt_tokens=used.prompt,
                sampled_tokens=used.sampled,
                cached_prompt_tokens=used.cached,
                search=self.searched,
                limited_by="" if busiest is None else busiest.cause.value,
                loop_lag_p50=pulse.lag_p50,
                loop_lag_p99=pulse.lag_p99,
                loop_lag_max=pulse.lag_max,
                cpu=pulse.cpu,
                is_paused=bool(gates) and all(gate.is_paused for gate in gates),
            )
        )


def counted(search: SearchTool, telemetry: Telemetry) -> SearchTool:
    """The search; its unanswered calls are counted in ``telemetry``."""

    async def search_counted(queries: Sequence[str]) -> Sequence[Sequence[Passage]]:
        telemetry.searching += 1
        try:
            return await search(queries)
        finally:
            telemetry.searching -= 1

    return search_counted


@dataclass(frozen=True)
class RolloutEngine:
    """Rolls out groups of episodes. Holds everything that stays fixed between steps; the policy is passed with each call."""

    dialect: Dialect
    player: GroupPlayer
    sampling: SamplingSettings
    reward: RewardFunction
    group_size: int
    max_failed_fraction: float = 1.0
    emit: Emit = field(default=emit_nothing)
    pulse: Pulse | None = None
    telemetry: Telemetry = field(default_factory=Telemetry)

    def metrics(self) -> dict[str, float]:
        """Rollout metrics (``rollout/…``, ``loop/…``) since the last call."""
        loop = {} if self.pulse is None else self.pulse.take().metrics()
        return {**gate_metrics(self.player.gates), **loop, **self.player.metrics()}

    def usage(self) -> TokenUsage:
        """Tokens used since the engine was opened, evaluations and exited workers included. Worker counts lag by up to a second, and
        are exact once the workers are idle."""
        return usage_of(self.player)

    async def play_groups(self, groups: Iterable[GroupToPlay]) -> None:
        """Rolls out groups in order, each taken when the limit on episodes has room; reports each as it completes."""
        slots = anyio.Semaphore(self.groups_in_flight)

        async def one(group: GroupToPlay) -> None:
            try:
                played = await self.play_group(group.task, group.policy, group.budget, on_episode=group.on_episode)
            finally:
                slots.release()
            group.on_finished(played)

        async with anyio.create_task_group() as tasks:
            for group in groups:
                await slots.acquire()
                tasks.start_soon(one, group)

    @property
    def groups_in_flight(self) -> int:
        """Maximum number of concurrent groups, from the limit on episodes."""
        return max(1, self.sampling.max_episodes_in_flight // self.group_size)

    def failure_budget(self, groups: int) -> FailureBudget:
        return FailureBudget(groups * self.group_size, self.max_failed_fraction)

    def task(
        self,
        place: int,
        question: Question,
        *,
        key: str,
        members: Sequence[int] | None = None,
        yields: bool = False,
    ) -> GroupTask:
        """The group at a place.

        Args:
            key: seeds the group together with the question, so that a retried group is sampled the same way.
            members: numbers of the remaining members; None means all.
            yields: see :attr:`GroupTask.yields`.
        """
        members = range(self.group_size) if members is None else members
        return GroupTask(place, question, tuple(members), self._seed(key, question), yields)

    async def play_group(
        self,
        task: GroupTask,
        policy: GroupPolicy,
        budget: FailureBudget,
        *,
        step: int = 0,
        on_episode: Callable[[int, Episode], None] | None = None,
    ) -> Group:
        """Rolls out one question's group; returns the finished members if it is cut."""
        tally, members = self.telemetry, len(task.members)

        async def finished(member: int, episode: Episode) -> None:
            if episode.is_complete:
                episode = await score(episode, self.reward)
            task.finished[member] = episode
            if on_episode is not None:
                on_episode(member, episode)
            tally.episodes -= 1
            tally.finished += 1
            self.emit(EpisodeFinished(episode, step))
            budget.record(episode)

        tally.groups += 1
        tally.episodes += members
        try:
            with task.cuttable():
                await self.player.play(task, policy, finished)
        finally:
            tally.groups -= 1
            tally.episodes -= members - len(task.finished)
        return task.group()

    def pause(self, is_paused: bool) -> None:
        """Stops new sampling requests until called with False; episodes wait where they are."""
        self.player.pause(is_paused)

    def _seed(self, key: str, question: Question) -> int | None:
        if self.sampling.seed is None:
            return None
        # crc32: Python's string hash differs between processes.
        return (self.sampling.seed * 1_000_003 + zlib.crc32(f"{key}/{question.id}".encode())) % 2**31


@asynccontextmanager
async def open_engine(
    spec: WorkerSpec,
    tokenizer: Any,
    *,
    search: SearchTool,
    sampling: SamplingSettings,
    reward: RewardFunction,
    group_size: int,
    max_failed_fraction: float,
    episodes: int,
    emit: Emit,
    search_metrics: Callable[[], Mapping[str, float]] = dict,
) -> AsyncIterator[RolloutEngine]:
    """Opens an engine that runs in this process, or in workers as set by ``sampling.workers``.

    While open, it emits :class:`~searchr1_async.events.RolloutSampled` at 4 Hz.

    Args:
        episodes: as many as the work can have in flight.

    Raises:
        ServiceError: a worker did not start.
    """
    files, bounds = raise_limit(), LimitSettings(most=sampling.max_episodes_in_flight)
    if (warning := files.warning(min(bounds.most, bounds.most_requests))) is not None:
        emit(Notice(warning, is_warning=True))
    telemetry, gate = Telemetry(emit, search_metrics), SampleGate(SampleLimit(bounds.within(files)))
    dialect, search = spec.dialect(tokenizer), counted(search, telemetry)
    local = LocalPlayer(dialect, search, spec.limits, gate, spec.first_turn, spec.method)

    def hear(pulse: PulseReading) -> None:
        gate.client_is(pulse)
        telemetry.pulse = pulse

    with rare_collections():
        async with (
            Pulse(hear) as pulse,
            _player(local, spec, search, sampling, episodes, emit) as player,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(telemetry.tell, player)
            yield RolloutEngine(
                *(dialect, player, sampling, reward, group_size, max_failed_fraction, emit, pulse, telemetry)
            )
            tasks.cancel_scope.cancel()
            telemetry.tell_once(player)


def _player(
    local: LocalPlayer, spec: WorkerSpec, search: SearchTool, sampling: SamplingSettings, episodes: int, emit: Emit
) -> AbstractAsyncContextManager[GroupPlayer]:
    """``local``, or the workers that ``sampling.workers`` asks for."""
    episodes = min(episodes, sampling.max_episodes_in_flight)
    processes = worker_processes(sampling.workers, episodes, usable_cores())
    if not processes:
        return nullcontext(local)
    if sampling.workers == "auto":
        named = "1 worker process" if processes == 1 else f"{processes} worker processes"
        emit(Notice(f"rollout in {named}, for up to {episodes:,} episodes at once (workers=1: in this process)"))
    samples = LimitSettings(most=max(1, sampling.max_episodes_in_flight // processes))
    return WorkerPool(replace(spec, samples=samples), search, count=processes)
