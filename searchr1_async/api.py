"""The public functions ``train`` and ``rollout``."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Literal

import anyio
import tinker

from searchr1_async.config import (
    AdvantageName,
    EpisodeLimits,
    FirstTurn,
    LearningSettings,
    LocalOptions,
    LossName,
    NormalizationName,
    PipelineSettings,
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
from searchr1_async.held_out import refuse_overlap
from searchr1_async.job import TrainingJob, TrainingResult
from searchr1_async.learn.checkpoints import ResumePoint
from searchr1_async.learn.demonstrations import Demonstration
from searchr1_async.models import Price, Thinking
from searchr1_async.playing import PlaySettings, ServiceChoice, check_format, open_watchers, playing
from searchr1_async.run import Run
from searchr1_async.run_folder import find_point, past_events
from searchr1_async.search import Search
from searchr1_async.service import billing_on
from searchr1_async.spending import check_max_cost
from searchr1_async.starting import chosen_model, chosen_rank, find_start, resumed_start
from searchr1_async.trained import EpisodeChoice
from searchr1_async.training import run_training
from searchr1_async.watch.dashboard import Choice, open_view
from searchr1_async.watch.live.view import LiveView
from searchr1_async.watch.stream import EventStreams
from searchr1_async.watch.trackers import Tracker, make_trackers
from searchr1_async.weights import find_weights


def train(
    questions: Questions,
    search: Search,
    *,
    out_dir: str | Path,
    model: str | None = None,
    service: str | tinker.ServiceClient | None = None,
    resume: bool = False,
    start_from: str | Path | None = None,
    held_out: Questions = (),
    held_out_samples: int = 1,
    evaluate_every: int | None = None,
    keep_best: bool = False,
    warm_up: WarmUp | None = None,
    demonstrations: Sequence[Demonstration] = (),
    reward: RewardFunction | None = None,
    strict_recipe: bool = False,
    format_coefficient: float = 0.1,
    format: str = "hermes",
    renderer: str | None = None,
    thinking: Thinking = None,
    instructions: str | None = None,
    group_size: int = 8,
    groups_per_batch: int = 512,
    minibatches: int = 4,
    max_staleness: int = 0,
    synchronous: bool = False,
    weights_in_flight: WeightsInFlight = "snapshot",
    switch_weights_in_flight: bool | None = None,
    spare_groups: int = 0,
    refill_groups: int = 0,
    min_members: int = 2,
    episode_time_limit: float | None = None,
    step_time_limit: float | None = None,
    steps: int | None = None,
    epochs: int = 1,
    time_limit: float | None = None,
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
    max_turns: int = 5,
    max_tokens: int = 1024,
    max_trajectory_tokens: int = 32 * 1024,
    malformed_calls: Literal["end", "tell"] = "end",
    temperature: float = 1.0,
    seed: int = 2,
    checkpoint_every: int = 20,
    max_failed_fraction: float = 0.2,
    max_episodes_in_flight: int = 4096,
    first_turn: FirstTurn = "auto",
    workers: int | Literal["auto"] = 1,
    sampling_deadline: float = 1800.0,
    local: LocalOptions | None = None,
    tokenizer: str | None = None,
    progress: Choice = True,
    trackers: Sequence[str | Tracker] = (),
    emit: Emit | None = None,
) -> Run:
    """Trains a model by reinforcement learning to answer questions with a search tool.

    Call it inside a running event loop (a notebook cell, or an ``async`` function); it returns a :class:`Run` at once,
    which ``await`` turns into a :class:`TrainingResult`. Defaults are those of the Search-R1 recipe of tinker-cookbook.

    Args:
        questions: a suite's name, a file, or questions; see :func:`load_questions`.
        search: the tool; see :class:`Search`.
        out_dir: the run's folder.
        model: the base model, as the service calls it; None is SmolLM2-135M-Instruct on the embedded service and Qwen3.5-4B
            elsewhere, or the nearest of its family that the service offers. Other services than the embedded one are asked what they
            offer before any work starts: a model that is named and not offered is refused.
        service: base URL or client of a Tinker service. None: the cloud where ``TINKER_API_KEY`` or ``TINKER_BASE_URL`` is
            set; otherwise the embedded service is started, and stopped with the run.
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
        reward: ``async def reward(episode) -> float``; None is the recipe's, with ``format_coefficient`` and ``strict_recipe``.
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
        steps: optimiser steps; None: all batches of ``epochs``.
        time_limit: seconds of reinforcement learning after which no further step is begun. A measurement under way is brought to
            its end, one that waits is left out, and the last weights are measured.
        max_cost: US dollars, earlier sessions of the run included. No step is begun that would cross them, if it cost as much as the
            dearest so far (the first: as estimated) with the measurement of the last weights; the step under way is finished, and
            the run ends with its resume point. ``resume=True`` with a higher limit goes on. What is measured before the first
            step, the warm-up, and questions asked of the run are counted but not held back. The embedded service costs nothing, and never reaches it.
        price: US dollars a million tokens, where the table of prices does not know the model or the service is not Tinker's.
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
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise ConfigurationError(
            "train() starts a task: call it in a notebook's cell or in an async function (asyncio.run(main()))"
        ) from None
    if switch_weights_in_flight is not None:
        warnings.warn(
            'switch_weights_in_flight is deprecated: use weights_in_flight="inflight" or "snapshot"',
            DeprecationWarning,
            stacklevel=2,
        )
        weights_in_flight = "inflight" if switch_weights_in_flight else weights_in_flight
    out = Path(out_dir)
    check_format(format)
    check_thinking(model, renderer, thinking)
    for name, value in (("evaluate_every", evaluate_every), ("held_out_samples", held_out_samples)):
        if value is not None and value < 1:
            raise ConfigurationError(f"{name} is {value}: it must be at least 1")
    if min_members > group_size >= 2:
        raise ConfigurationError(
            f"min_members ({min_members}) is over group_size ({group_size}): no group would be learned from"
        )
    if refill_groups and not drop_constant_groups:
        raise ConfigurationError("refill_groups replaces groups that are dropped: it needs drop_constant_groups=True")
    if evaluate_every is not None and not held_out:
        raise ConfigurationError("evaluate_every needs held_out questions to measure on")
    if keep_best and evaluate_every is None:
        raise ConfigurationError("keep_best needs evaluate_every: the best is chosen among the steps that are measured")
    if time_limit is not None and not time_limit > 0:
        raise ConfigurationError(f"time_limit is {time_limit} s: it must be over 0, or None for none")
    start = None
    if start_from is not None:
        point = ResumePoint.load(out) if resume else None
        start = find_start(start_from, service, out) if point is None else resumed_start(start_from, point)
        model = chosen_model(model, start)
    check_max_cost(max_cost, billing_on(service, model, price))
    job = TrainingJob(
        questions=checked_questions(questions),
        search=search,
        out_dir=out,
        learning=LearningSettings(
            group_size=group_size,
            groups_per_batch=groups_per_batch,
            minibatches=minibatches,
            optimizer_steps=optimizer_steps,
            learning_rate=learning_rate,
            schedule=schedule,
            schedule_warmup=schedule_warmup,
            lora_rank=chosen_rank(lora_rank, start),
            gradient_clip=gradient_clip,
            loss=loss,
            loss_config=dict(loss_config or {}),
            advantage=advantage,
            normalization=normalization,
            kl_coefficient=kl_coefficient,
            drop_constant_groups=drop_constant_groups,
            epochs=epochs,
            steps=steps,
            seed=seed,
            checkpoint_every=checkpoint_every,
            max_failed_fraction=max_failed_fraction,
        ),
        pipeline=PipelineSettings(
            max_staleness=max_staleness,
            synchronous=synchronous,
            weights_in_flight=weights_in_flight,
            spare_groups=spare_groups,
            refill_groups=refill_groups,
            min_members=min_members,
            step_time_limit=step_time_limit,
        ),
        limits=EpisodeLimits(
            max_turns=max_turns,
            max_tokens=max_tokens,
            max_trajectory_tokens=max_trajectory_tokens,
            malformed_calls=malformed_calls,
            max_seconds=episode_time_limit,
        ),
        sampling=SamplingSettings(
            temperature=temperature,
            seed=seed,
            deadline=sampling_deadline,
            max_episodes_in_flight=max_episodes_in_flight,
            first_turn=first_turn,
            workers=workers,
        ),
        reward=reward or RecipeReward(format_coefficient, strict_recipe),
        model=model,
        service=service,
        local=local or LocalOptions(),
        tokenizer=tokenizer,
        format_name=format,
        renderer_name=renderer,
        thinking=thinking,
        instructions=instructions,
        warm_up=warm_up,
        demonstrations=tuple(demonstrations),
        held_out=checked_questions(held_out) if held_out else (),
        held_out_samples=held_out_samples,
        evaluate_every=evaluate_every,
        keep_best=keep_best,
        resume=resume,
        time_limit=time_limit,
        max_cost=max_cost,
        price=price,
        start=start,
    )
    refuse_overlap(job.questions, job.held_out)
    find_point(job)  # refuses a folder that holds a run not to be resumed, before the run's task begins
    opened = make_trackers(trackers, out)
    run = Run(out, search, ServiceChoice(service, model, job.local, tokenizer))
    view = open_view(progress, title=f"train {out.name}", controls=run)

    async def work(control: RunControl, streams: EventStreams) -> TrainingResult:
        async with AsyncExitStack() as stack:
            if resume and isinstance(view, LiveView):  # a console has printed its lines already
                view.begin_with(await anyio.to_thread.run_sync(past_events, out))
            watchers = await open_watchers(stack, view, emit)
            watchers.subscribe(streams)
            return await run_training(job, watchers, control, opened)

    run.begin(work)
    return run


async def rollout(
    questions: Questions,
    search: Search,
    *,
    model: str | None = None,
    checkpoint: str | Path | None = None,
    service: str | tinker.ServiceClient | None = None,
    service_folder: str | Path | None = None,
    group_size: int = 8,
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
    local: LocalOptions | None = None,
    tokenizer: str | None = None,
    progress: Choice = True,
    emit: Emit | None = None,
) -> list[Group]:
    """Plays a group of episodes for every question and returns the groups in the order of the questions.

    Arguments and errors as in :func:`searchr1_async.evaluate`: with a run as ``checkpoint``, what is None is as the run was trained.
    """
    items = checked_questions(questions)
    check_thinking(model, renderer, thinking)
    weights = find_weights(checkpoint, service_folder=service_folder)
    given = EpisodeChoice(
        format=format,
        renderer=renderer,
        thinking=thinking,
        instructions=instructions,
        max_turns=max_turns,
        max_tokens=max_tokens,
        max_trajectory_tokens=max_trajectory_tokens,
        malformed_calls=malformed_calls,
    )
    play = PlaySettings(
        reward=reward or RecipeReward(),
        sampling=SamplingSettings(temperature=temperature, seed=seed),
        group_size=group_size,
        max_failed_fraction=max_failed_fraction,
        **weights.episodes(given, search).play(),
    )
    async with playing(
        search,
        play,
        ServiceChoice(service, model, local or LocalOptions(), tokenizer),
        weights=weights,
        tells_differences=True,
        progress=progress,
        emit=emit,
    ) as (engine, policy):
        return await play_all(engine, items, policy, samples=group_size, phase="rollout", label="")
