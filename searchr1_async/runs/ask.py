"""One question to a model: :func:`ask`, the same for a run while it trains, and the :class:`Answer`.

There is no golden answer, so there is no reward and no group, and nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace

import anyio
import tinker

from searchr1_async.billing import TokenUsage
from searchr1_async.boundary.paths import FilePath
from searchr1_async.boundary.settings import checked_arguments
from searchr1_async.config import AskConfig, EpisodeLimits, EpisodeSettings, SamplingSettings
from searchr1_async.config.configs import takes_config
from searchr1_async.episodes.formats import Dialect
from searchr1_async.episodes.play import Policy, SampledTurn, SearchTool, play
from searchr1_async.episodes.reward import RecipeReward
from searchr1_async.episodes.types import Episode, Passage, Question, SearchCall
from searchr1_async.errors import ConfigurationError, QuestionsError, SearchError, ServiceError
from searchr1_async.events import BesideSampled, Emit
from searchr1_async.rollout.player import NewestWeights, TinkerPolicy
from searchr1_async.runs.folder import kept_search
from searchr1_async.runs.rollouts import PlaySettings, ServiceChoice, playing
from searchr1_async.runs.weights import (
    RECIPE_EPISODES,
    EpisodeChoice,
    GivenSearch,
    GivenWeights,
    Step,
    Weights,
    find_weights,
    model_name,
    named_passages,
    shown_passages,
)
from searchr1_async.search.record import showing
from searchr1_async.search.search import Search
from searchr1_async.service.connection import Service, ServiceName, is_embedded
from searchr1_async.watch.dashboard import Choice
from searchr1_async.watch.viewer import episode_html, episode_text


@dataclass(frozen=True, repr=False)
class Answer:
    """What :func:`searchr1_async.ask` returns.

    In a notebook cell or with ``print(answer)`` it shows the question, the answer, and every turn with its searches and passages.
    """

    episode: Episode
    """The episode, token by token, without a reward."""
    checkpoint: str | None = None
    """``tinker://`` path of the weights; None for the base model, and for the newest weights of a running run, which may be
    unsaved."""
    step: int | None = None
    """Optimiser steps behind the weights; None if unknown."""

    @property
    def question(self) -> str:
        """The question's text."""
        return self.episode.question.question

    @property
    def answer(self) -> str | None:
        """The model's answer; None if the episode ended without one (see ``episode.stop_reason``)."""
        return self.episode.answer

    @property
    def searches(self) -> tuple[SearchCall, ...]:
        """The model's tool calls in order, malformed ones included (``problem`` says what is wrong)."""
        return self.episode.calls

    @property
    def passages(self) -> tuple[Passage, ...]:
        """The passages found, in order, each once."""
        found = (passage for call in self.searches for passages in call.results for passage in passages)
        return tuple({passage.id: passage for passage in found}.values())

    def _repr_mimebundle_(
        self, include: Container[str] | None = None, exclude: Container[str] | None = None
    ) -> dict[str, str]:
        return {"text/plain": str(self), "text/html": episode_html(self.episode)}

    def __str__(self) -> str:
        return episode_text(self.episode)

    def __repr__(self) -> str:
        count = len(self.searches)
        return f"Answer({self.question!r}: {self.answer!r}, {count} search{'' if count == 1 else 'es'})"


ASKED = "asked"
"""Id and data source of a user's question."""


def asked_question(text: str) -> Question:
    """A question without a golden answer; refuses an empty text."""
    if not isinstance(text, str) or not text.strip():
        raise QuestionsError(f"{text!r} is no question: pass its text, such as 'Which country …?'")
    return Question(ASKED, text, data_source=ASKED)


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
        episode = await play(
            question, dialect=dialect, policy=services, search=services.search, limits=limits, seed=seed
        )
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
            return await self._search(queries)
        except SearchError as fault:
            self.fault = fault
            raise


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
        changes: EpisodeSettings,
        weights: Weights | None = None,
    ) -> Answer:
        """Answers the question.

        Args:
            search: None: the run's. Another shows as many passages as the run's, unless it was created with its own number.
            changes: their limits replace the run's; the run's episode time limit does not apply.
            weights: kept ones; None: the newest at each turn, since the previous turn's may be gone.

        Raises:
            ConfigurationError: a limit out of range.
            ServiceError: the service returned no sample, or does not have the weights.
            SearchError: a search failed, or ``search`` cannot be opened.
        """
        limits = changes.completed_by(EpisodeChoice.of_limits(replace(self._limits, max_seconds=None))).limits
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
                search=showing(tool, shown.n_results, shown.max_passage_words),
                limits=limits,
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


@takes_config(AskConfig, emit="on_event")
async def ask(
    question: str,
    search: GivenSearch | None = None,
    config: AskConfig | None = None,
    *,
    checkpoint: GivenWeights | None = None,
    step: Step = "last",
    service: str | tinker.ServiceClient | None = None,
    service_folder: FilePath | None = None,
    progress: Choice = "quiet",
    on_event: Emit | None = None,
) -> Answer:
    """Asks a model one question: runs one episode with the search and returns it with its answer.

    ::

        await sr.ask("Which river flows through Bamako?", checkpoint="runs/first")

    Needs no golden answer and computes no reward. With a run's weights, open settings are the run's own (prompt, format, limits),
    its search is that kept in its folder, and so is its tokenizer. A run's episode time limit does not apply.

    Args:
        question: the question's text.
        search: the tool; None: the search of the run in ``checkpoint``, rebuilt from the run's folder.
        config: the settings; None: the defaults, which sample greedily.
        checkpoint: a run's folder, a ``tinker://…/sampler_weights/…`` path, or None for the base model.
        step: for a run: its last kept weights (``"last"``), its best on the held-out questions (``"best"``), or a step's number.
        service: base URL or client of a Tinker service; None as in :func:`searchr1_async.train`. The embedded service opens
            a run's weights in the run's folder.
        service_folder: the embedded service's folder with a ``tinker://`` checkpoint; not needed for a run's folder.
        progress: ``"quiet"`` reports what it waits for after 5 seconds; see :func:`searchr1_async.train` for the others.
        on_event: receives the events of opening the services.

    Returns:
        The answer, with rich display. If the episode ended without one (out of turns, a malformed call), ``answer`` is None.

    Raises:
        ConfigurationError: bad input, no such weights, or no usable search; raised before any work starts.
        ServiceError: the service is unavailable, lacks these weights, or returned no sample.
        SearchError: the search cannot be opened, or a search failed.
    """
    given = checked_arguments(ask, locals())
    asked = asked_question(given["question"])
    checkpoint, step, service_folder = given["checkpoint"], given["step"], given["service_folder"]
    config = config or AskConfig()
    weights = find_weights(checkpoint, step, service_folder=service_folder)
    _check_service(weights, service)
    choice = EpisodeChoice().completed_by(config.episode)
    _ = weights.episodes(choice, search).limits  # refused before a corpus is read
    search = search or await _search_of(weights)
    play = PlaySettings(RecipeReward(), config.sampling, weights.episodes(choice, search).completed_by(RECIPE_EPISODES))
    tokenizer = config.model.tokenizer or _tokenizer_of(weights)
    async with playing(
        search,
        play,
        ServiceChoice(service, model_name(config.model.name, service), config.local, tokenizer),
        weights=weights,
        progress=progress,
        emit=on_event,
    ) as (engine, policy):
        episode = await play_asked(
            asked,
            dialect=engine.dialect,
            policy=policy,
            search=showing(search, play.episodes.n_results, play.episodes.max_passage_words),
            limits=play.limits,
            seed=play.sampling.seed,
        )
        return Answer(episode, weights.path, weights.step)
    raise AssertionError("playing() hides no exception")


def _check_service(weights: Weights, service: ServiceName) -> None:
    """Raises :class:`ConfigurationError` if a run's weights are on another kind of service than the one that would be opened."""
    if weights.run is None or service is not None:
        return
    if is_embedded(None) and weights.service_folder is None:
        raise ConfigurationError(
            f"the weights of {weights.run} are not in its folder but on the service that trained it: pass that service=…, or set "
            "TINKER_API_KEY"
        )
    if not is_embedded(None) and weights.service_folder is not None:
        raise ConfigurationError(
            f"the weights of {weights.run} are in its folder, for the embedded service, but TINKER_API_KEY or TINKER_BASE_URL "
            "selects another: unset them, or pass service=… if that service has the weights"
        )


async def _search_of(weights: Weights) -> Search:
    if weights.run is None:
        raise ConfigurationError("no search given: pass one, such as ask(question, Search.local('atlas'))")
    return await anyio.to_thread.run_sync(kept_search, weights.run)


def _tokenizer_of(weights: Weights) -> str | None:
    folder = None if weights.run is None else weights.run / "tokenizer"
    return str(folder) if folder is not None and folder.is_dir() else None
