"""The work of an evaluation: services opened one after another, each playing and judging what its systems miss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from searchr1_async.episodes.rendering import select_renderer
from searchr1_async.episodes.table import EpisodeRow
from searchr1_async.episodes.types import Episode, Group, Question
from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.episode_store import EpisodeStore, SampleKey
from searchr1_async.evaluation.judge import FoundJudge, judge_samples, open_judge
from searchr1_async.evaluation.manifest import Manifest, SystemRecord
from searchr1_async.evaluation.report import evaluation_of
from searchr1_async.events import (
    Emit,
    EvaluationFinished,
    Notice,
    PhaseAdvanced,
    PhaseEnded,
    PhaseStarted,
    emit_nothing,
)
from searchr1_async.rollout.engine import GroupToPlay, RolloutEngine
from searchr1_async.rollout.messages import WorkerSpec
from searchr1_async.rollout.player import TinkerPolicy
from searchr1_async.runs.folder import keep_tokenizer
from searchr1_async.runs.rollouts import (
    PlaySettings,
    RunningMeans,
    ServiceChoice,
    check_prompt,
    opened_engine,
    opened_service,
    opening_search,
    policy_of,
    started,
    worker_spec,
)
from searchr1_async.search.search import Search
from searchr1_async.service.connection import Service, is_embedded
from searchr1_async.service.opening import check_service, load_tokenizer_of


@dataclass(frozen=True)
class EvaluationJob:
    """An evaluation that is ready to run."""

    manifest: Manifest
    questions: tuple[Question, ...]
    """All questions, suite after suite; a question's index here identifies it everywhere."""
    search: Search | None
    """None if every system answers directly."""
    play: PlaySettings
    """``group_size`` is the number of samples per question. Episode settings are those that systems leave open."""
    choice: ServiceChoice
    judge: FoundJudge | None = None

    def settings_of(self, record: SystemRecord) -> PlaySettings:
        return replace(self.play, episodes=record.episodes(self.play.episodes))


def interleaved(sizes: Sequence[int]) -> list[int]:
    """Question indices in rollout order, with each suite spread evenly over the whole.

    Every suite then has running scores from the start, and no suite's slowest questions pile up at the end.

    Args:
        sizes: questions of each suite.
    """
    places = [((number + 0.5) / size, suite, number) for suite, size in enumerate(sizes) for number in range(size)]
    return [sum(sizes[:suite]) + number for _, suite, number in sorted(places)]


# --- services -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServiceStage:
    choice: ServiceChoice
    folder: Path | None
    """The embedded service's folder with their weights, if any."""
    systems: tuple[SystemRecord, ...]


def service_stages(choice: ServiceChoice, systems: Sequence[SystemRecord]) -> list[ServiceStage]:
    """The services to open in sequence, each with its systems in input order.

    One per model and, if embedded, per folder of weights: an embedded service sees only its own folder, and two at once would
    compete for cores. A base model uses the service of the first weights trained from it.
    """
    stages: dict[tuple[str, Path | None], list[SystemRecord]] = {}
    has_folders = is_embedded(choice.service)
    for record in sorted(systems, key=lambda each: each.folder is None):
        key = record.model, record.folder if has_folders else None
        if key[1] is None:
            key = next((other for other in stages if other[0] == record.model), key)
        stages.setdefault(key, []).append(record)
    return [
        ServiceStage(replace(choice, model=model), folder, tuple(sorted(own, key=systems.index)))
        for (model, folder), own in stages.items()
    ]


OpenedStage = tuple[ServiceStage, Service | None]
"""A stage and its service; None for an embedded service, which starts when its stage runs."""


async def open_stages(
    job: EvaluationJob, systems: Sequence[SystemRecord], stack: AsyncExitStack, emit: Emit
) -> list[OpenedStage]:
    """Connects to the services and checks models, prompts, weights and the judge. Writes nothing.

    ``stack`` closes the services. Raises ConfigurationError or ServiceError if something is not available.
    """
    opened: list[OpenedStage] = []
    for stage in service_stages(job.choice, systems):
        if is_embedded(job.choice.service):
            await _check_embedded(job, stage)
            opened.append((stage, None))
            continue
        service = await stack.enter_async_context(opened_service(stage.choice, None, emit))
        await _check_prompts(job, stage, service.model_name, service.tokenizer)
        for weights in {record.checkpoint: record.weights for record in stage.systems}.values():
            await policy_of(service, weights, job.play.sampling)
        if job.judge is not None:
            await open_judge(job.judge, service)
        opened.append((stage, service))
    return opened


async def _check_embedded(job: EvaluationJob, stage: ServiceStage) -> None:
    model = await check_service(stage.choice.service, stage.choice.model, stage.choice.local)
    tokenizer = await load_tokenizer_of(model, stage.choice.tokenizer)
    await _check_prompts(job, stage, model, tokenizer)
    if (found := job.judge) is None:
        return
    await anyio.to_thread.run_sync(select_renderer, model, tokenizer, found.judge.renderer)
    if found.weights.service_folder not in (None, stage.folder):
        raise ConfigurationError(
            f"an embedded service has the weights of one folder: the one of {stage.systems[0].label!r} lacks the judge's, "
            f"which are in {found.weights.service_folder}. Judge with the base model, or evaluate on a service that has both"
        )


async def _check_prompts(job: EvaluationJob, stage: ServiceStage, model: str, tokenizer: Any) -> None:
    for each in stage.systems:
        await anyio.to_thread.run_sync(check_prompt, each.label, model, tokenizer, job.settings_of(each), each.method)


# --- playing ------------------------------------------------------------------------------------------------------------


class Playing:
    """Rolls out and judges the missing samples of all suites and systems; the phase counts those of earlier sessions too."""

    def __init__(self, job: EvaluationJob, store: EpisodeStore, emit: Emit, done: set[SampleKey]) -> None:
        self._job, self._store, self._emit, self._done = job, store, emit, done
        self._order = interleaved([len(suite.question_ids) for suite in job.manifest.suites])
        self._writer = store.gathered(store.write)
        self._means: dict[str, RunningMeans] = {}
        systems = job.manifest.systems
        self._total = len(job.questions) * job.play.group_size * len(systems)
        self._finished = self._total - sum(self._missing(each.label) for each in systems)
        self._has_started = False

    def _open_samples(self, label: str) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Question indices with missing samples, each with the missing sample numbers."""
        for place in self._order:
            samples = tuple(n for n in range(self._job.play.group_size) if (label, place, n) not in self._done)
            if samples:
                yield place, samples

    def _missing(self, label: str) -> int:
        return sum(len(samples) for _, samples in self._open_samples(label))

    async def run(self, stages: list[OpenedStage] | None, services: AsyncExitStack) -> None:
        """Rolls out and judges missing samples; opens the stages if they are not open yet and something is missing."""
        job = self._job
        # Episodes that are yet to be rolled out will need a verdict.
        judges = job.judge is not None and (self._finished < self._total or not self._store.unjudged().is_empty())
        wanted = [each for each in job.manifest.systems if judges or self._missing(each.label)]
        if not wanted:
            self._emit(Notice(f"nothing to do: all {self._total:,} episodes are finished"))
            return
        if self._finished:
            self._emit(Notice(f"resuming: {self._finished:,} of {self._total:,} episodes are finished"))
        if stages is None:
            stages = await open_stages(job, wanted, services, self._emit)
        async with AsyncExitStack() as stack:
            if job.search is not None and any(each.method != "direct" for each in wanted):
                await stack.enter_async_context(opening_search(job.search, self._emit))
            for stage, service in stages:
                if service is not None:
                    await self._play_stage(stage, service)
                    continue
                async with opened_service(stage.choice, stage.folder, self._emit) as own_service:
                    await self._play_stage(stage, own_service)

    async def _play_stage(self, stage: ServiceStage, service: Service) -> None:
        job = self._job
        if not self._has_started:
            self._has_started = True
            self._emit(started("evaluate", service, job.search, job.play, stage.systems[0].step))
        if self._store.is_kept:
            await keep_tokenizer(service.tokenizer, self._store.folder)
        if job.search is not None:
            await job.search.opened()
        by_settings: dict[tuple[WorkerSpec, int | None, int | None], list[SystemRecord]] = {}
        for each in stage.systems:
            if self._missing(each.label):
                play = job.settings_of(each)
                key = worker_spec(service, play, each.method), play.episodes.n_results, play.episodes.max_passage_words
                by_settings.setdefault(key, []).append(each)
        for (spec, *_), own in by_settings.items():
            await self._play_pool(service, spec, own)
        if job.judge is not None:
            await judge_samples(job.judge, self._store, [each.label for each in stage.systems], service, self._emit)

    async def _play_pool(self, service: Service, spec: WorkerSpec, systems: list[SystemRecord]) -> None:
        """Systems with equal settings share an engine; the next starts while the last episodes of the previous finish."""
        job, began = self._job, anyio.current_time()
        play = job.settings_of(systems[0])
        missing = sum(self._missing(each.label) for each in systems)
        policies = [(each, await policy_of(service, each.weights, play.sampling)) for each in systems]
        self._emit(PhaseStarted("evaluate", self._total, "episodes", ", ".join(each.label for each in systems)))
        self._emit(PhaseAdvanced("evaluate", self._finished))
        async with (
            self._writer.writing(),
            opened_engine(service, spec, job.search, play, self._emit, episodes=missing) as engine,
        ):
            # Silences training-episode events: the phase reports progress.
            await engine.play_groups(self._groups(replace(engine, emit=emit_nothing), policies))
        self._emit(PhaseEnded("evaluate", anyio.current_time() - began))
        scores = await anyio.to_thread.run_sync(self._store.scores)
        for each in systems:
            found = evaluation_of(each.label, scores, each.step, self._store)
            self._emit(EvaluationFinished(each.label, found.step, found.metrics()))

    def _groups(self, engine: RolloutEngine, systems: list[tuple[SystemRecord, TinkerPolicy]]) -> Iterator[GroupToPlay]:
        for record, policy in systems:
            budget = engine.failure_budget(len(self._job.questions))
            for place, samples in self._open_samples(record.label):
                yield GroupToPlay(
                    engine.task(place, self._job.questions[place], key="0", members=samples),
                    policy,
                    budget,
                    partial(self._advance, record.label, len(samples)),
                    partial(self._take, record, place),
                )

    def _advance(self, label: str, episodes: int, group: Group) -> None:
        means = self._means.setdefault(label, RunningMeans())
        means.add(group, self._job.play.group_size)
        self._finished += episodes
        self._emit(PhaseAdvanced("evaluate", self._finished, means.metrics()))

    def _take(self, record: SystemRecord, place: int, sample: int, episode: Episode) -> None:
        row = EpisodeRow(episode, record.step, record.label, group=place, member=sample, trained=False)
        self._writer.take(row)
