""":func:`evaluate`: claims the folder, rolls out and judges what is missing, builds the report."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from typing import Any, cast

import anyio
import polars as pl
import tinker

from searchr1_async.boundary.paths import FilePath, write_parquet
from searchr1_async.boundary.settings import checked_arguments, settings_of
from searchr1_async.config import EvalConfig, SamplingSettings
from searchr1_async.config.configs import takes_config
from searchr1_async.data.questions import Questions, optional_questions
from searchr1_async.data.suites import Suites, load_suites
from searchr1_async.episodes.rendering import check_thinking
from searchr1_async.episodes.reward import RecipeReward, RewardFunction
from searchr1_async.errors import RunFolderError
from searchr1_async.evaluation.episode_store import EpisodeStore, EpisodeWriter, Pool, PoolProgress, SampleKey
from searchr1_async.evaluation.job_manifest import (
    continued,
    describe,
    refuse_changes,
    refuse_overrides,
    repeated_job,
    repeats,
)
from searchr1_async.evaluation.judge import Judge, archive_verdicts, judge_samples
from searchr1_async.evaluation.manifest import (
    QUESTIONS_NAME,
    Manifest,
    asked_questions,
    interleaved,
    questions_frame,
)
from searchr1_async.evaluation.plan import (
    EvaluationJob,
    OpenedStage,
    ServiceStage,
    open_stages,
    service_stages,
    settled,
)
from searchr1_async.evaluation.report import Report, evaluation_of, make_report
from searchr1_async.evaluation.systems import (
    MeasuredSystem,
    System,
    SystemSource,
    find_systems,
    search_of_runs,
    with_baselines,
)
from searchr1_async.events import Emit, EvaluationFinished, Notice, PhaseAdvanced, PhaseEnded, PhaseStarted
from searchr1_async.rollout.player import TinkerPolicy
from searchr1_async.rollout.workers.messages import WorkerSpec
from searchr1_async.runs.folder import MANIFEST_NAME, claimed, keep_tokenizer, writing_records
from searchr1_async.runs.rollouts import (
    PlaySettings,
    ServiceChoice,
    open_search,
    opened_engine,
    opened_service,
    policy_of,
    started,
    watching,
    worker_spec,
)
from searchr1_async.runs.weights import RECIPE_EPISODES, EpisodeChoice, GivenSearch, described_differences, model_name
from searchr1_async.service.connection import Service, find_endpoint
from searchr1_async.trackers import make_trackers, open_trackers
from searchr1_async.watch.dashboard import Choice
from searchr1_async.watch.subscribers import Watchers

_RUN_FILES = ("state.json", "checkpoints.json", "metrics", "evaluations", "unlearned")


async def run_evaluation(job: EvaluationJob, watchers: Watchers, opened: AsyncExitStack) -> Report:
    """Rolls out and judges missing samples, then builds the report.

    ``opened`` receives the folder's lock and event log, which must outlive the last event. Raises SearchR1Errors, also within
    exception groups; finished episodes are kept in ``out_dir``.
    """
    watchers(Notice(find_endpoint(job.choice.service).text))
    job = await settled(job, watchers)
    asked = questions_frame(asked_questions(job.suites))
    # In a thread: reads the whole corpus and the runs' training questions.
    manifest = await anyio.to_thread.run_sync(describe, job, asked)
    _report_settings(job, manifest, watchers)
    async with AsyncExitStack() as services:
        stages = await _validate(job, manifest, services, watchers)
        if job.out_dir is not None:
            opened.enter_context(claimed(job.out_dir))
            for tracker in await opened.enter_async_context(open_trackers(make_trackers((), job.out_dir))):
                watchers.subscribe(tracker)
        store = EpisodeStore(job.out_dir)
        with _removing_on_error(store):
            manifest, done = await anyio.to_thread.run_sync(_begin, job, store, manifest, asked)
            await _Evaluation(job, store, watchers, done).run(stages, services)
    with writing_records(store.folder):
        await anyio.to_thread.run_sync(store.finish)
    return await anyio.to_thread.run_sync(make_report, store, manifest)


def _report_settings(job: EvaluationJob, manifest: Manifest, emit: Emit) -> None:
    """Emits which systems use a run's training settings, and where settings differ from training."""
    for measured, record in zip(job.systems, manifest.systems, strict=True):
        if record.like is not None and measured.system.method == "search":
            settings = str(job.settings_of(measured).episodes) or "the defaults"
            emit(Notice(f"{record.label!r} uses the training settings of the run in {record.like}: {settings}"))
        if record.differences:
            found = described_differences(record.differences)
            emit(
                Notice(f"{record.label!r} is evaluated with other settings than in training: {found}", is_warning=True)
            )


async def _validate(
    job: EvaluationJob, manifest: Manifest, services: AsyncExitStack, emit: Emit
) -> list[OpenedStage] | None:
    """Validates the job before anything is written. Returns the opened services, or None for a resumed evaluation, which may
    need none."""
    earlier = None if job.out_dir is None else await anyio.to_thread.run_sync(Manifest.load, job.out_dir)
    if earlier is not None and job.out_dir is not None:
        refuse_changes(earlier, manifest, job.out_dir, resume=job.resume)
        return None
    _refuse_run(job)
    return await open_stages(job, service_stages(job, job.systems), services, emit)


@contextmanager
def _removing_on_error(store: EpisodeStore) -> Iterator[None]:
    """On an error before the first episode, removes the new evaluation's files so that a corrected call can reuse the folder."""
    is_new = not (store.folder / MANIFEST_NAME).exists()
    try:
        yield
    except BaseException:
        if is_new and not store.frame().head(1).collect().height:
            for name in (MANIFEST_NAME, QUESTIONS_NAME):  # manifest first: without it there is no evaluation
                (store.folder / name).unlink(missing_ok=True)
            shutil.rmtree(store.folder / "tokenizer", ignore_errors=True)
        raise


def _refuse_run(job: EvaluationJob) -> None:
    """Refuses a training run's folder, whose files would be overwritten."""
    if job.out_dir is not None and any((job.out_dir / name).exists() for name in _RUN_FILES):
        raise RunFolderError(
            f"{job.out_dir} contains a training run: choose another out_dir, such as {job.out_dir}/evaluation"
        )


def _begin(
    job: EvaluationJob, store: EpisodeStore, manifest: Manifest, asked: pl.DataFrame
) -> tuple[Manifest, set[SampleKey]]:
    """Writes manifest and questions, or loads an earlier session; returns the manifest and the finished samples."""
    earlier = Manifest.load(store.folder)
    if earlier is not None:
        refuse_changes(earlier, manifest, store.folder, resume=job.resume)
        manifest = continued(earlier, manifest)
        with writing_records(store.folder):
            archive_verdicts(store.folder, earlier.judge, manifest.judge)
            if manifest != earlier:
                manifest.save(store.folder)
            archive_verdicts(store.folder, manifest.judge, manifest.judge)
        return manifest, store.load()
    _refuse_run(job)
    with writing_records(store.folder):
        write_parquet(store.folder / QUESTIONS_NAME, asked)
        manifest.save(store.folder)
    return manifest, set()


class _Evaluation:
    def __init__(self, job: EvaluationJob, store: EpisodeStore, watchers: Watchers, done: set[SampleKey]) -> None:
        self._job, self._store, self._emit = job, store, watchers
        questions = asked_questions(job.suites)
        self._writer = EpisodeWriter(store)
        self._pool = Pool(questions, interleaved(job.suites), job.samples, done, self._writer)
        total = len(questions) * job.samples * len(job.systems)
        self._open = {each.label: self._pool.count_open(each.label) for each in job.systems}
        self._total = total
        self._progress = PoolProgress(job.samples, watchers, total - sum(self._open.values()))
        self._has_started = False

    async def run(self, stages: list[OpenedStage] | None, services: AsyncExitStack) -> None:
        """Rolls out and judges missing samples; opens the stages if they are not open yet and something is missing."""
        job = self._job
        judges = job.judge is not None and await anyio.to_thread.run_sync(self._is_unjudged)
        wanted = [each for each in job.systems if self._open[each.label] or judges]
        if not wanted:
            self._emit(Notice(f"nothing to do: all {self._total:,} episodes are finished"))
            return
        if self._progress.done:
            self._emit(Notice(f"resuming: {self._progress.done:,} of {self._total:,} episodes are finished"))
        if stages is None:
            stages = await open_stages(job, service_stages(job, wanted), services, self._emit)
        async with AsyncExitStack() as stack:
            if job.search is not None and any(each.system.method != "direct" for each in wanted):
                await open_search(job.search, self._emit)
                await stack.enter_async_context(job.search)
            for stage, service in stages:
                if service is not None:
                    await self._play_stage(stage, service)
                    continue
                async with opened_service(stage.choice, stage.folder, self._emit) as own_service:
                    await self._play_stage(stage, own_service)

    def _is_unjudged(self) -> bool:
        # Episodes that are yet to be rolled out will need a verdict.
        return any(self._open.values()) or not self._store.unjudged().is_empty()

    async def _play_stage(self, stage: ServiceStage, service: Service) -> None:
        job = self._job
        if not self._has_started:
            self._has_started = True
            self._emit(started("evaluate", service, job.used_search, job.play, stage.systems[0].weights.step))
        if job.out_dir is not None:
            await keep_tokenizer(service.tokenizer, job.out_dir)
        await self._play_systems(service, [each for each in stage.systems if self._open[each.label]])
        if job.found_judge is not None:
            await judge_samples(job.found_judge, self._store, stage.systems, service, self._emit)

    async def _play_systems(self, service: Service, systems: list[MeasuredSystem]) -> None:
        """Systems with equal settings share an engine and its pool."""
        by_settings: dict[tuple[WorkerSpec, int | None, int | None], list[MeasuredSystem]] = {}
        for measured in systems:
            play = self._job.settings_of(measured)
            spec = worker_spec(service, play, measured.system.method)
            by_settings.setdefault((spec, play.episodes.n_results, play.episodes.max_passage_words), []).append(
                measured
            )
        for (spec, *_), own in by_settings.items():
            policies = [(each, await policy_of(service, each.weights, self._job.play.sampling)) for each in own]
            await self._play_pool(service, spec, policies)
            for event in await anyio.to_thread.run_sync(self._finished, own):
                self._emit(event)

    def _finished(self, systems: list[MeasuredSystem]) -> list[EvaluationFinished]:
        scores = self._store.scores()
        found = [evaluation_of(each.label, scores, each.weights.step) for each in systems]
        return [EvaluationFinished(each.label, each.step, each.metrics()) for each in found]

    async def _play_pool(
        self, service: Service, spec: WorkerSpec, policies: list[tuple[MeasuredSystem, TinkerPolicy]]
    ) -> None:
        began, labels = anyio.current_time(), ", ".join(measured.label for measured, _ in policies)
        self._emit(PhaseStarted("evaluate", self._total, "episodes", labels))
        self._emit(PhaseAdvanced("evaluate", self._progress.done))
        play = self._job.settings_of(policies[0][0])
        async with (
            self._writer.writing(),
            opened_engine(service, spec, self._job.used_search, play, self._emit) as engine,
        ):
            await self._pool.play(engine, policies, self._progress)
        self._emit(PhaseEnded("evaluate", anyio.current_time() - began))


@takes_config(EvalConfig, emit="on_event", checkpoint="systems", service_folder="systems=System(service_folder=…)")
async def evaluate(
    suites: Suites | Manifest | Report,
    search: GivenSearch | None = None,
    systems: Mapping[str, SystemSource] | SystemSource = None,
    config: EvalConfig | None = None,
    *,
    out_dir: FilePath | None = None,
    resume: bool = False,
    service: str | tinker.ServiceClient | None = None,
    judge: Judge | None = None,
    training_questions: Questions = (),
    reward: RewardFunction | None = None,
    progress: Choice = True,
    on_event: Emit | None = None,
) -> Report:
    """Evaluates one or several systems on one or several question suites.

    All suites share one pool of episodes, so no suite waits for another's slowest. Systems with equal method, format and prompt
    on one service share the pool too; others run one after another.

    Args:
        suites: benchmark names (``"nq"``; ``"benchmarks"`` for all seven), files, folders, frames, questions, or a list of
            these; see :func:`searchr1_async.evaluation.load_suites`. Or an earlier evaluation to repeat: its folder, ``manifest.json``,
            :class:`Report` or :class:`Manifest`; arguments and settings that change what is measured are then refused.
        search: the search tool. Optional if all systems answer directly, if the evaluated runs were trained with one search
            (their folders describe it), or if a repeated manifest describes it.
        systems: what to evaluate: a run or its folder (last weights), a ``tinker://`` path, None (the base model), or a
            :class:`System`; or several of these by label.
        config: the settings; None: the defaults.
        out_dir: where episodes are written soon after they end; None keeps them as long as the report exists.
        resume: continue the evaluation in ``out_dir``: only missing and failed episodes are rolled out.
        service, reward, progress, on_event: as in :func:`searchr1_async.train`.
        judge: also judges every answer with a model, reported beside exact match. A resumed evaluation may use another judge or
            none; verdicts of different judges are kept apart.
        training_questions: additional training questions of the systems, checked for overlap; run folders know their own.

    Raises:
        ConfigurationError: invalid input; raised before any work starts or anything is written.
        ServiceError: the service is unreachable or lacks a requested model or weights.
        TooManyFailuresError: more than ``max_failed_fraction`` of a system's episodes failed; finished episodes are kept.
    """
    given = checked_arguments(evaluate, locals())
    config = config or EvalConfig()
    model = model_name(config.model.name, service)
    check_thinking(model, config.episode.renderer, config.episode.thinking)
    choice = settings_of(ServiceChoice, config.flat(), service=service, model=model, local=config.local)
    # One request per sample, so that a sample lost in a kill is reproduced on resume.
    sampling = replace(config.sampling, first_turn="split")
    if repeats(suites):
        refuse_overrides(given, config)
        job = await anyio.to_thread.run_sync(
            lambda: repeated_job(
                suites, search, choice, sampling, out_dir=given["out_dir"], resume=given["resume"], reward=reward
            )
        )
    else:
        job = await _new_job(given, config, choice, sampling)
    async with AsyncExitStack() as opened, watching("evaluate", progress, on_event) as watchers:
        return await run_evaluation(job, watchers, opened)
    raise AssertionError("watching() hides no exception")


async def _new_job(
    given: Mapping[str, Any], config: EvalConfig, choice: ServiceChoice, sampling: SamplingSettings
) -> EvaluationJob:
    chosen = config.selection
    asked = EpisodeChoice().completed_by(config.episode)
    play = settings_of(
        PlaySettings,
        config.flat(),
        reward=given["reward"] or settings_of(RecipeReward, config.flat()),
        sampling=sampling,
        episodes=asked.completed_by(RECIPE_EPISODES),
        group_size=chosen.samples,
    )
    suites = await anyio.to_thread.run_sync(
        lambda: load_suites(
            cast(Suites, given["suites"]),
            split=chosen.split,
            limit=chosen.limit,
            seed=None if chosen.limit is None else chosen.question_seed,
        )
    )
    sources = given["systems"]
    if not isinstance(sources, Mapping):
        sources = {config.label: _with_model(sources, choice.model)}
    systems = find_systems(with_baselines(sources, tuple(config.baselines)))
    return settings_of(
        EvaluationJob,
        given,
        suites=suites,
        systems=systems,
        search=given["search"] or await anyio.to_thread.run_sync(search_of_runs, systems),
        asked=asked,
        play=play,
        choice=choice,
        training_questions=optional_questions(given["training_questions"]),
    )


def _with_model(source: SystemSource, model: str | None) -> System:
    """A system without a label; the evaluation's model is its base model."""
    system = source if isinstance(source, System) else System(checkpoint=source)
    return system if system.model or system.checkpoint is None else replace(system, model=model)
