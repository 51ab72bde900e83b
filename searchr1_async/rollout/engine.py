"""Rolls out groups of episodes: each is run, scored, and passed on the moment it is complete.

:func:`open_engine` opens an engine with its player and emits telemetry at 4 Hz. An engine holds what stays fixed between steps; the
policy comes with each call. A failed episode is data, within the limit of its :class:`FailureBudget`.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import anyio

from searchr1_async.billing import TokenUsage, total_usage
from searchr1_async.boundary.paths import raise_limit
from searchr1_async.boundary.waits import usable_cores
from searchr1_async.config import SamplingSettings
from searchr1_async.episodes.formats import Dialect
from searchr1_async.episodes.play import SearchTool
from searchr1_async.episodes.reward import RewardFunction, score
from searchr1_async.episodes.types import Episode, Group, Passage, Question
from searchr1_async.errors import TooManyFailuresError
from searchr1_async.events import Emit, EpisodeFinished, Notice, RolloutSampled, emit_nothing
from searchr1_async.rollout.event_loop import Pulse, PulseReading, rare_collections
from searchr1_async.rollout.gate import GateStatistics, SampleGate, gate_metrics
from searchr1_async.rollout.limit import LimitSettings, SampleLimit
from searchr1_async.rollout.player import GroupPlayer, GroupPolicy, GroupTask, LocalPlayer
from searchr1_async.rollout.workers.elastic import ElasticPlayer
from searchr1_async.rollout.workers.messages import WorkerSpec
from searchr1_async.rollout.workers.pool import WorkerPool


@dataclass(slots=True)
class FailureBudget:
    """Maximum number of failed episodes per batch. A few only cost their work; many bias the remaining sample."""

    planned: int
    max_fraction: float
    failed: int = 0
    last_error: str = ""

    def record(self, episode: Episode) -> None:
        """Counts a finished episode.

        Raises:
            TooManyFailuresError: more than ``max_fraction`` of the planned episodes have failed.
        """
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


@dataclass(slots=True)
class PlayTally:
    """Counts of an engine's groups and episodes."""

    groups: int = 0
    """In progress."""
    episodes: int = 0
    """In progress."""
    finished: int = 0
    """Total finished episodes."""


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
    metrics: Callable[[], Mapping[str, float]] = field(default=dict)
    """Rollout metrics (``rollout/…``, ``loop/…``) since the last call."""
    tally: PlayTally = field(default_factory=PlayTally)
    usage: Callable[[], TokenUsage] = field(default=TokenUsage)
    """Tokens used since the engine was opened, evaluations included. Worker counts lag by up to a second, and exact once the
    workers are idle."""

    async def play_groups(self, groups: Iterable[GroupToPlay]) -> None:
        """Rolls out groups in order, as many at once as the limit allows; reports each as it completes.

        Cancelling this cancels every episode.

        Args:
            groups: consumed lazily, when there is room for another group.

        Raises, within an exception group:
            TooManyFailuresError: too many episodes failed.
            SearchError: the search failed fatally (``is_fatal``).
            RewardError: the reward function failed.
        """
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
        """Rolls out one question's group; returns the finished members if it is cut.

        Args:
            step: step number for its events.
            on_episode: see :attr:`GroupToPlay.on_episode`.
        """

        tally, members = self.tally, len(task.members)

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


NOTHING = TokenUsage()
TELL_EVERY = 0.25
"""Seconds between events."""
SEARCH_EVERY = 4
"""Events per update of the search metrics, whose percentiles are slower to compute."""


def usage_of_gates(gates: Sequence[GateStatistics], gone: TokenUsage = NOTHING) -> TokenUsage:
    """Tokens of everything that passed these gates, plus ``gone``: the usage of workers that exited."""
    return total_usage((gone, *(gate.usage for gate in gates)))


class CountedSearch:
    """Search that counts pending calls."""

    def __init__(self, search: SearchTool) -> None:
        self._search = search
        self.in_progress = 0
        """Unanswered searches."""

    async def search(self, queries: Sequence[str]) -> Sequence[Sequence[Passage]]:
        self.in_progress += 1
        try:
            return await self._search.search(queries)
        finally:
            self.in_progress -= 1

    def clean_query(self, query: str) -> str | None:
        return self._search.clean_query(query)


class PlayReading:
    """Emits rollout telemetry.

    Args:
        tally: counts of the engine.
        search: the search of the episodes.
        search_metrics: returns its totals.
    """

    def __init__(
        self, emit: Emit, tally: PlayTally, search: CountedSearch, search_metrics: Callable[[], Mapping[str, float]]
    ) -> None:
        self._emit, self._tally, self._search, self._search_metrics = emit, tally, search, search_metrics
        self.pulse = PulseReading(1.0, 0.0, 0.0, 0.0, 0.0)
        """Latest reading of the event loop."""
        self._searched: Mapping[str, float] = {}

    async def tell(self, look: Callable[[], RolloutSampled]) -> None:
        """Emits the result of ``look`` until cancelled."""
        for turn in itertools.count():
            if turn % SEARCH_EVERY == 0:
                self.look_at_search()
            self._emit(look())
            await anyio.sleep(TELL_EVERY)

    def look_at_search(self) -> None:
        """Updates the search totals used by :meth:`read`."""
        self._searched = self._search_metrics()

    def read(self, gates: Sequence[GateStatistics], gone: TokenUsage = NOTHING) -> RolloutSampled:
        """The current state.

        Args:
            gates: gates of all rollout processes.
            gone: usage of workers that exited.
        """
        tally, pulse = self._tally, self.pulse
        used = usage_of_gates(gates, gone)
        # Report the cause of the busiest process, which is the bottleneck.
        busiest = max(gates, key=lambda gate: gate.waiting, default=None)
        return RolloutSampled(
            episodes=tally.episodes,
            sampling=sum(gate.in_flight for gate in gates),
            queued=sum(gate.waiting for gate in gates),
            searching=self._search.in_progress,
            groups=tally.groups,
            finished_episodes=tally.finished,
            prompt_tokens=used.prompt,
            sampled_tokens=used.sampled,
            cached_prompt_tokens=used.cached,
            search=self._searched,
            limited_by="" if busiest is None else busiest.cause.value,
            loop_lag_p50=pulse.lag_p50,
            loop_lag_p99=pulse.lag_p99,
            loop_lag_max=pulse.lag_max,
            cpu=pulse.cpu,
            is_paused=bool(gates) and all(gate.is_paused for gate in gates),
        )


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
    emit: Emit,
    search_metrics: Callable[[], Mapping[str, float]] = dict,
) -> AsyncIterator[RolloutEngine]:
    """Opens an engine that runs in this process, or in workers as set by ``sampling.workers``.

    While open, it emits :class:`~searchr1_async.events.RolloutSampled` at 4 Hz.

    Args:
        spec: rollout configuration, the same for all processes.
        tokenizer: the loaded tokenizer of ``spec``.
        search_metrics: search totals to emit.

    Raises:
        ModelError: the format or renderer is unknown.
        ServiceError: a worker did not start.
    """
    dialect = spec.dialect(tokenizer)
    files, bounds = raise_limit(), LimitSettings(most=sampling.max_episodes_in_flight)
    if (warning := files.warning(min(bounds.most, bounds.most_requests))) is not None:
        emit(Notice(warning, is_warning=True))
    gate = SampleGate(SampleLimit(bounds.within(files)))
    counted = CountedSearch(search)
    local = LocalPlayer(dialect, counted, spec.limits, gate, spec.first_turn, spec.method)
    tally = PlayTally()
    reading = PlayReading(emit, tally, counted, search_metrics)

    def hear(pulse: PulseReading) -> None:
        gate.client_is(pulse)
        reading.pulse = pulse

    with rare_collections():
        async with (
            Pulse(hear) as pulse,
            _open_player(local, gate, spec, counted, sampling) as player,
            anyio.create_task_group() as tasks,
        ):

            def metrics() -> Mapping[str, float]:
                return {**gate_metrics(player.gates), **pulse.take().metrics(), **player.metrics()}

            def look() -> RolloutSampled:
                return reading.read(player.gates, player.gone)

            tasks.start_soon(reading.tell, look)
            yield RolloutEngine(
                dialect,
                player,
                sampling,
                reward,
                group_size,
                max_failed_fraction,
                emit,
                metrics,
                tally,
                usage=lambda: usage_of_gates(player.gates, player.gone),
            )
            tasks.cancel_scope.cancel()
            reading.look_at_search()
            emit(look())  # final totals


@asynccontextmanager
async def _open_player(
    local: LocalPlayer, gate: SampleGate, spec: WorkerSpec, search: SearchTool, sampling: SamplingSettings
) -> AsyncIterator[LocalPlayer | WorkerPool | ElasticPlayer]:
    if sampling.workers == 1:
        yield local
        return
    processes = usable_cores() if sampling.workers == "auto" else sampling.workers
    spec = replace(spec, samples=LimitSettings(most=max(1, sampling.max_episodes_in_flight // processes)))
    if sampling.workers == "auto":
        async with WorkerPool(spec, search, count=0) as pool, ElasticPlayer(local, gate, pool, grows=True) as elastic:
            yield elastic
    else:
        async with WorkerPool(spec, search, count=sampling.workers) as pool:
            yield pool
