"""One question to a model: :func:`ask`, the same for a run while it trains, and the :class:`Answer`.

There is no golden answer, so there is no reward and no group, and nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace

import anyio
import tinker

from searchr1_async.billing import TokenUsage, sampling_usage
from searchr1_async.boundary.paths import FilePath
from searchr1_async.boundary.settings import checked_arguments
from searchr1_async.config import AskConfig, EpisodeLimits, EpisodeSettings, SamplingSettings
from searchr1_async.episodes.formats import Dialect
from searchr1_async.episodes.play import Policy, SearchTool, play
from searchr1_async.episodes.types import Episode, Passage, Question, SearchCall, Turn
from searchr1_async.errors import ConfigurationError, QuestionsError, SearchError, ServiceError
from searchr1_async.events import BesideSampled, Emit
from searchr1_async.rollout.player import NewestWeights, TinkerPolicy
from searchr1_async.runs.folder import kept_search
from searchr1_async.runs.rollouts import playing
from searchr1_async.runs.weights import (
    EpisodeChoice,
    GivenSearch,
    GivenWeights,
    Step,
    Weights,
    find_weights,
    named_passages,
    refuse_other_service,
    shown_passages,
)
from searchr1_async.search.search import Search
from searchr1_async.service.connection import Service
from searchr1_async.watch.episodes_page import episode_html, episode_text
from searchr1_async.watch.views import Choice


@dataclass(frozen=True, repr=False)
class Answer:
    """An answer; ``print(answer)`` and a notebook cell show the question and every turn with its searches and passages."""

    episode: Episode
    """The episode, token by token, without a reward."""
    checkpoint: str | None = None
    """``tinker://`` path of the weights; None for the base model, and for the newest weights of a running run, which may be
    unsaved."""
    step: int | None = None
    """Optimizer steps behind the weights; None if unknown."""

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
        return f"Answer({self.question!r}: {self.answer!r}, searches={len(self.searches)})"


ASKED = "asked"
"""Id and data source of a user's question."""


def asked_question(text: str) -> Question:
    """A question without a golden answer; refuses an empty text."""
    if not isinstance(text, str) or not text.strip():
        raise QuestionsError(f"{text!r} is no question: pass its text, such as 'Which country …?'")
    return Question(ASKED, text, data_source=ASKED)


async def play_asked(
    question: Question, *, dialect: Dialect, policy: Policy, search: SearchTool, limits: EpisodeLimits, seed: int | None
) -> Episode:
    """Rolls out one unscored episode. It may end without an answer, but a failed service raises."""
    try:
        return await play(
            question, dialect=dialect, policy=policy, search=search, limits=limits, seed=seed, raises_faults=True
        )
    except (ServiceError, SearchError) as fault:
        raise type(fault)(f"the question was not answered: {fault}. Fix that service and ask again.") from fault


@dataclass(slots=True)
class LiveAnswers:
    """Answers questions beside a run's training, with its service, newest weights and prompt.

    It bypasses the engine's concurrency limit, behind which a question would wait for thousands of episodes, or forever in a
    paused run. Only its tokens count in the run's cost, and its searches in the metrics of the run's search.
    """

    service: Service
    dialect: Dialect
    search: Search
    limits: EpisodeLimits
    newest: NewestWeights
    emit: Emit
    usage: TokenUsage = field(default_factory=TokenUsage)
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
        """
        limits = changes.completed_by(EpisodeChoice.of_limits(replace(self.limits, max_seconds=None))).limits
        policy: Policy = _NewestPolicy(self.newest, sampling)
        if weights is not None:
            client = await self.service.create_sampling_client(weights.path)
            policy = TinkerPolicy(client, weights.step or 0, sampling)
        shown = named_passages(search).completed_by(shown_passages(self.search))
        async with search or self.search as tool:
            episode = await play_asked(
                question,
                dialect=self.dialect,
                policy=policy,
                search=tool.showing(shown.n_results, shown.max_passage_words),
                limits=limits,
                seed=sampling.seed,
            )
        used = sampling_usage(episode)
        self.usage += used
        self.emit(BesideSampled(used.prompt, used.cached, used.sampled))
        if weights is not None:
            return Answer(episode, weights.path, weights.step)
        return Answer(episode, None, max((turn.policy_version for turn in episode.turns), default=None))


@dataclass(frozen=True, slots=True)
class _NewestPolicy:
    """A run's newest weights, with other sampling settings than its episodes."""

    newest: NewestWeights
    sampling: SamplingSettings

    async def sample(
        self, prompt_tokens: Sequence[int], *, max_tokens: int, stop: list[int] | list[str], seed: int | None
    ) -> Turn:
        now = self.newest.current
        policy = TinkerPolicy(now.client, now.version, self.sampling)
        return await policy.sample(prompt_tokens, max_tokens=max_tokens, stop=stop, seed=seed)


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
    given, config = checked_arguments(ask, locals()), config or AskConfig()
    asked = asked_question(given["question"])
    weights = find_weights(given["checkpoint"], given["step"], service_folder=given["service_folder"])
    refuse_other_service(weights, service)
    _ = weights.episodes(EpisodeChoice().completed_by(config.episode), search).limits  # refused before a corpus is read
    if search is None:
        if weights.run is None:
            raise ConfigurationError("no search given: pass one, such as ask(question, Search.local('atlas'))")
        search = await anyio.to_thread.run_sync(kept_search, weights.run)
    async with playing(search, config, weights, service, questions=1, progress=progress, emit=on_event) as (
        engine,
        policy,
        play,
    ):
        episode = await play_asked(
            asked,
            dialect=engine.dialect,
            policy=policy,
            search=search.showing(play.episodes.n_results, play.episodes.max_passage_words),
            limits=play.limits,
            seed=play.sampling.seed,
        )
        return Answer(episode, weights.path, weights.step)
    raise AssertionError("playing() hides no exception")
