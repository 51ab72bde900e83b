"""Rolls out one question without a golden answer: no reward, no group, no record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from searchr1_async.answer import Answer
from searchr1_async.billing import TokenUsage
from searchr1_async.config import EpisodeLimits, SamplingSettings
from searchr1_async.episodes.formats import Dialect
from searchr1_async.episodes.play import Policy, SampledTurn, SearchTool, play
from searchr1_async.episodes.types import Episode, Passage, Question
from searchr1_async.errors import QuestionsError, SearchError, ServiceError
from searchr1_async.events import BesideSampled, Emit
from searchr1_async.rollout.player import NewestWeights, TinkerPolicy
from searchr1_async.search import Search
from searchr1_async.search.record import ShownSearch
from searchr1_async.service.connection import Service
from searchr1_async.trained import named_passages, shown_passages
from searchr1_async.weights import Weights

ASKED = "asked"
"""Id and data source of a user's question."""


def asked_question(text: str) -> Question:
    """A question without a golden answer; refuses an empty text."""
    if not isinstance(text, str) or not text.strip():
        raise QuestionsError(f"{text!r} is no question: pass its text, such as 'Which country …?'")
    return Question(ASKED, text, data_source=ASKED)


def asked_limits(limits: EpisodeLimits, changes: Mapping[str, Any]) -> EpisodeLimits:
    """The limits with the changes that are not None, and without the episode time limit."""
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(limits, **given, max_seconds=None)


async def play_asked(
    question: Question,
    *,
    dialect: Dialect,
    policy: Policy,
    search: SearchTool,
    limits: EpisodeLimits,
    seed: int | None,
    sampled: Callable[[TokenUsage], None] = lambda usage: None,
) -> Episode:
    """Rolls out one unscored episode. It may end without an answer, but a failed service raises.

    Args:
        seed: of the first turn; each later turn adds its number. None: the service chooses.
        sampled: called with each turn's token usage.

    Raises:
        ServiceError: the service returned no sample.
        SearchError: a search failed.
    """
    services = _Services(policy, search, sampled)
    fault: ServiceError | SearchError | None
    try:
        episode = await play(question, dialect=dialect, policy=services, search=services, limits=limits, seed=seed)
    except SearchError as error:  # a fatal one
        fault = error
    else:
        fault = services.fault
        if fault is None:
            return episode
    raise type(fault)(f"the question was not answered: {fault}. Fix that service and ask again.") from fault


class _Services:
    """Policy and search of one episode; keeps the error that :func:`play` turns into a failed episode."""

    def __init__(self, policy: Policy, search: SearchTool, sampled: Callable[[TokenUsage], None]) -> None:
        self._policy, self._search, self._sampled = policy, search, sampled
        self.fault: ServiceError | SearchError | None = None

    async def sample(
        self, prompt_tokens: Sequence[int], *, max_tokens: int, stop: list[int] | list[str], seed: int | None
    ) -> SampledTurn:
        try:
            turn = await self._policy.sample(prompt_tokens, max_tokens=max_tokens, stop=stop, seed=seed)
        except ServiceError as fault:
            self.fault = fault
            raise
        self._sampled(TokenUsage(len(prompt_tokens), turn.cached_prompt_tokens, len(turn.tokens)))
        return turn

    async def search(self, queries: Sequence[str]) -> Sequence[Sequence[Passage]]:
        try:
            return await self._search.search(queries)
        except SearchError as fault:
            self.fault = fault
            raise

    def clean_query(self, query: str) -> str | None:
        return self._search.clean_query(query)


class LiveAnswers:
    """Answers questions beside a run's training, with its service, newest weights and prompt.

    It bypasses the engine's concurrency limit, behind which a question would wait for thousands of episodes, or forever in a
    paused run. So a paused run answers too. Nothing counts in the run's samples, episodes or failures; only searches with the
    run's search count in its search metrics, and tokens in its cost.

    Args:
        service: the run's, open.
        dialect: the run's prompt and tool format.
        search: the run's.
        limits: of the run's episodes.
        newest: the newest weights, updated during the run.
        emit: receives each turn's token usage.
    """

    def __init__(
        self,
        service: Service,
        dialect: Dialect,
        search: Search,
        limits: EpisodeLimits,
        newest: NewestWeights,
        emit: Emit,
    ) -> None:
        self._service, self._dialect, self._search, self._limits = service, dialect, search, limits
        self._newest, self._emit = newest, emit
        self.usage = TokenUsage()
        """Tokens used by all answers."""

    async def answer(
        self,
        question: Question,
        sampling: SamplingSettings,
        *,
        search: Search | None = None,
        limits: Mapping[str, Any],
        weights: Weights | None = None,
    ) -> Answer:
        """Answers the question.

        Args:
            search: None: the run's. Another shows as many passages as the run's, unless it was created with its own number.
            limits: changes to the run's; see :func:`asked_limits`.
            weights: kept ones; None: the newest at each turn, since the previous turn's may be gone.

        Raises:
            ConfigurationError: a limit out of range.
            ServiceError: the service returned no sample, or does not have the weights.
            SearchError: a search failed, or ``search`` cannot be opened.
        """
        changed = asked_limits(self._limits, limits)
        policy: Policy = _NewestPolicy(self._newest, sampling)
        if weights is not None:
            client = await self._service.create_sampling_client(weights.path)
            policy = TinkerPolicy(client, weights.step or 0, sampling)
        shown = named_passages(search).completed_by(shown_passages(self._search))
        async with search or self._search as tool:
            episode = await play_asked(
                question,
                dialect=self._dialect,
                policy=policy,
                search=ShownSearch(tool, shown.n_results, shown.max_passage_words),
                limits=changed,
                seed=sampling.seed,
                sampled=self._count,
            )
        if weights is not None:
            return Answer(episode, weights.path, weights.step)
        return Answer(episode, None, max((turn.policy_version for turn in episode.turns), default=None))

    def _count(self, used: TokenUsage) -> None:
        self.usage += used
        self._emit(BesideSampled(used.prompt, used.cached, used.sampled))


class _NewestPolicy:
    """A run's newest weights, with other sampling settings than its episodes."""

    def __init__(self, newest: NewestWeights, sampling: SamplingSettings) -> None:
        self._newest, self._sampling = newest, sampling

    async def sample(
        self, prompt_tokens: Sequence[int], *, max_tokens: int, stop: list[int] | list[str], seed: int | None
    ) -> SampledTurn:
        now = self._newest.current
        policy = TinkerPolicy(now.client, now.version, self._sampling)
        return await policy.sample(prompt_tokens, max_tokens=max_tokens, stop=stop, seed=seed)
