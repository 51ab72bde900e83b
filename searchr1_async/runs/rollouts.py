"""Rollouts without training, of an evaluation or of ``rollout()``: their watchers, service, engine and means.

Training opens its engine here as well (:func:`engine_on`), and evaluates its held-out questions (:func:`evaluate_policy`).
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import anyio

from searchr1_async.boundary.settings import Count, Seconds, Share, check_settings, settings_of
from searchr1_async.boundary.signals import ending_cleanly
from searchr1_async.config import (
    MAX_SERVICE_OUTAGE,
    AskConfig,
    EpisodeLimits,
    EpisodeSettings,
    LocalOptions,
    RolloutConfig,
    SamplingSettings,
)
from searchr1_async.episodes.formats import check_format
from searchr1_async.episodes.prompts import Method
from searchr1_async.episodes.rendering import check_thinking
from searchr1_async.episodes.rewards import RecipeReward, RewardFunction
from searchr1_async.episodes.types import Group, Passage, Question, SearchCall
from searchr1_async.errors import ConfigurationError, SearchError, first_error, ungrouped
from searchr1_async.events import (
    Emit,
    EndReason,
    EvaluationFinished,
    Notice,
    PhaseAdvanced,
    PhaseEnded,
    PhaseStarted,
    RunEnded,
    RunStarted,
    Watchers,
    emit_nothing,
)
from searchr1_async.records.metrics import CURVES, EpisodeMeans
from searchr1_async.rollout.engine import GroupToPlay, RolloutEngine, open_engine
from searchr1_async.rollout.messages import WorkerSpec
from searchr1_async.rollout.player import GroupPolicy, TinkerPolicy
from searchr1_async.runs.evaluation import Evaluation
from searchr1_async.runs.weights import RECIPE_EPISODES, EpisodeChoice, Weights, described_differences, model_name
from searchr1_async.search.search import Search
from searchr1_async.service.availability import watching_service
from searchr1_async.service.connection import Service, ServiceName, find_endpoint
from searchr1_async.service.opening import check_chat_format, check_service, open_service
from searchr1_async.watch.episode_parts import remember_tokenizer
from searchr1_async.watch.pace import PaceWarning
from searchr1_async.watch.views import Choice, View, open_view


@dataclass(frozen=True, slots=True)
class PlaySettings:
    """How episodes are rolled out and scored; validated on creation."""

    reward: RewardFunction
    sampling: SamplingSettings
    episodes: EpisodeChoice = RECIPE_EPISODES
    """Open are only settings without a default: of the chat format, the prompt and the search."""
    group_size: Count = 1
    """Episodes per question."""
    max_failed_fraction: Share = 0.2
    """Fraction of failed episodes above which the work stops: a service is broken."""

    @property
    def limits(self) -> EpisodeLimits:
        return self.episodes.limits

    def __post_init__(self) -> None:
        check_settings(self)
        _ = self.limits  # checks them together
        check_format(self.episodes.format_name)


@dataclass(frozen=True, slots=True)
class ServiceChoice:
    """Tinker service and model; see :func:`searchr1_async.service.opening.open_service`."""

    service: ServiceName = None
    model: str | None = None
    local: LocalOptions = field(default_factory=LocalOptions)
    tokenizer: str | None = None
    max_service_outage: Seconds = MAX_SERVICE_OUTAGE
    """Seconds to wait for a service that does not answer."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.service is not None:
            find_endpoint(self.service)


@asynccontextmanager
async def watching(title: str, progress: Choice, emit: Emit | None) -> AsyncIterator[Watchers]:
    """The subscribers to the events of some work, which are told how it ended.

    Raises the package's first error of an exception group; Ctrl-C cancels the task.
    """
    view = open_view(progress, title=title)  # after validation: a view that is drawn waits for its work
    task = asyncio.current_task()
    assert task is not None
    with ungrouped(), ending_cleanly(task.cancel):
        async with AsyncExitStack() as stack:
            watchers = await open_watchers(stack, view, emit)
            reason: EndReason = "stopped"
            try:
                yield watchers
                reason = "finished"
            except Exception as error:
                reason, cause = "failed", first_error(error)
                watchers(Notice(f"{type(cause).__name__}: {cause}", is_warning=True))
                raise
            finally:
                watchers(RunEnded(reason))


@asynccontextmanager
async def opened_service(
    choice: ServiceChoice, folder: Path | None, emit: Emit, *, trains: bool = False
) -> AsyncIterator[Service]:
    """Opens the service; ``folder`` holds the embedded service's checkpoints, None: a temporary folder."""
    async with AsyncExitStack() as stack:
        folder = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="searchr1-")))
        service = await stack.enter_async_context(
            open_service(
                choice.service,
                choice.model,
                folder=folder,
                local=choice.local,
                emit=emit,
                tokenizer=choice.tokenizer,
                trains=trains,
            )
        )
        remember_tokenizer(service.tokenizer)
        watch = await stack.enter_async_context(
            watching_service(
                service.client, service.url, emit, choice.max_service_outage, *(() if trains else ("the work ends",))
            )
        )
        yield replace(service, watch=watch)


async def check_model(choice: ServiceChoice, episodes: EpisodeSettings, emit: Emit, *, trains: bool = False) -> None:
    """Reports the service, and checks before it is opened that it has the model, and the model the chat format."""
    emit(Notice(find_endpoint(choice.service).text))
    model = await check_service(choice.service, choice.model, choice.local, trains=trains, emit=emit)
    await check_chat_format(model, choice.tokenizer, renderer_name=episodes.renderer, thinking=episodes.thinking)


def worker_spec(service: Service, play: PlaySettings, method: Method = "search") -> WorkerSpec:
    """How a model's episodes are rolled out; work with equal specs can share an engine."""
    return _spec(service.model_name, service.tokenizer, play, method)


def _spec(model_name: str, tokenizer: Any, play: PlaySettings, method: Method) -> WorkerSpec:
    return WorkerSpec(
        *(play.episodes.format_name, model_name, tokenizer.name_or_path, play.limits),
        renderer_name=play.episodes.renderer,
        thinking=play.episodes.thinking,
        instructions=play.episodes.instructions,
        first_turn=play.sampling.first_turn,
        method=method,
    )


def check_prompt(label: str, model_name: str, tokenizer: Any, play: PlaySettings, method: Method = "search") -> None:
    """Refuses a prompt without room for a turn, or without a matching renderer. Call it in a worker thread."""
    dialect = _spec(model_name, tokenizer, play, method).dialect(tokenizer)
    given = SearchCall(("?",), ((),)) if method == "rag" else None
    needed = len(dialect.start(Question("", "?", ("?",)), given)) + play.limits.max_tokens
    if needed > play.limits.max_trajectory_tokens:
        raise ConfigurationError(
            f"{label!r} has no room for a turn: its prompt and max_tokens={play.limits.max_tokens} need {needed} tokens without "
            f"a question, and max_trajectory_tokens is {play.limits.max_trajectory_tokens}: raise that, or lower max_tokens"
        )


def engine_on(
    service: Service, spec: WorkerSpec, search: Search | None, play: PlaySettings, emit: Emit, *, episodes: int
) -> AbstractAsyncContextManager[RolloutEngine]:
    """An engine with these settings on this service, for work that can have ``episodes`` in flight; it does not pause by itself
    while the service is silent."""
    tool = no_search if search is None else search.showing(play.episodes.n_results, play.episodes.max_passage_words)
    return open_engine(
        spec,
        service.tokenizer,
        search=tool,
        sampling=play.sampling,
        reward=play.reward,
        group_size=play.group_size,
        max_failed_fraction=play.max_failed_fraction,
        episodes=episodes,
        emit=emit,
        search_metrics=(lambda: search.statistics.metrics()) if search is not None else dict,
    )


@asynccontextmanager
async def opened_engine(
    service: Service, spec: WorkerSpec, search: Search | None, play: PlaySettings, emit: Emit, *, episodes: int
) -> AsyncIterator[RolloutEngine]:
    """As :func:`engine_on`, but it pauses while the service is silent."""
    watch = service.watch
    emit = emit if watch is None else watch.hearing(emit)
    async with engine_on(service, spec, search, play, emit, episodes=episodes) as engine:
        with nullcontext() if watch is None else watch.holding(engine.pause):
            yield engine


def started(
    kind: Literal["evaluate", "rollout"], service: Service, search: Search | None, play: PlaySettings, step: int | None
) -> RunStarted:
    """The event of work that starts."""
    return RunStarted(
        kind,
        service.model_name,
        is_embedded=service.is_local,
        is_tinker=service.is_tinker,
        embedder="none" if search is None else search.embedder_name,
        step=step or 0,
        group_size=play.group_size,
    )


@asynccontextmanager
async def opening_search(search: Search, emit: Emit) -> AsyncIterator[None]:
    """Opens the search beside the block (:meth:`Search.opening`), and shows the building of an index as a phase.

    Whoever measures time, or limits it, awaits :meth:`Search.opened` first.
    """
    began, has_started, has_ended = anyio.current_time(), False, False

    def on_progress(done: int, total: int) -> None:
        nonlocal has_started, has_ended
        if has_ended:
            return
        if not has_started:
            emit(PhaseStarted("index", total, "passages"))
        emit(PhaseAdvanced("index", done))
        if done >= total:
            emit(PhaseEnded("index", anyio.current_time() - began))
        has_started, has_ended = True, done >= total

    async with search.opening(on_progress, lambda text: emit(Notice(text))):
        yield


@asynccontextmanager
async def playing(
    search: Search,
    config: RolloutConfig | AskConfig,
    weights: Weights,
    service: ServiceName,
    *,
    questions: int,
    reward: RewardFunction | None = None,
    tells_differences: bool = False,
    progress: Choice = True,
    emit: Emit | None = None,
) -> AsyncIterator[tuple[RolloutEngine, TinkerPolicy, PlaySettings]]:
    """An engine, a policy and their settings for a plain rollout; closes its services at the end.

    Args:
        questions: how many are rolled out.
        tells_differences: warn where the settings differ from how the weights were trained.

        The others as in :func:`searchr1_async.rollout` and :func:`searchr1_async.ask`.
    """
    model = model_name(config.model.name, service)
    check_thinking(model, config.episode.renderer, config.episode.thinking)
    episodes = weights.episodes(EpisodeChoice().completed_by(config.episode), search).completed_by(RECIPE_EPISODES)
    play = settings_of(
        PlaySettings, config.flat(), reward=reward or RecipeReward(), sampling=config.sampling, episodes=episodes
    )
    choice = settings_of(
        ServiceChoice,
        config.flat(),
        service=service,
        model=model or weights.base_model,
        local=config.local,
        tokenizer=config.model.tokenizer or weights.tokenizer,
    )
    async with watching("rollout", progress, emit) as watchers:
        found = weights.trained.differences(episodes) if tells_differences and weights.trained is not None else None
        if found:
            text = f"the weights of {weights.run} are rolled out with {described_differences(found)}"
            watchers(Notice(text, is_warning=True))
        await check_model(choice, episodes, watchers)
        async with (
            opening_search(search, watchers),
            opened_service(choice, weights.service_folder, watchers) as opened,
        ):
            watchers(started("rollout", opened, search, play, weights.step))
            spec, episodes = worker_spec(opened, play), questions * play.group_size
            async with opened_engine(opened, spec, search, play, watchers, episodes=episodes) as engine:
                policy = await policy_of(opened, weights, play.sampling)
                await search.opened()
                yield engine, policy, play


async def policy_of(service: Service, weights: Weights, sampling: SamplingSettings) -> TinkerPolicy:
    """A policy of these weights; :class:`ServiceError` if they no longer exist."""
    return TinkerPolicy(await service.create_sampling_client(weights.path), weights.step or 0, sampling)


async def no_search(queries: Sequence[str]) -> Sequence[Sequence[Passage]]:
    """The search of work that never searches; raises a fatal :class:`SearchError`."""
    raise SearchError("an episode searched, but no search was given: pass one to evaluate()", is_fatal=True)


async def open_watchers(stack: AsyncExitStack, view: View | None, emit: Emit | None) -> Watchers:
    """The subscribers to some work's events; the view closes with the stack."""
    watchers = Watchers()
    watchers.subscribe(PaceWarning(watchers))
    if view is not None:
        watchers.subscribe(await stack.enter_async_context(view))
    if emit is not None:
        watchers.subscribe(emit)
    return watchers


async def play_all(
    engine: RolloutEngine,
    questions: Sequence[Question],
    policy: GroupPolicy,
    *,
    samples: int,
    phase: str,
    label: str,
    yields: bool = False,
) -> list[Group]:
    """Rolls out all questions and returns their groups in question order, with progress as a phase.

    ``yields``: give way to other rollouts on the same engine. Raises, within an exception group, what
    :meth:`RolloutEngine.play_groups` raises.
    """
    groups: dict[int, Group] = {}
    means = RunningMeans()
    emit, began = engine.emit, anyio.current_time()
    # Silences training-episode events: the phase reports progress.
    engine = replace(engine, group_size=samples, emit=emit_nothing)
    emit(PhaseStarted(phase, len(questions), "questions", label))
    budget = engine.failure_budget(len(questions))

    def finished(place: int, group: Group) -> None:
        groups[place] = group
        means.add(group, samples)
        emit(PhaseAdvanced(phase, len(groups), means.metrics()))

    await engine.play_groups(
        GroupToPlay(engine.task(place, question, key="0", yields=yields), policy, budget, partial(finished, place))
        for place, question in enumerate(questions)
    )
    emit(PhaseEnded(phase, anyio.current_time() - began))
    return [groups[place] for place in range(len(questions))]


async def evaluate_policy(
    engine: RolloutEngine,
    questions: Sequence[Question],
    policy: GroupPolicy,
    *,
    samples: int,
    label: str,
    step: int,
    yields: bool = False,
) -> Evaluation:
    """Evaluates a policy; arguments and errors as in :func:`play_all`."""
    groups = await play_all(engine, questions, policy, samples=samples, phase="evaluate", label=label, yields=yields)
    episodes = tuple(episode for group in groups for episode in (*group.episodes, *group.failed))
    evaluation = Evaluation.of(label, episodes, step)
    # In a thread: aggregates all scores.
    engine.emit(EvaluationFinished(label, step, await anyio.to_thread.run_sync(evaluation.metrics)))
    return evaluation


@dataclass(slots=True)
class RunningMeans:
    """Running means for progress display; final metrics treat failures exactly."""

    questions: int = 0
    right: float = 0.0
    failed: int = 0
    finished: EpisodeMeans = field(default_factory=EpisodeMeans)

    def add(self, group: Group, samples: int) -> None:
        self.questions += 1
        self.failed += len(group.failed)
        self.right += sum(episode.reward_parts.get("correct", 0.0) for episode in group.episodes) / samples
        for episode in group.episodes:
            self.finished.add(episode)

    def metrics(self) -> dict[str, float]:
        means = self.finished.metrics() | {"correct": self.right / self.questions}
        out = {curve.name: means[curve.name] for curve in CURVES if curve.name in means}
        if self.failed:
            out["failed_episodes"] = float(self.failed)
        return out
