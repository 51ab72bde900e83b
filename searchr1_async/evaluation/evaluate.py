"""The public function ``evaluate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import anyio
import tinker

from searchr1_async.arguments import GivenSearch, GivenWeights, model_name
from searchr1_async.boundary.paths import FilePath, NameOrFolder
from searchr1_async.boundary.settings import Count, Seconds, checked_arguments, list_of, settings_of
from searchr1_async.config import MAX_SERVICE_OUTAGE, LocalOptions, SamplingSettings
from searchr1_async.data.questions import Questions, optional_questions
from searchr1_async.data.suites import Suites, load_suites
from searchr1_async.episodes.methods import Method
from searchr1_async.episodes.rendering import check_thinking
from searchr1_async.episodes.reward import RecipeReward, RewardFunction
from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.job import EvaluationJob
from searchr1_async.evaluation.judge import Judge
from searchr1_async.evaluation.manifest import Manifest
from searchr1_async.evaluation.repeating import refuse_besides, repeated_job, repeats
from searchr1_async.evaluation.report import Report
from searchr1_async.evaluation.running import run_evaluation
from searchr1_async.evaluation.systems import System, SystemSource, find_systems, search_of_runs, with_baselines
from searchr1_async.events import Emit
from searchr1_async.models import Thinking
from searchr1_async.playing import PlaySettings, ServiceChoice, watching
from searchr1_async.trained import EpisodeChoice
from searchr1_async.watch.dashboard import Choice


async def evaluate(
    suites: Suites | Manifest | Report,
    search: GivenSearch | None = None,
    *,
    systems: Mapping[str, SystemSource] | None = None,
    baselines: Annotated[Sequence[Method], list_of(Method)] = (),
    model: str | Path | None = None,
    checkpoint: GivenWeights | None = None,
    label: str = "evaluation",
    service: str | tinker.ServiceClient | None = None,
    service_folder: FilePath | None = None,
    out_dir: FilePath | None = None,
    resume: bool = False,
    split: str | None = None,
    limit: Count | None = None,
    question_seed: int = 0,
    samples: Count = 1,
    judge: Judge | None = None,
    training_questions: Questions = (),
    reward: RewardFunction | None = None,
    strict_recipe: bool = False,
    format: str | None = None,
    renderer: str | None = None,
    thinking: Thinking = None,
    instructions: str | None = None,
    max_turns: int | None = None,
    max_tokens: int | None = None,
    max_trajectory_tokens: int | None = None,
    malformed_calls: Literal["end", "tell"] | None = None,
    temperature: float = 1.0,
    seed: int | None = 0,
    max_failed_fraction: float = 0.2,
    max_episodes_in_flight: int = 1024,
    workers: int | Literal["auto"] = 1,
    sampling_deadline: Seconds = 1800.0,
    max_service_outage: Seconds = MAX_SERVICE_OUTAGE,
    local: LocalOptions | None = None,
    tokenizer: NameOrFolder | None = None,
    progress: Choice = True,
    emit: Emit | None = None,
) -> Report:
    """Asks one or several systems every question of one or several suites, and scores what they answer.

    All suites are one pool of episodes: no suite waits for another's slowest. Systems that are played alike (the same method,
    format and prompt, over one service) share it too; the others follow one another.

    Args:
        suites: names of benchmarks (``"nq"``, or ``"benchmarks"`` for all seven), files, folders, frames, questions, or several;
            see :func:`searchr1_async.load_suites`. Or an earlier evaluation, which is repeated: its folder, its
            ``manifest.json``, its :class:`Report` or :class:`Manifest`; then only where, how and as what it is to be kept may
            be given besides.
        search: the tool; may be left out where every system answers directly, where runs are measured that were all trained with one
            search (their folders describe it), and for a repetition whose manifest describes it.
        systems: what is measured, by label: a run or its folder (its last weights), a ``tinker://`` path, None (the base model),
            or a :class:`System`. None: the one of ``model`` and ``checkpoint``, under ``label``.
        baselines: the base model besides, used otherwise: ``"direct"``, ``"rag"``, ``"recipe"`` (the last needs
            ``pip install 'searchr1_async[recipe]'``); see :class:`System`.
        model: the base model of every system that names none and is no run; with ``checkpoint`` only where it is not the default.
        checkpoint: a run's folder (its last kept weights), or a ``tinker://…/sampler_weights/…`` path.
        service_folder: the embedded service's folder that holds a ``tinker://`` checkpoint; a run's folder knows its own.
        out_dir: keeps every episode there soon after it has ended; None keeps them as long as the report lives.
        resume: go on with the evaluation in ``out_dir``: only what has not finished, or was failed by a service, is played.
        split: of every suite; None is the one that the field reports.
        limit: at most so many questions of each suite.
        question_seed: which ones: the same everywhere, and a larger limit contains a smaller one.
        samples: episodes a question; several narrow the interval, and give pass@k.
        judge: has every answer judged by a model too, reported beside exact match. A resume may have another judge, or none: the
            verdicts of one are never mixed with another's, and are there again when it is.
        format, renderer, thinking, instructions, max_turns, max_tokens, max_trajectory_tokens, malformed_calls: as in
            :func:`searchr1_async.train`; see :class:`System` for one system's own. None: a run is played as it was trained, and what
            is no run (the base model) as the runs beside it, where these were trained alike; a baseline keeps its own prompt and
            the default limits. Without a run: the recipe's defaults. The same holds for the passages a query brings and their
            length, where ``search`` was made without saying. What differs from a run's training is in the report's notes. A
            run's time limit for episodes does not apply.
        training_questions: what the systems were trained on, besides what their runs' folders tell: overlap is reported.
        temperature: 1 samples as training does, 0 is greedy.
        seed: of the sampling; None lets the service choose.
        max_episodes_in_flight: at once. A service that takes fewer is asked for fewer as soon as it pushes back; with one that lets
            them stand in its line, more only cost memory, and a kill loses them.

        The others as in :func:`searchr1_async.train`.

    Raises:
        ConfigurationError: bad input, before any work starts and before anything is written.
        ServiceError: the service is away, or does not have a model or weights that are asked for.
        TooManyFailuresError: over ``max_failed_fraction`` of a system's episodes failed; what was played is kept.
    """
    given = checked_arguments(evaluate, locals())
    if repeats(suites):
        refuse_besides(evaluate, given)
    model = model_name(model, service)
    check_thinking(model, renderer, thinking)
    choice = ServiceChoice(service, model, local or LocalOptions(), given["tokenizer"], given["max_service_outage"])
    asked = settings_of(EpisodeChoice, given)
    play = settings_of(
        PlaySettings,
        given | asked.play(),
        reward=reward or settings_of(RecipeReward, given),
        # Each sample by itself, so that one that a kill has lost is played again as it would have been.
        sampling=settings_of(SamplingSettings, given, deadline=given["sampling_deadline"], first_turn="split"),
        group_size=given["samples"],
    )
    if repeats(suites):
        job = await anyio.to_thread.run_sync(
            lambda: repeated_job(
                suites, search, choice, play.sampling, out_dir=given["out_dir"], resume=given["resume"], reward=reward
            )
        )
    else:
        job = await _new_job(given, asked, play, choice)
    async with AsyncExitStack() as opened, watching("evaluate", progress, emit) as watchers:
        return await run_evaluation(job, watchers, opened)
    raise AssertionError("watching() hides no exception")


async def _new_job(
    given: Mapping[str, Any], asked: EpisodeChoice, play: PlaySettings, choice: ServiceChoice
) -> EvaluationJob:
    """The job of suites that are evaluated anew.

    Raises:
        ConfigurationError: systems that cannot be measured so, or suites that cannot be used.
    """
    limit, checkpoint, service_folder = given["limit"], given["checkpoint"], given["service_folder"]
    suites = await anyio.to_thread.run_sync(
        lambda: load_suites(
            cast(Suites, given["suites"]),
            split=given["split"],
            limit=limit,
            seed=None if limit is None else given["question_seed"],
        )
    )
    if given["systems"] is not None and (checkpoint is not None or service_folder is not None):
        raise ConfigurationError("give systems, or the checkpoint of the one system, not both")
    # What is named beside one checkpoint is its own base model; beside several systems, that of those which name none.
    own = System(checkpoint, model=None if checkpoint is None else choice.model, service_folder=service_folder)
    sources = {given["label"]: own} if given["systems"] is None else given["systems"]
    systems = find_systems(with_baselines(sources, given["baselines"]))
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
