"""Rolls out one group in this process: shared or separate first turns, then each member on its own.

The group's policy is one version of the weights behind a Tinker sampling client. What a player returns is not scored; the engine
(:mod:`searchr1_async.rollout.engine`) does that.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import anyio
import tinker
from tinker import types as tinker_types

from searchr1_async.billing import TokenUsage
from searchr1_async.boundary.network import SDK_FAULTS, fault_text
from searchr1_async.boundary.waits import PausableDeadlines, time_limit
from searchr1_async.config import EpisodeLimits, FirstTurn, SamplingSettings
from searchr1_async.episodes.formats import Dialect
from searchr1_async.episodes.play import Policy, SampledTurn, SearchTool, play
from searchr1_async.episodes.prompts import Method, limits_for
from searchr1_async.episodes.types import Episode, Group, Passage, Question, SearchCall, StopReason
from searchr1_async.errors import SearchError, ServiceError
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
    ) -> Awaitable[list[SampledTurn]]: ...


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
    """Finished episodes by member number, scored."""
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


Finished = Callable[[int, Episode], Awaitable[None]]
"""Receives a member's number and its episode, not yet scored."""


class GroupPlayer(Protocol):
    """Rolls out groups, in this process or in workers."""

    async def play(self, task: GroupTask, policy: GroupPolicy, finished: Finished) -> None:
        """Rolls out a group and passes each member to ``finished`` as it ends. Cancelling this cancels every episode.

        Raises:
            SearchError: a fatal one (``is_fatal``).
        """
        ...

    def pause(self, is_paused: bool) -> None:
        """Stops new sampling requests until called with False; episodes wait where they are."""
        ...


class LocalPlayer:
    """Rolls out groups in this process.

    Args:
        gate: admits sampling requests, later turns first.
        first_turn: see :attr:`SamplingSettings.first_turn`.
        method: prompting method; ``dialect`` must match it.
    """

    def __init__(
        self,
        dialect: Dialect,
        search: SearchTool,
        limits: EpisodeLimits,
        gate: SampleGate,
        first_turn: FirstTurn = "auto",
        method: Method = "search",
    ) -> None:
        self._dialect = dialect
        self._search = search
        self._limits = limits_for(method, limits)
        self._method: Method = method
        self._gate = gate
        self._first_turn: FirstTurn = first_turn
        self._turns = LoopTurns()
        self._deadlines = PausableDeadlines()

    @property
    def gates(self) -> list[GateStatistics]:
        """Gate statistics of every rollout process: this one."""
        return [self._gate.statistics]

    @property
    def gone(self) -> TokenUsage:
        """Usage of exited processes: none."""
        return TokenUsage()

    def metrics(self) -> dict[str, float]:
        """Metrics of other processes: none."""
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
        firsts: Sequence[SampledTurn | None] = [None] * len(task.members)
        try:
            with self._deadlines.limit(self._limits.max_seconds) as scope:
                given = await self._retrieve(task.question) if self._method == "rag" else None
                await self._turns.turn()
                prompt = self._prompt(task.question, given)
                if self._is_shared(task, prompt):
                    firsts = await self._sample_firsts(task, policy, prompt)
            if scope.cancelled_caught:
                raise TimeoutError
        except (ServiceError, SearchError, TimeoutError) as fault:
            if isinstance(fault, SearchError) and fault.is_fatal:
                raise
            await self._fail_all(task, prompt, given, fault, time.monotonic() - began, finished)
            return

        began += self._deadlines.paused_seconds - paused  # pauses do not count towards the time limit

        async def one(member: int, first: SampledTurn | None) -> None:
            if first is not None:
                await self._turns.turn()
            episode = await play(
                task.question,
                dialect=self._dialect,
                policy=_GatedPolicy(
                    policy, self._gate, self._turns, self._deadlines, 0 if first is None else 1, task.yields
                ),
                search=_SharedSearch(self._search, self._turns),
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

    async def _retrieve(self, question: Question) -> SearchCall:
        """One search for the question itself, shared by the group."""
        query = self._search.clean_query(question.question)
        if query is None:
            return SearchCall((), problem="the question cannot be searched for (too long or unreadable)")
        began = time.monotonic()
        results = tuple(tuple(passages) for passages in await self._search.search((query,)))
        return SearchCall((query,), results, seconds=time.monotonic() - began)

    def _prompt(self, question: Question, given: SearchCall | None) -> tuple[int, ...]:
        start = self._dialect.start
        return tuple(start(question) if given is None else start(question, given))

    async def _sample_firsts(
        self, task: GroupTask, policy: GroupPolicy, prompt: tuple[int, ...]
    ) -> Sequence[SampledTurn]:
        members = len(task.members)
        async with self._gate.slot(samples=members, tokens=len(prompt), yields=task.yields) as slot:
            with self._deadlines.governing():
                firsts = await policy.sample_many(
                    prompt, members, max_tokens=self._limits.max_tokens, stop=self._dialect.stop, seed=task.seed
                )
            slot.finished([len(turn.tokens) for turn in firsts], firsts[0].cached_prompt_tokens)
        return firsts

    def _is_shared(self, task: GroupTask, prompt: Sequence[int]) -> bool:
        if len(prompt) + self._limits.max_tokens > self._limits.max_trajectory_tokens:
            return False  # no turn fits; each episode ends on its own
        if self._first_turn == "auto":
            return self._gate.is_sharing_worth_it(len(task.members))
        return self._first_turn == "shared"

    async def _fail_all(
        self,
        task: GroupTask,
        prompt: tuple[int, ...],
        given: SearchCall | None,
        fault: Exception,
        seconds: float,
        finished: Finished,
    ) -> None:
        is_slow = isinstance(fault, TimeoutError)
        reason = StopReason.TIME_LIMIT if is_slow else StopReason.FAILED
        error = None if is_slow else f"{type(fault).__name__}: {fault}"
        lost = Episode(task.question, prompt, (), reason, error=error, seconds=seconds, given=given)
        for member in task.members:
            await finished(member, lost)


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
    ) -> SampledTurn:
        async with self.gate.slot(turn=self.turn, tokens=len(prompt_tokens), yields=self.yields) as slot:
            await self.turns.turn()  # submitting a request blocks this thread for about a millisecond
            with self.deadlines.governing():
                sampled = await self.policy.sample(prompt_tokens, max_tokens=max_tokens, stop=stop, seed=seed)
            slot.finished([len(sampled.tokens)], sampled.cached_prompt_tokens)
        self.turn += 1
        await self.turns.turn()  # parsing comes next
        return sampled


@dataclass(frozen=True, slots=True)
class _SharedSearch:
    """Search that yields to the event loop before its passages are rendered."""

    search_tool: SearchTool
    turns: LoopTurns

    async def search(self, queries: Sequence[str]) -> Sequence[Sequence[Passage]]:
        results = await self.search_tool.search(queries)
        await self.turns.turn()
        return results

    def clean_query(self, query: str) -> str | None:
        return self.search_tool.clean_query(query)


class TinkerPolicy:
    """Samples turns from one version of the weights; with an in-flight client, also from newer ones.

    Args:
        client: sampling client.
        version: optimizer steps before the client's weights.
    """

    def __init__(self, client: tinker.SamplingClient, version: int, settings: SamplingSettings) -> None:
        self.client = client
        self.settings = settings
        self.version = version

    async def sample(
        self, prompt_tokens: Sequence[int], *, max_tokens: int, stop: list[int] | list[str], seed: int | None
    ) -> SampledTurn:
        """Samples one continuation.

        Raises:
            ServiceError: the service failed or did not answer before the deadline.
        """
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
    ) -> list[SampledTurn]:
        """Samples ``count`` continuations of one prompt in one request, so that the prompt is sent and read once.

        Raises:
            ServiceError: the service failed or did not answer before the deadline.
        """
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
        seconds = time.monotonic() - began
        turns: list[SampledTurn] = []
        for sequence in response.sequences:
            if sequence.logprobs is None:
                raise ServiceError(
                    "the Tinker service returned samples without log-probabilities, which training needs"
                )
            turns.append(
                SampledTurn(
                    tokens=tuple(sequence.tokens),
                    logprobs=tuple(sequence.logprobs),
                    truncated=sequence.stop_reason == "length",
                    policy_version=self.version,
                    seconds=seconds,
                    sequence_id=sequence.sequence_id,
                    # The prompt is read once; for the other samples it is billed as fully cached.
                    cached_prompt_tokens=len(prompt_tokens) if turns else response.prompt_cache_hit_tokens,
                )
            )
        if len(turns) != count:
            raise ServiceError(f"the Tinker service returned {len(turns)} samples instead of {count}")
        return turns


@dataclass(slots=True)
class NewestWeights:
    """The run's newest weights, for everything that starts under them."""

    current: TinkerPolicy
    """Replaced when a step's weights are published."""
