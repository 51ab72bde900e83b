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
from searchr1_async.data.questions import Questions, checked_questions
from searchr1_async.episodes.rendering import check_thinking
from searchr1_async.episodes.reward import RecipeReward, RewardFunction
from searchr1_async.episodes.types import Group
from searchr1_async.errors import ConfigurationError
from searchr1_async.events import Emit
from searchr1_async.models import Price, Thinking
from searchr1_async.runs.control import RunControl
from searchr1_async.runs.folder import past_events
from searchr1_async.runs.rollouts import PlaySettings, ServiceChoice, open_watchers, play_all, playing
from searchr1_async.runs.run import Run
from searchr1_async.runs.weights import EpisodeChoice, GivenSearch, GivenWeights, find_weights, model_name
from searchr1_async.trackers import Tracker, make_trackers
from searchr1_async.training.checks import training_job
from searchr1_async.training.demonstrations import Demonstration
from searchr1_async.training.job import TrainingResult
from searchr1_async.training.session import run_training
from searchr1_async.watch.dashboard import Choice, open_view
from searchr1_async.watch.subscribers import EventStreams


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

    Call it inside a running event loop (a notebook cell or an ``async`` function). It returns a :class:`Run` at once; awaiting
    that gives a :class:`TrainingResult`. Defaults are those of the Search-R1 recipe of tinker-cookbook, except for run sizes on
    the embedded service, which fit a laptop (:data:`searchr1_async.runs.estimate.LAPTOP`). A resume keeps the run's own sizes unless
    they are given.

    Args:
        questions: a suite's name, a file, questions, a frame or a list of dicts; see :func:`load_questions`.
        search: the tool; see :class:`Search`.
        out_dir: the run's folder. All paths are made absolute when called, with ``~`` expanded.
        model: the base model, as the service names it. None: SmolLM2-135M-Instruct on the embedded service, elsewhere Qwen3.5-4B
            or the nearest model of its family the service offers. A named model the service does not offer is refused before any
            work starts.
        service: base URL or client of a Tinker service, or ``"embedded"``. None: the service of ``TINKER_BASE_URL``, else Tinker's
            cloud if the SDK has credentials (``TINKER_API_KEY``, ``TINKER_CREDENTIAL_CMD``, ``tinker auth login``), else the
            embedded service, started and stopped with the run. The run's first line reports the choice and why.
        resume: resume the run in ``out_dir`` from its last finished step; start fresh if there is none.
        start_from: weights to start from, with a new optimizer: another run's folder (its last kept weights, or
            ``"runs/first@best"`` or ``"runs/first@40"`` for a step), a ``tinker://RUN/weights/NAME`` path or, on the embedded
            service, a PEFT adapter's folder. They set the rank and, without ``model``, the base model. The KL penalty still is
            towards the base model. A resume must pass the same value, but the weights need not exist any more.
        held_out: questions to evaluate on: untrained, after the warm-up and after reinforcement learning. None of them may be
            in ``questions``.
        held_out_samples: episodes per held-out question.
        evaluate_every: steps between further evaluations; None for none. They run beside training at lower priority; training
            waits only if three have not started, and at its end. A step's search and sample metrics include them.
        keep_best: keep the weights with the highest exact match of all evaluated steps (the earliest on a tie), beside those of
            ``checkpoint_every``; see ``result.best``. They are selected on the held-out questions, which biases their score
            upwards: report them on other questions.
        warm_up: a supervised warm-up on demonstrations; None for none.
        demonstrations: for the warm-up; by default built from the questions (their ``search_queries``, else their text).
        reward: ``async def reward(episode) -> float``, or a plain ``def``, which may block and runs in a worker thread (several at
            once). True and False count as 1 and 0. A :class:`Score` names the parts of a reward. None: the recipe's reward, with
            ``format_coefficient`` and ``strict_recipe``.
        format: tool-call format, ``"hermes"`` or ``"tags"``.
        renderer: chat format (of the ``renderers`` package, or ``"chatml"``). None: the model's own, by its name, or ChatML if its
            chat template is ChatML; other models are refused.
        thinking: True, False, or an effort such as ``"low"``, as far as the chat format supports it. None: off if possible, else
            the lowest effort. ``"template"``: the chat template's default.
        instructions: the system prompt; None: the format's own.
        lora_rank: rank of the adapter; None: that of ``start_from``, else 32.
        max_staleness: 0 is on-policy, with each group streamed into the step as it finishes. k lets the next batches' episodes
            start while the last ones finish and the trainer works, on weights at most k steps older; this is off-policy and
            changes the default ``loss``.
        weights_in_flight: ``"snapshot"``: an episode keeps the weights it started with. ``"inflight"``: running episodes switch
            to new weights when they are published and keep their key/value cache; refused if the service cannot do it.
        switch_weights_in_flight: deprecated: True is ``weights_in_flight="inflight"``.
        synchronous: train only once a whole batch is rolled out.
        loss: one of the service's losses; others are refused at the start. None: ``"importance_sampling"`` on-policy; off-policy
            ``"stable_reinforce"`` if the service has it, else ``"ppo"``. The run reports the choice and why.
        workers: rollout processes; ``"auto"`` adds workers when this process is CPU-bound.
        episode_time_limit: seconds, ``EpisodeLimits.max_seconds``.
        group_size, groups_per_batch, minibatches: None is 8, 512 and 4; on the embedded service 8, 8 and 4.
        max_turns, max_tokens, max_trajectory_tokens: None is 5, 1024 and 32768; on the embedded service 3, 64 and 4096.
        steps: batches to train; None: all batches of ``epochs``, on the embedded service at most 12 unless ``epochs``,
            ``groups_per_batch`` or ``time_limit`` is given.
        epochs: passes over the questions if ``steps`` is None; None is 1.
        time_limit: seconds of reinforcement learning after which no further step starts. A running evaluation finishes, a
            waiting one is skipped, and the last weights are evaluated.
        max_cost: US dollars, earlier sessions of the run included. No step starts that would exceed it, assuming it costs as much
            as the most expensive so far (the first: as estimated) plus the final evaluation; the run then ends with its resume
            point, and ``resume=True`` with a higher limit continues it. Evaluations before the first step, the warm-up, and
            questions asked of the run are counted but not limited. The embedded service costs nothing.
        price: US dollars per million tokens, if the price table lacks the model or the service is not Tinker's.
        max_service_outage: seconds the run waits for a Tinker service that does not answer. An outage is reported within 15 s and
            pauses the run and all its time limits; past this limit the run ends with its resume point.
        progress: True shows the run live in the notebook cell or terminal; ``"widget"``, ``"rich"``, ``"terminal"`` and
            ``"plain"`` choose how; False shows nothing.
        trackers: ``"wandb"``, ``"tensorboard"``, ``"trackio"`` (``pip install 'searchr1_async[wandb]'`` and so on), or your own
            trackers; ``events.jsonl`` and the Parquet tables are always written.
        emit: called with every :class:`~searchr1_async.events.Event`.

        The others are fields of :class:`~searchr1_async.config.LearningSettings`,
        :class:`~searchr1_async.config.PipelineSettings`, :class:`~searchr1_async.config.EpisodeLimits` and
        :class:`~searchr1_async.config.SamplingSettings`, documented there.

    Raises:
        ConfigurationError: bad input; raised by this call, before any work starts.
        SearchR1Error: any other failure; raised by awaiting the run.
    """
    given = checked_arguments(train, locals())
    _require_event_loop()
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
    """Rolls out a group of episodes per question and returns the groups in the order of the questions.

    Arguments and errors as in :func:`searchr1_async.evaluate`: with a run as ``checkpoint``, None means the run's own setting.
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


def _require_event_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise ConfigurationError(
            "train() starts a task: call it in a notebook's cell or in an async function (asyncio.run(main()))"
        ) from None
