"""The public functions ``train`` and ``rollout``."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Literal

import anyio
import tinker

from searchr1_async.arguments import GivenSearch, GivenWeights, model_name
from searchr1_async.boundary.paths import FilePath, NameOrFolder
from searchr1_async.boundary.settings import Count, Seconds, checked_arguments, list_of, settings_of
from searchr1_async.config import (
    MAX_SERVICE_OUTAGE,
    AdvantageName,
    FirstTurn,
    LocalOptions,
    LossName,
    NormalizationName,
    SamplingSettings,
    ScheduleName,
    WarmUp,
    WeightsInFlight,
)
from searchr1_async.control import RunControl
from searchr1_async.data.questions import Questions, checked_questions
from searchr1_async.episodes.rendering import check_thinking
from searchr1_async.episodes.reward import RecipeReward, RewardFunction
from searchr1_async.episodes.types import Group
from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.measure import play_all
from searchr1_async.events import Emit
from searchr1_async.job import TrainingResult
from searchr1_async.learn.demonstrations import Demonstration
from searchr1_async.models import Price, Thinking
from searchr1_async.playing import PlaySettings, ServiceChoice, open_watchers, playing
from searchr1_async.run import Run
from searchr1_async.run_folder import past_events
from searchr1_async.trained import EpisodeChoice
from searchr1_async.training import run_training
from searchr1_async.training_job import training_job
from searchr1_async.watch.dashboard import Choice, open_view
from searchr1_async.watch.stream import EventStreams
from searchr1_async.watch.trackers import Tracker, make_trackers
from searchr1_async.weights import find_weights


def train(
    questions: Questions,
    search: GivenSearch,
    *,
    out_dir: FilePath,
    model: str | Path | None = None,
    service: str | tinker.ServiceClient | None = None,
    resume: bool = False,
    start_from: GivenWeights | None = None,
    held_out: Questions = (),
    held_out_samples: Count = 1,
    evaluate_every: Count | None = None,
    keep_best: bool = False,
    warm_up: WarmUp | None = None,
    demonstrations: Annotated[Sequence[Demonstration], list_of(Demonstration)] = (),
    reward: RewardFunction | None = None,
    strict_recipe: bool = False,
    format_coefficient: float = 0.1,
    format: str = "hermes",
    renderer: str | None = None,
    thinking: Thinking = None,
    instructions: str | None = None,
    group_size: int | None = None,
    groups_per_batch: int | None = None,
    minibatches: int | None = None,
    max_staleness: int = 0,
    synchronous: bool = False,
    weights_in_flight: WeightsInFlight = "snapshot",
    switch_weights_in_flight: bool | None = None,
    spare_groups: int = 0,
    refill_groups: int = 0,
    min_members: int = 2,
    episode_time_limit: Seconds | None = None,
    step_time_limit: float | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    time_limit: Seconds | None = None,
    max_cost: float | None = None,
    price: Price | None = None,
    optimizer_steps: int = 1,
    learning_rate: float = 4e-5,
    schedule: ScheduleName = "constant",
    schedule_warmup: int = 0,
    lora_rank: int | None = None,
    loss: LossName | None = None,
    loss_config: Mapping[str, float] | None = None,
    advantage: AdvantageName = "centred",
    normalization: NormalizationName = "token",
    kl_coefficient: float = 0.0,
    gradient_clip: float = 0.0,
    drop_constant_groups: bool = True,
    max_turns: int | None = None,
    max_tokens: int | None = None,
    max_trajectory_tokens: int | None = None,
    malformed_calls: Literal["end", "tell"] = "end",
    temperature: float = 1.0,
    seed: int = 2,
    checkpoint_every: int = 20,
    max_failed_fraction: float = 0.2,
    max_episodes_in_flight: int = 4096,
    first_turn: FirstTurn = "auto",
    workers: int | Literal["auto"] = 1,
    sampling_deadline: Seconds = 1800.0,
    training_deadline: Seconds = 3600.0,
    max_service_outage: Seconds = MAX_SERVICE_OUTAGE,
    local: LocalOptions | None = None,
    tokenizer: NameOrFolder | None = None,
    progress: Choice = True,
    trackers: Sequence[str | Tracker] = (),
    emit: Emit | None = None,
) -> Run:
    """Trains a model by reinforcement learning to answer questions with a search tool.

    Call it inside a running event loop (a notebook cell, or an ``async`` function); it returns a :class:`Run` at once,
    which ``await`` turns into a :class:`TrainingResult`. Defaults are those of the Search-R1 recipe of tinker-cookbook, but for
    the sizes of a run on the embedded service, which are those that a laptop can play to their end
    (:data:`searchr1_async.sizes.LAPTOP`). Sizes that a resume does not name are the run's own.

    Args:
        questions: a suite's name, a file, questions, a frame or a list of dicts; see :func:`load_questions`.
        search: the tool; see :class:`Search`.
        out_dir: the run's folder. Like every path it is made absolute at the call, with ``~`` expanded.
        model: the base model, as the service calls it; None is SmolLM2-135M-Instruct on the embedded service and Qwen3.5-4B
            elsewhere, or the nearest of its family that the service offers. Other services than the embedded one are asked what they
            offer before any work starts: a model that is named and not offered is refused.
        service: base URL or client of a Tinker service, or ``"embedded"``. None: the service of ``TINKER_BASE_URL``, else Tinker's
            cloud where the SDK has credentials (``TINKER_API_KEY``, ``TINKER_CREDENTIAL_CMD``, ``tinker auth login``), else the embedded
            service, which is started, and stopped with the run. The run's first line says which, and why.
        resume: go on with the run in ``out_dir`` from its last finished step; a fresh start where there is none.
        start_from: weights to start from, with a new optimizer: another run's folder (its last kept weights; ``"runs/first@best"``
            and ``"runs/first@40"`` are those of a step), a ``tinker://RUN/weights/NAME`` path, or, on the embedded service, a PEFT
            adapter's folder. The run has their rank and, without ``model``, their base model. A warm-up goes on from them; the
            penalty of ``kl_coefficient`` still is towards the base model. A resume must be given the same, and does not need it.
        held_out: questions to measure on: untrained, after the warm-up, after reinforcement learning. None of them may be
            trained on.
        held_out_samples: episodes a held-out question.
        evaluate_every: steps between further measurements, on the weights of just those steps; None for none. They are played
            beside the training, whose requests go first; training waits only where three have not begun, and at its end. The
            searches and samples of a step's figures contain theirs.
        keep_best: of the steps that are measured the weights with the highest exact match stay (of equal ones the earliest), beside
            those of ``checkpoint_every``; see ``result.best``. The best of many is chosen on the held-out questions, so its
            figure there is too high: measure it on others.
        warm_up: a supervised warm-up on demonstrations; None for none.
        demonstrations: for the warm-up; by default made from the questions (their ``search_queries``, else themselves).
        reward: ``async def reward(episode) -> float``, or a plain ``def``, which is called in a worker thread so that it may block
            (for several episodes at once); True and False count as 1 and 0. A :class:`Score` names the parts of a reward. None is
            the recipe's, with ``format_coefficient`` and ``strict_recipe``.
        format: tool-call format, ``"hermes"`` or ``"tags"``.
        renderer: chat format (of the ``renderers`` package, or ``"chatml"``); None is the model's own, by its name, or ChatML where
            its chat template is ChatML. A model of another format is refused.
        thinking: whether the model thinks before it answers: True, False, or an effort such as ``"low"``, as far as its chat format
            has them. None: no thinking where it can be switched off, else the lowest effort. ``"template"``: as the chat template
            has it where nothing is said.
        instructions: the system prompt; None is the format's own.
        lora_rank: of the adapter; None is that of ``start_from``, else 32.
        max_staleness: 0 learns on-policy, each group streaming into the step as it finishes; k lets the next batches' episodes start
            while the last ones finish and the trainer works, on weights at most k steps older. Learning is then off-policy, and
            the default loss another (see ``loss``).
        weights_in_flight: ``"snapshot"``: an episode keeps the weights that it began with. ``"inflight"``: running episodes go
            on with newer weights as soon as these are there, and keep their key/value cache. Where the service cannot do
            it, the run is refused at the start.
        switch_weights_in_flight: deprecated: True is ``weights_in_flight="inflight"``.
        synchronous: learn only when a whole batch is played.
        loss: one of the service's losses. None is ``"importance_sampling"`` on-policy. Off-policy it is
            ``"stable_reinforce"`` if the service has it and otherwise ``"ppo"``, which is clipped; the run says which, and why. A loss
            that you name and that the service does not have is refused at the start, with the losses that it has.
        workers: processes that play; ``"auto"`` adds them when this one is saturated.
        episode_time_limit: seconds, ``EpisodeLimits.max_seconds``.
        group_size, groups_per_batch, minibatches: None is 8, 512 and 4; on the embedded service 8, 8 and 4.
        max_turns, max_tokens, max_trajectory_tokens: None is 5, 1024 and 32768; on the embedded service 3, 64 and 4096.
        steps: optimiser steps; None: all batches of ``epochs``. On the embedded service it is at most 12, where neither ``epochs``,
            ``groups_per_batch`` nor ``time_limit`` is given.
        epochs: passes over the questions, where ``steps`` is None; None is 1.
        time_limit: seconds of reinforcement learning after which no further step is begun. A measurement under way is brought to
            its end, one that waits is left out, and the last weights are measured.
        max_cost: US dollars, earlier sessions of the run included. No step is begun that would cross them, if it cost as much as the
            dearest so far (the first: as estimated) with the measurement of the last weights; the step under way is finished, and
            the run ends with its resume point. ``resume=True`` with a higher limit goes on. What is measured before the first
            step, the warm-up, and questions asked of the run are counted but not held back. The embedded service costs nothing, and never reaches it.
        price: US dollars a million tokens, where the table of prices does not know the model or the service is not Tinker's.
        max_service_outage: seconds for which the run waits for a Tinker service that does not answer. An outage is told within 15 s;
            meanwhile the run is held, and none of its time limits runs out. Then it ends with its resume point.
        progress: True shows the run in the notebook's cell as it happens, or on the terminal; ``"widget"``, ``"rich"``,
            ``"terminal"`` and ``"plain"`` choose how, False shows nothing.
        trackers: ``"wandb"``, ``"tensorboard"``, ``"trackio"`` (``pip install 'searchr1_async[wandb]'`` and so on), or trackers of
            one's own; ``events.jsonl`` and the Parquet tables are always written.
        emit: receives every :class:`~searchr1_async.events.Event`.

        The others are fields of :class:`~searchr1_async.config.LearningSettings`,
        :class:`~searchr1_async.config.PipelineSettings`, :class:`~searchr1_async.config.EpisodeLimits` and
        :class:`~searchr1_async.config.SamplingSettings`, each with its unit, its reason and, where there is one, its bias.

    Raises:
        ConfigurationError: bad input; before any work starts, from this call itself.
        SearchR1Error: from awaiting the run, whatever else went wrong.
    """
    given = checked_arguments(train, locals())
    _refuse_without_loop()
    if switch_weights_in_flight is not None:
        warnings.warn(
            'switch_weights_in_flight is deprecated: use weights_in_flight="inflight" or "snapshot"',
            DeprecationWarning,
            stacklevel=2,
        )
        given["weights_in_flight"] = "inflight" if switch_weights_in_flight else weights_in_flight
    job = training_job(given)
    opened = make_trackers(trackers, job.out_dir)
    run = Run(job.out_dir, search, ServiceChoice(service, job.model, job.local, job.tokenizer))
    view = open_view(progress, title=f"train {job.out_dir.name}", controls=run)

    async def work(control: RunControl, streams: EventStreams) -> TrainingResult:
        async with AsyncExitStack() as stack:
            if resume and view is not None:
                await anyio.to_thread.run_sync(view.begin_with, lambda: past_events(job.out_dir))
            watchers = await open_watchers(stack, view, emit)
            watchers.subscribe(streams)
            return await run_training(job, watchers, control, opened)

    run.begin(work)
    return run


async def rollout(
    questions: Questions,
    search: GivenSearch,
    *,
    model: str | Path | None = None,
    checkpoint: GivenWeights | None = None,
    service: str | tinker.ServiceClient | None = None,
    service_folder: FilePath | None = None,
    group_size: Count = 8,
    reward: RewardFunction | None = None,
    format: str | None = None,
    renderer: str | None = None,
    thinking: Thinking = None,
    instructions: str | None = None,
    max_turns: int | None = None,
    max_tokens: int | None = None,
    max_trajectory_tokens: int | None = None,
    malformed_calls: Literal["end", "tell"] | None = None,
    temperature: float = 1.0,
    seed: int | None = None,
    max_failed_fraction: float = 0.2,
    max_service_outage: Seconds = MAX_SERVICE_OUTAGE,
    local: LocalOptions | None = None,
    tokenizer: NameOrFolder | None = None,
    progress: Choice = True,
    emit: Emit | None = None,
) -> list[Group]:
    """Plays a group of episodes for every question and returns the groups in the order of the questions.

    Arguments and errors as in :func:`searchr1_async.evaluate`: with a run as ``checkpoint``, what is None is as the run was trained.
    """
    given = checked_arguments(rollout, locals())
    model = model_name(model, service)
    check_thinking(model, renderer, thinking)
    weights = find_weights(given["checkpoint"], service_folder=given["service_folder"])
    play = settings_of(
        PlaySettings,
        given | weights.episodes(settings_of(EpisodeChoice, given), search).play(),
        reward=reward or RecipeReward(),
        sampling=settings_of(SamplingSettings, given),
    )
    items = checked_questions(questions)
    async with playing(
        search,
        play,
        ServiceChoice(service, model, local or LocalOptions(), given["tokenizer"], given["max_service_outage"]),
        weights=weights,
        tells_differences=True,
        progress=progress,
        emit=emit,
    ) as (engine, policy):
        return await play_all(engine, items, policy, samples=play.group_size, phase="rollout", label="")


def _refuse_without_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise ConfigurationError(
            "train() starts a task: call it in a notebook's cell or in an async function (asyncio.run(main()))"
        ) from None
