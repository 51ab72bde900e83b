"""Rolls out one group in this process: shared or separate first turns, then each member on its own.

The group's policy is one version of the weights behind a Tinker sampling client. What a player returns is not scored; the engine
(:mod:`searchr1_async.rollout.engine`) does that.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import anyio
import tinker
from tinker import types as tinker_types

from searchr1_async.billing import TokenUsage
from searchr1_async.boundary.compat import api_key_of
from searchr1_async.boundary.sdk import SDK_FAULTS, fault_text
from searchr1_async.boundary.waits import PausableDeadlines, time_limit
from searchr1_async.config import EpisodeLimits, FirstTurn, SamplingSettings
from searchr1_async.episodes.formats import Dialect
from searchr1_async.episodes.play import Policy, SearchTool, play
from searchr1_async.episodes.prompts import Method, clean_query, limits_for
from searchr1_async.episodes.types import Episode, Group, Passage, Question, SearchCall, StopReason, Turn
from searchr1_async.errors import ConfigurationError, SearchError, ServiceError
from searchr1_async.rollout.event_loop import LoopTurns
from searchr1_async.rollout.gate import GateStatistics, SampleGate


class GroupPolicy(Policy, Protocol):
    """A policy that can also sample a group's first turns in one request."""

    def sample_many(
        self,
        prompt_tokens: Sequence[int],
        count: int,
        *,
        max_tokens: int,
        stop: list[int] | list[str],
        seed: int | None,
    ) -> Awaitable[list[Turn]]: ...


@dataclass(slots=True)
class GroupTask:
    """One group to roll out, and its members that have finished. Sent to workers as a copy without the latter."""

    place: int
    """Unique number of the group within the run."""
    question: Question
    members: tuple[int, ...]
    """Numbers of the members to roll out: all, except after a resume."""
    seed: int | None = None
    """Sampling seed of the group; None lets the service choose."""
    yields: bool = False
    """Its samples wait behind those of every group that does not yield."""
    finished: dict[int, Episode] = field(default_factory=dict, init=False, compare=False, repr=False)
    """Scored episodes by member number."""
    is_cut: bool = field(default=False, init=False, compare=False)
    _scope: anyio.CancelScope | None = field(default=None, init=False, compare=False, repr=False)

    def cut(self) -> None:
        """Cancels the remaining members; the service is notified."""
        self.is_cut = True
        if self._scope is not None:
            self._scope.cancel()

    @contextmanager
    def cuttable(self) -> Iterator[None]:
        """A block that :meth:`cut` cancels."""
        with anyio.CancelScope() as self._scope:
            if self.is_cut:
                self._scope.cancel()
            yield

    def group(self) -> Group:
        """The group of the members finished so far."""
        episodes = [self.finished[member] for member in sorted(self.finished)]
        return Group(
            self.question,
            tuple(episode for episode in episodes if episode.is_complete),
            tuple(episode for episode in episodes if not episode.is_complete),
        )


Finished = Callable[[int, Episode], Coroutine[Any, Any, None]]
"""Receives a member's number and its episode, not yet scored."""


class GroupPlayer(Protocol):
    """Rolls out groups, in this process or in workers."""

    async def play(self, task: GroupTask, policy: GroupPolicy, finished: Finished) -> None:
        """Rolls out a group and passes each member to ``finished`` as it ends. Cancelling this cancels every episode."""
        ...

    def pause(self, is_paused: bool) -> None:
        """Stops new sampling requests until called with False; episodes wait where they are."""
        ...

    @property
    def gates(self) -> Sequence[GateStatistics]:
        """Gate statistics of every rollout process."""
        ...

    @property
    def gone(self) -> TokenUsage:
        """Usage of workers that exited."""
        ...

    def metrics(self) -> dict[str, float]:
        """Metrics of the worker processes, by name."""
        ...


class LocalPlayer:
    """Rolls out groups in this process."""

    gone = TokenUsage()
    """See :class:`GroupPlayer`: there are no workers."""

    def __init__(
        self,
        dialect: Dialect,
        search: SearchTool,
        limits: EpisodeLimits,
        gate: SampleGate,
        first_turn: FirstTurn = "auto",
        method: Method = "search",
    ) -> None:
        self._dialect, self._search, self._gate = dialect, search, gate
        self._limits = limits_for(method, limits)
        self._method: Method = method
        self._first_turn: FirstTurn = first_turn
        self._turns = LoopTurns()
        self._deadlines = PausableDeadlines()

    @property
    def gates(self) -> list[GateStatistics]:
        """That of this process."""
        return [self._gate.statistics]

    def metrics(self) -> dict[str, float]:
        """See :class:`GroupPlayer`: none."""
        return {}

    def pause(self, is_paused: bool) -> None:
        """See :class:`GroupPlayer`; also pauses the episodes' deadlines."""
        self._gate.pause(is_paused)
        self._deadlines.pause(is_paused)

    async def play(self, task: GroupTask, policy: GroupPolicy, finished: Finished) -> None:
        began, paused = time.monotonic(), self._deadlines.paused_seconds
        self._gate.watch(getattr(policy, "client", None))
        prompt: tuple[int, ...] = ()
        given: SearchCall | None = None
        firsts: Sequence[Turn | None] = [None] * len(task.members)
        try:
            with self._deadlines.limit(self._limits.max_seconds) as scope:
                given = await self._retrieve(task.question) if self._method == "rag" else None
                await self._turns.turn()
                prompt = tuple(self._dialect.start(task.question, given))
                has_room = len(prompt) + self._limits.max_tokens <= self._limits.max_trajectory_tokens
                if has_room and self._first_turn != "split":  # without room each episode ends on its own
                    firsts = await self._sample_firsts(task, policy, prompt)
            if scope.cancelled_caught:
                raise TimeoutError
        except (ServiceError, SearchError, TimeoutError) as fault:
            if isinstance(fault, SearchError) and fault.is_fatal:
                raise
            lost = _lost(task.question, prompt, given, fault, time.monotonic() - began)
            for member in task.members:
                await finished(member, lost)
            return

        began += self._deadlines.paused_seconds - paused  # pauses do not count towards the time limit

        async def one(member: int, first: Turn | None) -> None:
            if first is not None:
                await self._turns.turn()
            turn = 0 if first is None else 1
            episode = await play(
                task.question,
                dialect=self._dialect,
                policy=_GatedPolicy(policy, self._gate, self._turns, self._deadlines, turn, task.yields),
                search=self._search_in_turn,
                limits=self._limits,
                first_turn=first,
                prompt_tokens=prompt,
                given=given,
                # Seeds must differ between members and turns; an episode has at most 64 turns.
                seed=None if task.seed is None else task.seed + 64 * (member + 1),
                began=began,
                time_limit=self._deadlines.limit,
            )
            await finished(member, episode)

        async with anyio.create_task_group() as tasks:
            for member, first in zip(task.members, firsts, strict=True):
                tasks.start_soon(one, member, first)

    async def _search_in_turn(self, queries: Sequence[str]) -> Sequence[Sequence[Passage]]:
        """Searches, then yields to the event loop before the passages are rendered."""
        results = await self._search(queries)
        await self._turns.turn()
        return results

    async def _retrieve(self, question: Question) -> SearchCall:
        """One search for the question itself, shared by the group."""
        query = clean_query(question.question)
        if query is None:
            return SearchCall((), problem="the question cannot be searched for (too long or unreadable)")
        began = time.monotonic()
        results = tuple(tuple(passages) for passages in await self._search((query,)))
        return SearchCall((query,), results, seconds=time.monotonic() - began)

    async def _sample_firsts(self, task: GroupTask, policy: GroupPolicy, prompt: tuple[int, ...]) -> Sequence[Turn]:
        members = len(task.members)
        async with self._gate.slot(samples=members, tokens=len(prompt), yields=task.yields) as slot:
            with self._deadlines.governing():
                firsts = await policy.sample_many(
                    prompt, members, max_tokens=self._limits.max_tokens, stop=self._dialect.stop, seed=task.seed
                )
            slot.finished([len(turn.sampled_tokens) for turn in firsts], firsts[0].cached_prompt_tokens)
        return firsts


def _lost(
    question: Question, prompt: tuple[int, ...], given: SearchCall | None, fault: Exception, seconds: float
) -> Episode:
    """An episode that a fault ended before its first turn."""
    is_slow = isinstance(fault, TimeoutError)
    reason = StopReason.TIME_LIMIT if is_slow else StopReason.FAILED
    error = None if is_slow else f"{type(fault).__name__}: {fault}"
    return Episode(question, prompt, (), reason, error=error, seconds=seconds, given=given)


@dataclass
class _GatedPolicy:
    """One episode's access to the sampler: waits for a slot with the episode's current turn."""

    policy: Policy
    gate: SampleGate
    turns: LoopTurns
    deadlines: PausableDeadlines
    turn: int
    yields: bool

    async def sample(
        self, prompt_tokens: Sequence[int], *, max_tokens: int, stop: list[int] | list[str], seed: int | None
    ) -> Turn:
        async with self.gate.slot(turn=self.turn, tokens=len(prompt_tokens), yields=self.yields) as slot:
            await self.turns.turn()  # submitting a request blocks this thread for about a millisecond
            with self.deadlines.governing():
                sampled = await self.policy.sample(prompt_tokens, max_tokens=max_tokens, stop=stop, seed=seed)
            slot.finished([len(sampled.sampled_tokens)], sampled.cached_prompt_tokens)
        self.turn += 1
        await self.turns.turn()  # parsing comes next
        return sampled


@dataclass(frozen=True, slots=True)
class Sampler:
    """A :class:`TinkerPolicy` as a value that can be sent to another process."""

    handle: str
    """From ``SamplingClient.get_sampler_handle``: identifies sampler and service, contains no credentials."""
    api_key: str | None = field(repr=False)
    """None: the other process finds the credentials the same way."""
    version: int
    settings: SamplingSettings


class TinkerPolicy:
    """Samples turns from one version of the weights; with an in-flight client, also from newer ones."""

    def __init__(self, client: tinker.SamplingClient, version: int, settings: SamplingSettings) -> None:
        self.client, self.version, self.settings = client, version, settings

    @cached_property
    def sampler(self) -> Sampler:
        """Itself as a value, made once: the SDK's handles of one client change with time."""
        try:
            handle = self.client.get_sampler_handle()
            # Handles carry no credentials, and a key passed in code is not in another process's environment.
            api_key = api_key_of(self.client)
        except (AttributeError, AssertionError, TypeError) as error:
            raise ConfigurationError(
                f"this sampling client cannot be sent to other processes ({type(error).__name__}): use workers=1"
            ) from error
        return Sampler(handle, api_key, self.version, self.settings)

    async def sample(
        self, prompt_tokens: Sequence[int], *, max_tokens: int, stop: list[int] | list[str], seed: int | None
    ) -> Turn:
        (turn,) = await self.sample_many(prompt_tokens, 1, max_tokens=max_tokens, stop=stop, seed=seed)
        return turn

    async def sample_many(
        self,
        prompt_tokens: Sequence[int],
        count: int,
        *,
        max_tokens: int,
        stop: list[int] | list[str],
        seed: int | None,
    ) -> list[Turn]:
        """Samples ``count`` continuations of one prompt in one request, so that the prompt is sent and read once."""
        began = time.monotonic()
        params = tinker_types.SamplingParams(
            max_tokens=max_tokens, temperature=self.settings.temperature, stop=stop, seed=seed
        )
        # Skips validation and a copy: the tokens are valid and do not change.
        chunk = tinker_types.EncodedTextChunk.model_construct(tokens=prompt_tokens)
        prompt = tinker_types.ModelInput(chunks=[chunk])
        response: tinker_types.SampleResponse | None = None
        try:
            with time_limit(self.settings.deadline):
                response = await self.client.sample(prompt, count, params)
        except SDK_FAULTS as error:
            raise ServiceError(f"the Tinker service failed to sample: {fault_text(error)}") from error
        if response is None:
            raise ServiceError(
                f"the Tinker service returned no sample within {self.settings.deadline:g} s (the sampling deadline)"
            )
        scored = [sequence for sequence in response.sequences if sequence.logprobs is not None]
        if len(scored) != count:
            raise ServiceError(
                f"the Tinker service returned {len(scored)} samples with log-probabilities instead of {count}"
            )
        seconds = time.monotonic() - began
        return [
            Turn(
                sampled_tokens=tuple(sequence.tokens),
                logprobs=tuple(sequence.logprobs or ()),
                truncated=sequence.stop_reason == "length",
                policy_version=self.version,
                seconds=seconds,
                sequence_id=sequence.sequence_id,
                # The prompt is read once; for the other samples it is billed as fully cached.
                cached_prompt_tokens=len(prompt_tokens) if number else response.prompt_cache_hit_tokens,
            )
            for number, sequence in enumerate(scored)
        ]


@dataclass(slots=True)
class NewestWeights:
    """The run's newest weights, for everything that starts under them."""

    current: TinkerPolicy
    """Replaced when a step's weights are published."""
