"""Playing one question that has no golden answer: no reward, no group, nothing recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from searchr1_async.answer import Answer
from searchr1_async.config import EpisodeLimits, SamplingSettings
from searchr1_async.connection import Service
from searchr1_async.episodes.dialect import Dialect
from searchr1_async.episodes.play import Policy, SampledTurn, SearchTool, play
from searchr1_async.episodes.types import Episode, Passage, Question
from searchr1_async.errors import QuestionsError, SearchError, ServiceError
from searchr1_async.events import BesideSampled, Emit
from searchr1_async.rollout.policy import NewestWeights, TinkerPolicy
from searchr1_async.search import Search
from searchr1_async.search.shown import ShownSearch
from searchr1_async.trained import named_passages, shown_passages
from searchr1_async.usage import TokenUsage
from searchr1_async.weights import Weights

ASKED = "asked"
"""Id and data source of a question that a person asks."""


def asked_question(text: str) -> Question:
    """The question, without a golden answer.

    Raises:
        QuestionsError: there is no text.
    """
    if not isinstance(text, str) or not text.strip():
        raise QuestionsError(f"{text!r} is no question: give its text, such as 'Which country …?'")
    return Question(ASKED, text, data_source=ASKED)


def asked_limits(limits: EpisodeLimits, changes: Mapping[str, Any]) -> EpisodeLimits:
    """The limits of an asked question: the changes that are not None, and no time limit, which is there to keep batches short.

    Raises:
        ConfigurationError: a limit out of its range.
    """
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
    """One unscored episode. It need not end with an answer, but it never ends with a fault.

    Args:
        seed: of the first turn's sample; later turns add their number. None lets the service choose.
        sampled: is called with what each turn used, as soon as it is sampled.

    Raises:
        ServiceError: the service gave no sample.
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
    raise type(fault)(f"the question was not answered: {fault}. Mend that service and ask again.") from fault


class _Services:
    """The policy and the search of one episode. Keeps the error that :func:`play` turns into a failed episode."""

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
    """Answers questions beside the training of a run, with its service, its newest weights and its prompt.

    It does not sample through the engine's gate: there one question would wait behind thousands of episodes, and for ever while
    the run is held. So a held run answers too, and nothing of it is counted in the run's samples, episodes or failures. Its searches
    are counted in those of the run where they go to the run's search, and its tokens in the run's cost.

    Args:
        service: the run's, open.
        dialect: the run's prompt and tool format.
        search: the run's.
        limits: of the run's episodes.
        newest: the newest weights, at any time.
        emit: is told of each turn's tokens.
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
        """What the answers used so far."""

    async def answer(
        self,
        question: Question,
        sampling: SamplingSettings,
        *,
        search: Search | None = None,
        limits: Mapping[str, Any],
        weights: Weights | None = None,
    ) -> Answer:
        """Plays the question.

        Args:
            search: None is the run's. Another shows as many passages as the run's, unless it was made with a number.
            limits: changes to the run's; see :func:`asked_limits`.
            weights: kept ones; None is the newest, at each turn anew: those of the turn before may be gone.

        Raises:
            ConfigurationError: a limit out of its range.
            ServiceError: the service gave no sample, or does not have the weights.
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
    """A run's newest weights, sampled with other settings than its episodes."""

    def __init__(self, newest: NewestWeights, sampling: SamplingSettings) -> None:
        self._newest, self._sampling = newest, sampling

    async def sample(
        self, prompt_tokens: Sequence[int], *, max_tokens: int, stop: list[int] | list[str], seed: int | None
    ) -> SampledTurn:
        now = self._newest.current
        policy = TinkerPolicy(now.client, now.version, self._sampling)
        return await policy.sample(prompt_tokens, max_tokens=max_tokens, stop=stop, seed=seed)
