"""The public function ``ask``: one question to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import anyio
import tinker

from searchr1_async.answer import Answer
from searchr1_async.answering import asked_question, play_asked
from searchr1_async.arguments import GivenSearch, GivenWeights, model_name
from searchr1_async.boundary.paths import FilePath, NameOrFolder
from searchr1_async.boundary.settings import Seconds, checked_arguments, settings_of
from searchr1_async.config import LocalOptions, SamplingSettings
from searchr1_async.episodes.rewards import RecipeReward
from searchr1_async.errors import ConfigurationError
from searchr1_async.events import Emit
from searchr1_async.models import Thinking
from searchr1_async.playing import PlaySettings, ServiceChoice, playing
from searchr1_async.run_folder import kept_search
from searchr1_async.search import Search
from searchr1_async.search.record import ShownSearch
from searchr1_async.service.connection import ServiceName, is_embedded
from searchr1_async.trained import EpisodeChoice
from searchr1_async.watch.dashboard import Choice
from searchr1_async.weights import Step, Weights, find_weights

SAMPLING_DEADLINE = 600.0
"""Seconds per turn: less than in training, since a person waits."""


async def ask(
    question: str,
    search: GivenSearch | None = None,
    *,
    checkpoint: GivenWeights | None = None,
    step: Step = "last",
    model: str | Path | None = None,
    service: str | tinker.ServiceClient | None = None,
    service_folder: FilePath | None = None,
    format: str | None = None,
    renderer: str | None = None,
    thinking: Thinking = None,
    instructions: str | None = None,
    max_turns: int | None = None,
    max_tokens: int | None = None,
    max_trajectory_tokens: int | None = None,
    malformed_calls: Literal["end", "tell"] | None = None,
    temperature: float = 0.0,
    seed: int | None = None,
    sampling_deadline: Seconds = SAMPLING_DEADLINE,
    local: LocalOptions | None = None,
    tokenizer: NameOrFolder | None = None,
    progress: Choice = "quiet",
    emit: Emit | None = None,
) -> Answer:
    """Asks a model one question: runs one episode with the search and returns it with its answer.

    ::

        await sr.ask("Which river flows through Bamako?", checkpoint="runs/first")

    Needs no golden answer and computes no reward. With a run's weights, None means the run's own setting (prompt, format, limits),
    its search as kept in its folder, and its tokenizer.

    Args:
        question: the question's text.
        search: the tool; None: the search of the run in ``checkpoint``, rebuilt from the run's folder.
        checkpoint: a run's folder, a ``tinker://…/sampler_weights/…`` path, or None for the base model.
        step: for a run: its last kept weights (``"last"``), its best on the held-out questions (``"best"``), or a step's number.
        model: the base model; None: the run's, else the service's default.
        service: base URL or client of a Tinker service; None as in :func:`searchr1_async.train`. The embedded service opens
            a run's weights in the run's folder.
        service_folder: the embedded service's folder with a ``tinker://`` checkpoint; not needed for a run's folder.
        format: tool-call format; None: the run's, else ``"hermes"``.
        renderer: chat format; None: the run's, else chosen by the model's name.
        thinking: as in :func:`searchr1_async.train`; None: the run's, else the format's default.
        instructions: the system prompt; None: the run's, else the format's own.
        max_turns, max_tokens, max_trajectory_tokens, malformed_calls: limits of the episode; None: the run's, else the default of
            :class:`~searchr1_async.config.EpisodeLimits`. A run's episode time limit does not apply.
        temperature: 0 is greedy; 1 samples as in training.
        seed: for sampling; None lets the service choose.
        sampling_deadline: seconds per turn.
        local: options of the embedded service.
        tokenizer: a folder or name; None: the run's, else the model's own.
        progress: ``"quiet"`` reports what it waits for after 5 seconds; see :func:`searchr1_async.train` for the others.
        emit: receives the events of opening the services.

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
    weights = find_weights(checkpoint, step, service_folder=service_folder)
    _check_service(weights, service)
    choice = settings_of(EpisodeChoice, given)
    _ = weights.episodes(choice, search).limits  # refused before a corpus is read
    search = search or await _search_of(weights)
    play = PlaySettings(
        reward=RecipeReward(),
        sampling=settings_of(SamplingSettings, given, deadline=given["sampling_deadline"]),
        **weights.episodes(choice, search).play(),
    )
    async with playing(
        search,
        play,
        ServiceChoice(
            service, model_name(model, service), local or LocalOptions(), given["tokenizer"] or _tokenizer_of(weights)
        ),
        weights=weights,
        progress=progress,
        emit=emit,
    ) as (engine, policy):
        episode = await play_asked(
            asked,
            dialect=engine.dialect,
            policy=policy,
            search=ShownSearch(search, play.n_results, play.max_passage_words),
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
