"""The public function ``evaluate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import anyio
import tinker

from searchr1_async.boundary.paths import FilePath, NameOrFolder
from searchr1_async.boundary.settings import Count, Seconds, checked_arguments, list_of, settings_of
from searchr1_async.config import MAX_SERVICE_OUTAGE, LocalOptions, SamplingSettings
from searchr1_async.data.questions import Questions, optional_questions
from searchr1_async.data.suites import Suites, load_suites
from searchr1_async.episodes.prompts import Method
from searchr1_async.episodes.rendering import check_thinking
from searchr1_async.episodes.rewards import RecipeReward, RewardFunction
from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.job import EvaluationJob
from searchr1_async.evaluation.judge import Judge
from searchr1_async.evaluation.manifest import Manifest
from searchr1_async.evaluation.repeating import refuse_overrides, repeated_job, repeats
from searchr1_async.evaluation.report import Report
from searchr1_async.evaluation.running import run_evaluation
from searchr1_async.evaluation.systems import System, SystemSource, find_systems, search_of_runs, with_baselines
from searchr1_async.events import Emit
from searchr1_async.models import Thinking
from searchr1_async.runs.rollouts import PlaySettings, ServiceChoice, watching
from searchr1_async.runs.weights import EpisodeChoice, GivenSearch, GivenWeights, model_name
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
    """Evaluates one or several systems on one or several question suites.

    All suites share one pool of episodes, so no suite waits for another's slowest. Systems with equal method, format and prompt
    on one service share the pool too; others run one after another.

    Args:
        suites: benchmark names (``"nq"``; ``"benchmarks"`` for all seven), files, folders, frames, questions, or a list of
            these; see :func:`searchr1_async.load_suites`. Or an earlier evaluation to repeat: its folder, ``manifest.json``,
            :class:`Report` or :class:`Manifest`; arguments that change what is measured are then refused.
        search: the search tool. Optional if all systems answer directly, if the evaluated runs were trained with one search
            (their folders describe it), or if a repeated manifest describes it.
        systems: what to evaluate, by label: a run or its folder (last weights), a ``tinker://`` path, None (the base model), or
            a :class:`System`. Default: the system of ``model`` and ``checkpoint``, as ``label``.
        baselines: additional systems that use the base model in other ways: ``"direct"``, ``"rag"``, ``"recipe"`` (the last
            needs ``pip install 'searchr1_async[recipe]'``); see :class:`System`.
        model: base model of systems that name none and are not a run. With ``checkpoint``, only needed if not the default.
        checkpoint: a run's folder (last kept weights), or a ``tinker://…/sampler_weights/…`` path.
        service_folder: the embedded service's folder with a ``tinker://`` checkpoint; not needed for a run's folder.
        out_dir: where episodes are written soon after they end; None keeps them as long as the report exists.
        resume: continue the evaluation in ``out_dir``: only missing and failed episodes are rolled out.
        split: split of every suite; None is the conventional one.
        limit: maximum number of questions per suite.
        question_seed: selects the questions under ``limit``, identically on every machine; larger limits include smaller ones.
        samples: episodes per question; more narrow the interval and allow pass@k.
        judge: also judges every answer with a model, reported beside exact match. A resumed evaluation may use another judge or
            none; verdicts of different judges are kept apart.
        format, renderer, thinking, instructions, max_turns, max_tokens, max_trajectory_tokens, malformed_calls: as in
            :func:`searchr1_async.train`; :class:`System` sets them per system. None: a run uses its training settings; the base
            model uses those of the evaluated runs if they agree; a baseline keeps its own prompt and the default limits; without
            runs, the recipe's defaults apply. The same holds for the number and length of passages if ``search`` does not set
            them. Differences from training are listed in the report's notes. A run's episode time limit does not apply.
        training_questions: additional training questions of the systems, checked for overlap; run folders know their own.
        temperature: 1 samples as in training, 0 is greedy.
        seed: sampling seed; None lets the service choose.
        max_episodes_in_flight: maximum concurrent episodes; backpressure of the service lowers it.

        All others as in :func:`searchr1_async.train`.

    Raises:
        ConfigurationError: invalid input; raised before any work starts or anything is written.
        ServiceError: the service is unreachable or lacks a requested model or weights.
        TooManyFailuresError: more than ``max_failed_fraction`` of a system's episodes failed; finished episodes are kept.
    """
    given = checked_arguments(evaluate, locals())
    if repeats(suites):
        refuse_overrides(evaluate, given)
    model = model_name(model, service)
    check_thinking(model, renderer, thinking)
    choice = ServiceChoice(service, model, local or LocalOptions(), given["tokenizer"], given["max_service_outage"])
    asked = settings_of(EpisodeChoice, given)
    play = settings_of(
        PlaySettings,
        given | asked.play(),
        reward=reward or settings_of(RecipeReward, given),
        # One request per sample, so that a sample lost in a kill is reproduced on resume.
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
        raise ConfigurationError("pass either systems or checkpoint and service_folder, not both")
    # With a checkpoint, ``model`` is its base model; with systems, the default for those that name none.
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
