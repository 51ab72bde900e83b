"""Runs one episode: sample, parse, search, append, and repeat until it ends.

Batches, retries, processes and weights are up to the policy and the search.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import anyio

from searchr1_async.config import EpisodeLimits
from searchr1_async.episodes.formats import Dialect, FinalAnswer, MalformedCall, Reading
from searchr1_async.episodes.prompts import clean_query
from searchr1_async.episodes.types import Episode, Passage, Question, SearchCall, StopReason, Turn
from searchr1_async.errors import SearchError, ServiceError


@dataclass(frozen=True, slots=True)
class SampledTurn:
    """One continuation sampled by a policy."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    truncated: bool
    """Sampling stopped at the length limit."""
    policy_version: int
    seconds: float = 0.0
    sequence_id: str | None = None
    """See :attr:`Turn.sequence_id`."""
    cached_prompt_tokens: int = 0
    """See :attr:`Turn.cached_prompt_tokens`."""


class Policy(Protocol):
    """The model, as seen by an episode."""

    async def sample(
        self, prompt_tokens: Sequence[int], *, max_tokens: int, stop: list[int] | list[str], seed: int | None
    ) -> SampledTurn:
        """Samples one continuation.

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
    first_turn: SampledTurn | None = None,
    prompt_tokens: Sequence[int] | None = None,
    given: SearchCall | None = None,
    seed: int | None = None,
    began: float | None = None,
    time_limit: Callable[[float | None], AbstractContextManager[anyio.CancelScope]] = anyio.move_on_after,
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

    Raises:
        SearchError: a fatal one (``is_fatal``), which would fail every other episode too.
    """
    began = time.monotonic() if began is None else began
    left = None if limits.max_seconds is None else limits.max_seconds - (time.monotonic() - began)
    tokens = list(prompt_tokens if prompt_tokens is not None else dialect.start(question))
    first_prompt = tuple(tokens)
    turns: list[Turn] = []
    answer: str | None = None
    error: str | None = None
    stop_reason: StopReason | None = None

    with time_limit(left) as scope:
        while stop_reason is None:
            if len(tokens) + limits.max_tokens > limits.max_trajectory_tokens:
                stop_reason = StopReason.MAX_TRAJECTORY_TOKENS
                break
            try:
                sampled = (
                    first_turn
                    if first_turn is not None and not turns
                    else await policy.sample(
                        tokens,
                        max_tokens=limits.max_tokens,
                        stop=dialect.stop,
                        seed=None if seed is None else seed + len(turns),
                    )
                )
            except ServiceError as fault:
                stop_reason, error = StopReason.FAILED, f"{type(fault).__name__}: {fault}"
                break
            content, reading = dialect.read(tokens, sampled.tokens)
            is_last = len(turns) + 1 >= limits.max_turns
            stop_reason, answer = _outcome(reading, sampled.truncated, is_last, limits)
            call = None
            appended: list[int] = []
            if not sampled.truncated:
                call = _call_made(reading, limits)
            if call is not None and call.problem is not None and not isinstance(reading, MalformedCall):
                # A well-formed call with a query that cannot be sent.
                stop_reason = _malformed_outcome(is_last, limits)
            if stop_reason is None and call is not None:
                try:
                    call, extension = await _carry_out(call, tokens, sampled.tokens, dialect, search)
                except SearchError as fault:
                    if fault.is_fatal:
                        raise
                    stop_reason, error, extension = StopReason.FAILED, f"{type(fault).__name__}: {fault}", []
                if extension is None:
                    stop_reason, extension = StopReason.NOT_EXTENDABLE, []
                appended = extension
            turns.append(_turn(sampled, content, dialect, call, appended))
            tokens += sampled.tokens
            tokens += appended
    if scope.cancelled_caught:
        stop_reason, answer = StopReason.TIME_LIMIT, None
    assert stop_reason is not None

    return Episode(
        question=question,
        prompt_tokens=first_prompt,
        turns=_without_tail(turns),
        stop_reason=stop_reason,
        answer=answer,
        error=error,
        seconds=time.monotonic() - began,
        given=given,
    )


def _outcome(
    reading: Reading, truncated: bool, is_last: bool, limits: EpisodeLimits
) -> tuple[StopReason | None, str | None]:
    """Stop reason if this turn ends the episode, and its answer."""
    if truncated:
        return StopReason.MAX_TURN_TOKENS, None
    if isinstance(reading, FinalAnswer):
        return (StopReason.NO_ANSWER, None) if reading.answer is None else (StopReason.ANSWER, reading.answer)
    if isinstance(reading, MalformedCall):
        return _malformed_outcome(is_last, limits), None
    return (StopReason.MAX_TURNS if is_last else None), None


def _malformed_outcome(is_last: bool, limits: EpisodeLimits) -> StopReason | None:
    return None if limits.malformed_calls == "tell" and not is_last else StopReason.MALFORMED_CALL


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


async def _carry_out(
    call: SearchCall, tokens: Sequence[int], sampled: Sequence[int], dialect: Dialect, search: SearchTool
) -> tuple[SearchCall, list[int] | None]:
    """Runs the call; returns it with its results and the tokens to append."""
    if call.problem is not None:
        return call, dialect.tell(tokens, sampled, call.problem)
    began = time.monotonic()
    results = tuple(tuple(passages) for passages in await search(call.queries))
    call = SearchCall(call.queries, results, seconds=time.monotonic() - began)
    return call, dialect.extend(tokens, sampled, call.queries, results)


def _turn(
    sampled: SampledTurn, content: str, dialect: Dialect, call: SearchCall | None, appended: Sequence[int]
) -> Turn:
    return Turn(
        sampled_tokens=sampled.tokens,
        logprobs=sampled.logprobs,
        text=dialect.decode(sampled.tokens),
        content=content,
        policy_version=sampled.policy_version,
        call=call,
        appended_tokens=tuple(appended),
        seconds=sampled.seconds,
        truncated=sampled.truncated,
        sequence_id=sampled.sequence_id,
        cached_prompt_tokens=sampled.cached_prompt_tokens,
    )


def _without_tail(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Drops tokens appended to the last turn: an example ends with sampled tokens."""
    if turns and turns[-1].appended_tokens:
        turns = [*turns[:-1], replace(turns[-1], appended_tokens=())]
    return tuple(turns)
