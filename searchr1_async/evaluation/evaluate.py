""":func:`evaluate`: plans a new evaluation or repeats an earlier one, claims the folder, runs it, builds the report."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import anyio
import msgspec
import polars as pl
import tinker

from searchr1_async.boundary.paths import FilePath, absolute_path, write_parquet
from searchr1_async.boundary.settings import checked_arguments, settings_of
from searchr1_async.config import EvalConfig, SamplingSettings
from searchr1_async.data.questions import Questions, optional_questions
from searchr1_async.data.suites import Suites, load_suites
from searchr1_async.episodes.rendering import check_thinking
from searchr1_async.episodes.rewards import RecipeReward, RewardFunction
from searchr1_async.errors import ConfigurationError, RunFolderError
from searchr1_async.evaluation.episode_store import (
    QUESTIONS_NAME,
    EpisodeStore,
    SampleKey,
    questions_digest,
    questions_frame,
    questions_of,
    read_questions,
)
from searchr1_async.evaluation.judge import Judge, find_judge, rename_old_verdicts, verdicts_name
from searchr1_async.evaluation.manifest import Manifest, refuse_changes
from searchr1_async.evaluation.plan import (
    NewEvaluation,
    System,
    SystemSource,
    describe,
    described_reward,
    find_systems,
    of_session,
    prompt_of,
    search_of_runs,
)
from searchr1_async.evaluation.report import Report, make_report
from searchr1_async.evaluation.stages import EvaluationJob, Playing, open_stages
from searchr1_async.events import Emit, Notice, Watchers
from searchr1_async.runs.folder import MANIFEST_NAME, claimed, writing_records
from searchr1_async.runs.rollouts import PlaySettings, ServiceChoice, watching
from searchr1_async.runs.weights import RECIPE_EPISODES, EpisodeChoice, GivenSearch, described_differences, model_name
from searchr1_async.search.search import Search
from searchr1_async.service.connection import find_endpoint, is_embedded
from searchr1_async.service.opening import choose_service_model
from searchr1_async.trackers import make_trackers, open_trackers
from searchr1_async.watch.views import Choice

_RUN_FILES = ("state.json", "checkpoints.json", "metrics", "evaluations", "unlearned")
"""What a training run writes into its folder."""
_REPEATABLE = (
    *("device", "dtype", "port", "start_timeout", "threads", "tokenizer", "max_service_outage"),
    *("max_episodes_in_flight", "workers", "first_turn", "sampling_deadline"),
)
"""Settings that a repetition accepts: they do not change what is measured, or a manifest may not describe them."""


async def evaluate(
    suites: Suites,
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
            these; see :func:`searchr1_async.evaluation.load_suites`. Or the folder of an earlier
            evaluation, to repeat it; arguments and settings that change what is measured are then refused.
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
    folder = given["out_dir"]
    if resume and folder is None:
        raise ConfigurationError("resume=True continues the evaluation in out_dir: pass out_dir")
    if repeats(suites):
        refuse_overrides(given, config)
        planned = await anyio.to_thread.run_sync(_repeated, suites, search, choice, sampling, reward)
    else:
        planned = await _new(given, config, choice, sampling)
    async with AsyncExitStack() as opened, watching("evaluate", progress, on_event) as watchers:
        watchers(Notice(find_endpoint(service).text))
        earlier = None if folder is None else await anyio.to_thread.run_sync(Manifest.load, folder)
        if isinstance(planned, NewEvaluation):
            planned = await _settled(planned, earlier, watchers)
            planned = await anyio.to_thread.run_sync(_job, planned)
        if earlier is not None:
            refuse_changes(earlier, planned.manifest, folder, resume=resume)
        return await _run(planned, folder, earlier, watchers, opened)
    raise AssertionError("watching() hides no exception")


async def _new(
    given: Mapping[str, Any], config: EvalConfig, choice: ServiceChoice, sampling: SamplingSettings
) -> NewEvaluation:
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
    systems = find_systems(sources, config.baselines)
    return NewEvaluation(
        suites=suites,
        systems=systems,
        search=given["search"] or await anyio.to_thread.run_sync(search_of_runs, systems),
        asked=asked,
        play=play,
        choice=choice,
        judge=given["judge"],
        training_questions=optional_questions(given["training_questions"]),
    )


def _with_model(source: SystemSource, model: str | None) -> System:
    """A system without a label; the evaluation's model is its base model."""
    system = source if isinstance(source, System) else System(checkpoint=source)
    return system if system.model or system.checkpoint is None else replace(system, model=model)


async def _settled(new: NewEvaluation, earlier: Manifest | None, emit: Emit) -> NewEvaluation:
    """With the default model resolved: from the session being resumed, else from the service.

    Raises ServiceError, or ModelError if the service offers neither the default nor another model of its family.
    """
    unnamed = [each.label for each in new.systems if new.model_of(each) is None]
    if not unnamed or is_embedded(new.choice.service):
        return new
    then = {record.label: record.model for record in earlier.systems} if earlier is not None else {}
    model = then.get(unnamed[0])
    if model is None:
        model, note = await choose_service_model(new.choice.service)
        if note is not None:
            emit(Notice(note))
    return replace(new, choice=replace(new.choice, model=model))


def _job(new: NewEvaluation) -> EvaluationJob:
    """Reads the whole corpus and the training questions: call it in a worker thread. Raises CorpusError."""
    manifest = describe(new)
    questions = tuple(question for suite in new.suites for question in suite.questions)
    search = None if manifest.search is None else new.search
    return _judged(EvaluationJob(manifest, questions, search, new.play, new.choice), new.judge)


def _judged(job: EvaluationJob, judge: Judge | None) -> EvaluationJob:
    """A job in this session, with its judge."""
    models, choice = {record.model for record in job.manifest.systems}, job.choice
    found = None if judge is None else find_judge(judge, models, is_embedded=is_embedded(choice.service))
    described = None if found is None else msgspec.to_builtins(found.describe())
    return replace(job, judge=found, manifest=replace(of_session(job.manifest, choice.service), judge=described))


# --- repeating ----------------------------------------------------------------------------------------------------------


def repeats(source: object) -> bool:
    """Whether ``source`` is an earlier evaluation rather than suites."""
    if not isinstance(source, str | Path) or not str(source).strip():
        return False
    path = absolute_path(source, "suites")
    return path.name == MANIFEST_NAME or (path / MANIFEST_NAME).is_file()


def refuse_overrides(given: Mapping[str, Any], config: EvalConfig) -> None:
    """Raises ConfigurationError if arguments or settings that the manifest determines are given.

    ``given`` maps all parameter names of ``evaluate`` to values.
    """
    usual = EvalConfig().flat()
    changed = [name for name, value in config.flat().items() if name not in _REPEATABLE and value != usual[name]]
    for name in ("systems", "judge", "training_questions"):
        value = given[name]
        # A frame of training questions has no truth value.
        if value is not None and not (isinstance(value, list | tuple | dict) and not value):
            changed.append(name)
    if changed:
        raise ConfigurationError(
            f"an evaluation is repeated with its original settings: omit {', '.join(changed)}, or evaluate the suites anew"
        )


def _repeated(
    source: Any, search: Search | None, choice: ServiceChoice, sampling: SamplingSettings, reward: RewardFunction | None
) -> EvaluationJob:
    """The job of an earlier evaluation. Blocking: call it in a worker thread.

    Raises:
        RunFolderError: there is no manifest, or the questions changed.
        ConfigurationError: the manifest cannot describe its search or reward, the given ones differ, or a prompt changed.
    """
    path = absolute_path(source, "suites")
    then = Manifest.load(path)
    if then is None:
        raise RunFolderError(f"there is no manifest {path}")
    asked = read_questions(path if path.is_dir() else path.parent)
    if questions_digest(asked) != then.questions_sha256:
        raise RunFolderError("the questions beside the manifest do not match it")
    settings = then.settings
    play = PlaySettings(
        reward=reward or _recorded_reward(settings["reward"]),
        sampling=replace(sampling, temperature=settings["temperature"], seed=settings["seed"]),
        episodes=then.episodes,
        group_size=settings["samples"],
        max_failed_fraction=settings["max_failed_fraction"],
    )
    for record in then.systems:
        episodes = replace(play, episodes=record.episodes(play.episodes)).episodes  # checked
        if record.prompt_sha256 not in (None, prompt_of(episodes, record.method)[1]):
            raise ConfigurationError(
                f"{record.label!r} used a different prompt ({record.prompt!r}) than method {record.method!r} uses in the "
                "installed package versions: install the versions in the manifest, or start a new evaluation"
            )
    search = None if then.search is None else Search.from_record(then.search, search, "the manifest")
    manifest = replace(
        then,
        search=None if search is None else msgspec.to_builtins(search.record()),
        settings={**settings, "reward": described_reward(play.reward)},
    )
    judge = None if then.judge is None else Judge(**then.judge)
    return _judged(EvaluationJob(manifest, questions_of(asked), search, play, choice), judge)


def _recorded_reward(record: Mapping[str, Any]) -> RewardFunction:
    if record["kind"] != RecipeReward.__name__:
        raise ConfigurationError(f"the manifest cannot describe its reward ({record['kind']}): pass reward=…")
    return settings_of(RecipeReward, record)


# --- running ------------------------------------------------------------------------------------------------------------


async def _run(
    job: EvaluationJob, folder: Path | None, earlier: Manifest | None, watchers: Watchers, opened: AsyncExitStack
) -> Report:
    """Rolls out and judges missing samples, then builds the report.

    ``opened`` receives the folder's lock and event log, which must outlive the last event. Raises SearchR1Errors, also within
    exception groups; finished episodes are kept in the folder.
    """
    manifest = job.manifest if earlier is None else job.manifest.continuing(earlier)
    for record in manifest.systems:
        if record.differences:
            text = f"{record.label!r} is evaluated with other settings than in training: "
            watchers(Notice(text + described_differences(record.differences), is_warning=True))
    async with AsyncExitStack() as services:
        stages = None  # a resumed evaluation may need no service
        if earlier is None:
            if folder is not None and any((folder / name).exists() for name in _RUN_FILES):
                raise RunFolderError(
                    f"{folder} contains a training run: choose another out_dir, such as {folder}/evaluation"
                )
            stages = await open_stages(job, manifest.systems, services, watchers)
        if folder is not None:
            opened.enter_context(claimed(folder))
            for tracker in await opened.enter_async_context(open_trackers(make_trackers((), folder))):
                watchers.subscribe(tracker)
        store = EpisodeStore(folder, verdicts_name(manifest.judge))
        asked = questions_frame(job.questions)
        done = await anyio.to_thread.run_sync(_begin, store, earlier, manifest, asked)
        await Playing(job, store, watchers, done).run(stages, services)
    with writing_records(store.folder):
        await anyio.to_thread.run_sync(store.finish)
    return await anyio.to_thread.run_sync(make_report, store, manifest)


def _begin(store: EpisodeStore, earlier: Manifest | None, manifest: Manifest, asked: pl.DataFrame) -> set[SampleKey]:
    """Writes manifest and questions, or loads an earlier session; returns the finished samples."""
    if Manifest.load(store.folder) != earlier:
        raise RunFolderError(
            f"{store.folder} was changed by another process while this evaluation started: call it again"
        )
    with writing_records(store.folder):
        if earlier is None:
            write_parquet(store.folder / QUESTIONS_NAME, asked)
        else:
            rename_old_verdicts(store.folder, earlier.judge)
        if manifest != earlier:
            manifest.save(store.folder)
    return set() if earlier is None else store.load()
