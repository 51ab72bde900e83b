"""Hundreds of episodes at once: groups are played side by side and handed on the moment each is complete."""

from __future__ import annotations

import zlib
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import anyio
from anyio.streams.memory import MemoryObjectSendStream

from searchr1_async.config import EpisodeLimits, SamplingSettings
from searchr1_async.episodes.dialect import Dialect
from searchr1_async.episodes.play import Policy, SampledTurn, SearchTool, play
from searchr1_async.episodes.reward import RewardFunction, score
from searchr1_async.episodes.types import Episode, Group, Question, StopReason
from searchr1_async.errors import ServiceError, TooManyFailuresError
from searchr1_async.events import Emit, EpisodeFinished, GroupFinished, emit_nothing


class GroupPolicy(Policy, Protocol):
    """A policy that can also answer a group's first turn in one request."""

    def sample_many(
        self,
        prompt_tokens: Sequence[int],
        count: int,
        *,
        max_tokens: int,
        stop: list[int] | list[str],
        seed: int | None,
    ) -> Awaitable[list[SampledTurn]]: ...


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


@dataclass(frozen=True)
class RolloutEngine:
    """Plays groups of episodes.

    Everything a rollout needs that does not change between steps; the policy, which does, is given with each call.
    """

    dialect: Dialect
    search: SearchTool
    limits: EpisodeLimits
    sampling: SamplingSettings
    reward: RewardFunction
    group_size: int
    max_failed_fraction: float = 1.0
    emit: Emit = field(default=emit_nothing)

    async def play_groups(
        self,
        questions: Sequence[Question],
        policy: GroupPolicy,
        finished: MemoryObjectSendStream[Group],
        *,
        step: int = 0,
    ) -> None:
        """Plays one group a question, all at once up to the limit, and sends each on the moment it is complete.

        The stream is closed when all are done. Cancelling this cancels every episode in it.

        Raises, within an exception group:
            TooManyFailuresError: the services failed too often.
            SearchError: the search failed fatally (``is_fatal``).
            RewardError: the reward function failed.
        """
        budget = FailureBudget(len(questions) * self.group_size, self.max_failed_fraction)
        slots = anyio.Semaphore(max(1, self.sampling.max_episodes_in_flight // self.group_size))

        async def one(question: Question) -> None:
            try:
                group = await self.play_group(question, policy, budget, step=step)
            finally:
                slots.release()
            self.emit(GroupFinished(group, step))
            await finished.send(group)

        async with finished, anyio.create_task_group() as tasks:
            for question in questions:
                await slots.acquire()
                tasks.start_soon(one, question)

    async def play_group(
        self, question: Question, policy: GroupPolicy, budget: FailureBudget, *, step: int = 0
    ) -> Group:
        """All members of one question's group; their first turns are one request."""
        prompt = self.dialect.start(question)
        seed = self._seed(question, step)
        try:
            firsts: Sequence[SampledTurn | None] = [None] * self.group_size
            if len(prompt) + self.limits.max_tokens <= self.limits.max_trajectory_tokens:
                firsts = await policy.sample_many(
                    prompt, self.group_size, max_tokens=self.limits.max_tokens, stop=self.dialect.stop, seed=seed
                )
        except ServiceError as fault:
            error = f"{type(fault).__name__}: {fault}"
            lost = Episode(question, tuple(prompt), (), StopReason.FAILED, error=error)
            for _ in range(self.group_size):
                self.emit(EpisodeFinished(lost, step))
                budget.record(lost)
            return Group(question, (), (lost,) * self.group_size)

        members: list[Episode | None] = [None] * self.group_size

        async def one(member: int) -> None:
            episode = await play(
                question,
                dialect=self.dialect,
                policy=policy,
                search=self.search,
                limits=self.limits,
                first_turn=firsts[member],
                prompt_tokens=prompt,
                # Members must differ in their later turns, and a turn from the next: at most 64 turns apart.
                seed=None if seed is None else seed + 64 * (member + 1),
            )
            if not episode.failed:
                episode = await score(episode, self.reward)
            members[member] = episode
            self.emit(EpisodeFinished(episode, step))
            budget.record(episode)

        async with anyio.create_task_group() as tasks:
            for member in range(self.group_size):
                tasks.start_soon(one, member)
        done = [episode for episode in members if episode is not None]
        return Group(
            question,
            tuple(episode for episode in done if not episode.failed),
            tuple(episode for episode in done if episode.failed),
        )

    def _seed(self, question: Question, step: int) -> int | None:
        if self.sampling.seed is None:
            return None
        # crc32, since Python's own hash of a string differs from process to process.
        return (self.sampling.seed * 1_000_003 + zlib.crc32(f"{step}/{question.id}".encode())) % 2**31
