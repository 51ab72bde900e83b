"""Runs one episode: sample, parse, search, append, and repeat until it ends.

Batches, retries, processes and weights are up to the policy and the search.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

import anyio

from searchr1_async.config import EpisodeLimits
from searchr1_async.episodes.formats import Dialect, FinalAnswer, MalformedCall, Reading
from searchr1_async.episodes.prompts import clean_query
from searchr1_async.episodes.types import Episode, Passage, Question, SearchCall, StopReason, Turn, shared_tokens
from searchr1_async.errors import SearchError, ServiceError


class Policy(Protocol):
    """The model, as seen by an episode."""

    async def sample(
        self, prompt_tokens: Sequence[int], *, max_tokens: int, stop: list[int] | list[str], seed: int | None
    ) -> Turn:
        """Samples one continuation, as a turn that is not read yet: without text, content and call.

        Raises:
            ServiceError: a permanent failure.
        """
        ...


SearchTool = Callable[[Sequence[str]], Awaitable[Sequence[Sequence[Passage]]]]
"""The search, as seen by an episode: the passages of each query, in order.

Queries come from :func:`~searchr1_async.episodes.prompts.clean_query`. Raises :class:`SearchError` for a permanent failure;
``is_fatal`` if later searches would fail too.
"""


async def play(
    question: Question,
    *,
    dialect: Dialect,
    policy: Policy,
    search: SearchTool,
    limits: EpisodeLimits,
    first_turn: Turn | None = None,
    prompt_tokens: Sequence[int] | None = None,
    given: SearchCall | None = None,
    seed: int | None = None,
    began: float | None = None,
    time_limit: Callable[[float | None], AbstractContextManager[anyio.CancelScope]] = anyio.move_on_after,
    raises_faults: bool = False,
) -> Episode:
    """Runs one episode to its end, without scoring it.

    Permanent failures of a service or search give stop reason FAILED with the cause in ``error``; nothing the model does raises.
    An episode over ``limits.max_seconds`` is cut and keeps its turns.

    Args:
        first_turn: an already sampled first turn (shared by a group's request); None samples it here.
        prompt_tokens: the rendered first prompt; None renders it here.
        given: the search whose passages are in ``prompt_tokens``; stored with the episode.
        seed: sampling seed of the first turn; later turns add their index.
        began: start time (``time.monotonic()``) if the first turn was sampled earlier; None means now.
        time_limit: creates the episode's cancel scope, so that it can use a pausable clock.
        raises_faults: raise a service's failure, for an episode that is no data.
    """
    began = time.monotonic() if began is None else began
    left = None if limits.max_seconds is None else limits.max_seconds - (time.monotonic() - began)
    prompt = tuple(dialect.start(question) if prompt_tokens is None else prompt_tokens)
    course = _Course(dialect, policy, search, limits, seed, first_turn, raises_faults, prompt)
    with time_limit(left) as scope:
        while course.stop_reason is None:
            sampled = await course.sample()
            if sampled is not None:
                await course.take(sampled)
    if scope.cancelled_caught:
        course.stop_reason, course.answer = StopReason.TIME_LIMIT, None
    return course.episode(question, prompt, time.monotonic() - began, given)


@dataclass(slots=True)
class _Course:
    """An episode in progress."""

    dialect: Dialect
    policy: Policy
    search: SearchTool
    limits: EpisodeLimits
    seed: int | None
    first_turn: Turn | None
    raises_faults: bool
    tokens: tuple[int, ...]
    """Everything so far: the next prompt. Not a list, whose every token a garbage collection would visit."""
    turns: list[Turn] = field(default_factory=list)
    stop_reason: StopReason | None = None
    """None while it goes on."""
    answer: str | None = None
    error: str | None = None

    async def sample(self) -> Turn | None:
        """The next turn; None if the episode ends without it."""
        limits, number = self.limits, len(self.turns)
        if len(self.tokens) + limits.max_tokens > limits.max_trajectory_tokens:
            self.stop_reason = StopReason.MAX_TRAJECTORY_TOKENS
            return None
        if self.first_turn is not None and not number:
            return self.first_turn
        seed = None if self.seed is None else self.seed + number
        try:
            return await self.policy.sample(
                self.tokens, max_tokens=limits.max_tokens, stop=self.dialect.stop, seed=seed
            )
        except ServiceError as fault:
            self._fail(fault)
            return None

    async def take(self, sampled: Turn) -> None:
        """Reads a turn, carries out its call, and appends both."""
        content, reading = self.dialect.read(self.tokens, sampled.sampled_tokens)
        is_last = len(self.turns) + 1 >= self.limits.max_turns
        call = None if sampled.truncated else _call_made(reading, self.limits)
        self.stop_reason, self.answer = _outcome(reading, call, sampled.truncated, is_last, self.limits)
        appended: list[int] = []
        if self.stop_reason is None and call is not None:
            call, appended = await self._carry_out(call, sampled)
        taken = replace(
            sampled,
            sampled_tokens=shared_tokens(sampled.sampled_tokens),
            text=self.dialect.decode(sampled.sampled_tokens),
            content=content,
            call=call,
            appended_tokens=shared_tokens(appended),
        )
        self.turns.append(taken)
        self.tokens += taken.sampled_tokens + taken.appended_tokens

    async def _carry_out(self, call: SearchCall, sampled: Turn) -> tuple[SearchCall, list[int]]:
        """Runs the call; returns it with its results, and the tokens to append."""
        if call.problem is not None:
            appended = self.dialect.tell(self.tokens, sampled.sampled_tokens, call.problem)
        else:
            began = time.monotonic()
            try:
                results = tuple(tuple(passages) for passages in await self.search(call.queries))
            except SearchError as fault:
                if fault.is_fatal:
                    raise
                self._fail(fault)
                return call, []
            call = SearchCall(call.queries, results, seconds=time.monotonic() - began)
            appended = self.dialect.extend(self.tokens, sampled.sampled_tokens, call.queries, results)
        if appended is None:
            self.stop_reason = StopReason.NOT_EXTENDABLE
        return call, appended or []

    def episode(self, question: Question, prompt: tuple[int, ...], seconds: float, given: SearchCall | None) -> Episode:
        """The episode that has ended. Tokens after its last turn are dropped: an example ends with sampled tokens."""
        assert self.stop_reason is not None
        if self.turns and self.turns[-1].appended_tokens:
            self.turns[-1] = replace(self.turns[-1], appended_tokens=())
        return Episode(
            question=question,
            prompt_tokens=prompt,
            turns=tuple(self.turns),
            stop_reason=self.stop_reason,
            answer=self.answer,
            error=self.error,
            seconds=seconds,
            given=given,
        )

    def _fail(self, fault: ServiceError | SearchError) -> None:
        if self.raises_faults:
            raise fault
        self.stop_reason, self.error = StopReason.FAILED, f"{type(fault).__name__}: {fault}"


def _outcome(
    reading: Reading, call: SearchCall | None, truncated: bool, is_last: bool, limits: EpisodeLimits
) -> tuple[StopReason | None, str | None]:
    """Stop reason if this turn ends the episode, and its answer."""
    if truncated:
        return StopReason.MAX_TURN_TOKENS, None
    if isinstance(reading, FinalAnswer):
        return (StopReason.NO_ANSWER, None) if reading.answer is None else (StopReason.ANSWER, reading.answer)
    if call is not None and call.problem is not None:
        return (None if limits.malformed_calls == "tell" and not is_last else StopReason.MALFORMED_CALL), None
    return (StopReason.MAX_TURNS if is_last else None), None


def _call_made(reading: Reading, limits: EpisodeLimits) -> SearchCall | None:
    """The turn's call with cleaned queries, or None."""
    if isinstance(reading, MalformedCall):
        return SearchCall((), problem=reading.problem)
    if isinstance(reading, FinalAnswer):
        return None
    if len(reading.queries) > limits.max_queries_per_call:
        return SearchCall(
            (), problem=f"{len(reading.queries)} queries; at most {limits.max_queries_per_call} are allowed"
        )
    queries = [clean_query(query) for query in reading.queries]
    if any(query is None for query in queries):
        return SearchCall((), problem="a query that cannot be searched for (empty, too long or unreadable)")
    return SearchCall(tuple(query for query in queries if query is not None))
