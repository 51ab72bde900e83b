"""Rolls out groups of episodes: each is run, scored, and passed on the moment it is complete."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import anyio

from searchr1_async.billing import TokenUsage
from searchr1_async.config import SamplingSettings
from searchr1_async.episodes.formats import Dialect
from searchr1_async.episodes.rewards import RewardFunction, score
from searchr1_async.episodes.types import Episode, Group, Question
from searchr1_async.errors import TooManyFailuresError
from searchr1_async.events import Emit, EpisodeFinished, emit_nothing
from searchr1_async.rollout.player import GroupPlayer, GroupPolicy, GroupTask


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


@dataclass
class GroupUnderWay:
    """A group in progress; :meth:`cut` ends it with its finished members."""

    task: GroupTask
    began: float = 0.0
    """Start time on the caller's clock."""
    members: dict[int, Episode] = field(default_factory=dict)
    """Finished episodes by member number."""
    cut_reason: str | None = None
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    on_finished: Callable[[int, Episode], None] | None = None
    """Called with the member number and scored episode as each member finishes; must not block."""

    def cut(self, reason: str) -> None:
        """Cancels the remaining members; the service is notified."""
        self.cut_reason = reason
        self.scope.cancel()

    def group(self) -> Group:
        """The group of members finished so far."""
        episodes = [self.members[member] for member in sorted(self.members)]
        return Group(
            self.task.question,
            tuple(episode for episode in episodes if episode.is_complete),
            tuple(episode for episode in episodes if not episode.is_complete),
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
    """See :attr:`GroupUnderWay.on_finished`."""


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
            under_way = GroupUnderWay(group.task, on_finished=group.on_episode)
            try:
                played = await self.play_group(under_way, group.policy, group.budget)
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
        self, under_way: GroupUnderWay, policy: GroupPolicy, budget: FailureBudget, *, step: int = 0
    ) -> Group:
        """Rolls out one question's group; returns the finished members if it is cut.

        Args:
            step: step number for its events.
        """

        tally, members = self.tally, len(under_way.task.members)

        async def finished(member: int, episode: Episode) -> None:
            if episode.is_complete:
                episode = await score(episode, self.reward)
            under_way.members[member] = episode
            if under_way.on_finished is not None:
                under_way.on_finished(member, episode)
            tally.episodes -= 1
            tally.finished += 1
            self.emit(EpisodeFinished(episode, step))
            budget.record(episode)

        tally.groups += 1
        tally.episodes += members
        try:
            with under_way.scope:
                await self.player.play(under_way.task, policy, finished)
        finally:
            tally.groups -= 1
            tally.episodes -= members - len(under_way.members)
        return under_way.group()

    def pause(self, is_paused: bool) -> None:
        """Stops new sampling requests until called with False; episodes wait where they are."""
        self.player.pause(is_paused)

    def _seed(self, key: str, question: Question) -> int | None:
        if self.sampling.seed is None:
            return None
        # crc32: Python's string hash differs between processes.
        return (self.sampling.seed * 1_000_003 + zlib.crc32(f"{key}/{question.id}".encode())) % 2**31
