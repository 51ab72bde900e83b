"""Groups of episodes: each played by a player, scored, and handed on the moment it is complete."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import anyio

from searchr1_async.config import SamplingSettings
from searchr1_async.episodes.dialect import Dialect
from searchr1_async.episodes.reward import RewardFunction, score
from searchr1_async.episodes.types import Episode, Group, Question
from searchr1_async.errors import TooManyFailuresError
from searchr1_async.events import Emit, EpisodeFinished, emit_nothing
from searchr1_async.rollout.player import GroupPlayer, GroupPolicy, GroupTask


@dataclass(slots=True)
class FailureBudget:
    """How many episodes of a batch may fail before the run must stop; a pure count.

    Failed episodes are left out of learning, so a few cost only their work, while many mean that a service is broken and
    that what is left is a biased sample.
    """

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
                f"{self.failed} of {self.planned} episodes failed (allowed: {self.max_fraction:.0%}); the last: "
                f"{self.last_error}. Mend the service and resume: everything finished is kept."
            )


@dataclass
class GroupUnderWay:
    """A group that is being played; :meth:`cut` ends it with the members that it has."""

    task: GroupTask
    began: float = 0.0
    """When, by the caller's clock."""
    members: dict[int, Episode] = field(default_factory=dict)
    """Those that have ended, by their numbers."""
    cut_reason: str | None = None
    """Why it was cut, if it was."""
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    on_finished: Callable[[int, Episode], None] | None = None
    """Called with a member's number and its scored episode the moment it has ended; it must not block."""

    def cut(self, reason: str) -> None:
        """Cancels the members still under way; the service is told of it."""
        self.cut_reason = reason
        self.scope.cancel()

    def group(self) -> Group:
        """What there is of it."""
        episodes = [self.members[member] for member in sorted(self.members)]
        return Group(
            self.task.question,
            tuple(episode for episode in episodes if episode.is_complete),
            tuple(episode for episode in episodes if not episode.is_complete),
        )


@dataclass(frozen=True, slots=True)
class GroupToPlay:
    """A group that is to be played, by whom, and who is told."""

    task: GroupTask
    policy: GroupPolicy
    budget: FailureBudget
    """Counts its failed episodes; several groups may share one."""
    on_finished: Callable[[Group], None]
    """Called with the whole group when all its members have ended; it must not block."""
    on_episode: Callable[[int, Episode], None] | None = None
    """See :attr:`GroupUnderWay.on_finished`."""


@dataclass(slots=True)
class PlayTally:
    """What an engine plays, counted."""

    groups: int = 0
    """Under way."""
    episodes: int = 0
    """Under way."""
    finished: int = 0
    """Episodes, in all."""


@dataclass(frozen=True)
class RolloutEngine:
    """Plays groups of episodes.

    Everything a rollout needs that does not change between steps; the policy, which does, is given with each call.
    """

    dialect: Dialect
    player: GroupPlayer
    sampling: SamplingSettings
    reward: RewardFunction
    group_size: int
    max_failed_fraction: float = 1.0
    emit: Emit = field(default=emit_nothing)
    metrics: Callable[[], Mapping[str, float]] = field(default=dict)
    """How the playing goes (``rollout/…``, ``loop/…``), since it was last asked for."""
    tally: PlayTally = field(default_factory=PlayTally)

    async def play_groups(self, groups: Iterable[GroupToPlay]) -> None:
        """Plays groups in this order, as many at once as the limit allows; each is told of the moment it is complete.

        Cancelling this cancels every episode in it.

        Args:
            groups: asked for the next one when there is room for it.

        Raises, within an exception group:
            TooManyFailuresError: the services failed too often.
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
        """Groups at once, by the limit of episodes at once."""
        return max(1, self.sampling.max_episodes_in_flight // self.group_size)

    def failure_budget(self, groups: int) -> FailureBudget:
        """For so many groups."""
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
            key: what its seed depends on besides the question, so that a group played again is sampled alike.
            members: the numbers of those still to play; None is all.
            yields: see :attr:`GroupTask.yields`.
        """
        members = range(self.group_size) if members is None else members
        return GroupTask(place, question, tuple(members), self._seed(key, question), yields)

    async def play_group(
        self, under_way: GroupUnderWay, policy: GroupPolicy, budget: FailureBudget, *, step: int = 0
    ) -> Group:
        """All members of one question's group, or those that ended before it was cut.

        Args:
            step: that it is played in, for its events.
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
        """Asks the sampler for nothing more until it is called again with False; episodes wait where they are."""
        self.player.pause(is_paused)

    def _seed(self, key: str, question: Question) -> int | None:
        if self.sampling.seed is None:
            return None
        # crc32, since Python's own hash of a string differs from process to process.
        return (self.sampling.seed * 1_000_003 + zlib.crc32(f"{key}/{question.id}".encode())) % 2**31
