"""The public functions ``train`` and ``rollout``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Annotated

import anyio
import tinker

from searchr1_async.boundary.paths import FilePath
from searchr1_async.boundary.settings import checked_arguments, list_of, settings_of
from searchr1_async.config import RolloutConfig, TrainConfig
from searchr1_async.config.configs import takes_config
from searchr1_async.data.questions import Questions, checked_questions
from searchr1_async.episodes.rendering import check_thinking
from searchr1_async.episodes.reward import RecipeReward, RewardFunction
from searchr1_async.episodes.types import Group
from searchr1_async.errors import ConfigurationError
from searchr1_async.events import Emit
from searchr1_async.runs.control import RunControl
from searchr1_async.runs.folder import TrainingResult, past_events
from searchr1_async.runs.rollouts import PlaySettings, ServiceChoice, open_watchers, play_all, playing
from searchr1_async.runs.run import Run
from searchr1_async.runs.weights import (
    RECIPE_EPISODES,
    EpisodeChoice,
    GivenSearch,
    GivenWeights,
    find_weights,
    model_name,
)
from searchr1_async.trackers import Tracker, make_trackers
from searchr1_async.training.checks import training_job
from searchr1_async.training.session import run_training
from searchr1_async.training.warm_up import Demonstration
from searchr1_async.watch.dashboard import Choice, open_view
from searchr1_async.watch.subscribers import EventStreams


@takes_config(TrainConfig, emit="on_event", switch_weights_in_flight="config=sr.TrainConfig(weights_in_flight=…)")
def train(
    questions: Questions,
    search: GivenSearch,
    out_dir: FilePath,
    config: TrainConfig | None = None,
    *,
    held_out: Questions = (),
    demonstrations: Annotated[Sequence[Demonstration], list_of(Demonstration)] = (),
    reward: RewardFunction | None = None,
    service: str | tinker.ServiceClient | None = None,
    resume: bool = False,
    progress: Choice = True,
    trackers: Sequence[str | Tracker] = (),
    on_event: Emit | None = None,
) -> Run:
    """Trains a model by reinforcement learning to answer questions with a search tool.

    Call it inside a running event loop (a notebook cell or an ``async`` function). It returns a :class:`Run` at once; awaiting
    that gives a :class:`TrainingResult`.

    Args:
        questions: a suite's name, a file, questions, a frame or a list of dicts; see :func:`load_questions`.
        search: the tool; see :class:`Search`.
        out_dir: the run's folder, which also gets the settings as ``config.toml``. All paths are made absolute when called, with
            ``~`` expanded.
        config: the settings, each documented at its field; None: the defaults. A resume keeps the run's own sizes unless they are
            given; another value of a setting that defines the run is refused, by name.
        held_out: questions to evaluate on: untrained, after the warm-up and after reinforcement learning. None of them may be
            in ``questions``.
        demonstrations: for the warm-up; by default built from the questions (their ``search_queries``, else their text).
        reward: ``async def reward(episode) -> float``, or a plain ``def``, which may block and runs in a worker thread (several at
            once). True and False count as 1 and 0. A :class:`Score` names the parts of a reward. None: the recipe's reward.
        service: base URL or client of a Tinker service, or ``"embedded"``. None: the service of ``TINKER_BASE_URL``, else Tinker's
            cloud if the SDK has credentials (``TINKER_API_KEY``, ``TINKER_CREDENTIAL_CMD``, ``tinker auth login``), else the
            embedded service, started and stopped with the run. The run's first line reports the choice and why.
        resume: resume the run in ``out_dir`` from its last finished step; start fresh if there is none.
        progress: True shows the run live in the notebook cell or terminal; ``"widget"``, ``"rich"``, ``"terminal"`` and
            ``"plain"`` choose how; False shows nothing.
        trackers: ``"wandb"``, ``"tensorboard"``, ``"trackio"`` (``pip install 'searchr1_async[wandb]'`` and so on), or your own
            trackers; ``events.jsonl`` and the Parquet tables are always written.
        on_event: called with every :class:`~searchr1_async.events.Event`.

    Raises:
        ConfigurationError: bad input; raised by this call, before any work starts.
        SearchR1Error: any other failure; raised by awaiting the run.
    """
    given = checked_arguments(train, locals())
    _require_event_loop()
    job = training_job(given)
    opened = make_trackers(trackers, job.out_dir)
    run = Run(job.out_dir, search, ServiceChoice(service, job.model, job.local, job.tokenizer))
    view = open_view(progress, title=f"train {job.out_dir.name}", controls=run)

    async def work(control: RunControl, streams: EventStreams) -> TrainingResult:
        async with AsyncExitStack() as stack:
            if resume and view is not None:
                await anyio.to_thread.run_sync(view.begin_with, lambda: past_events(job.out_dir))
            watchers = await open_watchers(stack, view, on_event)
            watchers.subscribe(streams)
            return await run_training(job, watchers, control, opened)

    run.begin(work)
    return run


@takes_config(RolloutConfig, emit="on_event")
async def rollout(
    questions: Questions,
    search: GivenSearch,
    config: RolloutConfig | None = None,
    *,
    checkpoint: GivenWeights | None = None,
    service: str | tinker.ServiceClient | None = None,
    service_folder: FilePath | None = None,
    reward: RewardFunction | None = None,
    progress: Choice = True,
    on_event: Emit | None = None,
) -> list[Group]:
    """Rolls out a group of episodes per question and returns the groups in the order of the questions.

    Args:
        questions, search, service, reward, progress, on_event: as in :func:`train`.
        config: the settings; None: the defaults. With a run as ``checkpoint``, open settings are the run's own.
        checkpoint: a run's folder (its last kept weights), a ``tinker://…/sampler_weights/…`` path, or None for the base model.
        service_folder: the embedded service's folder with a ``tinker://`` checkpoint; not needed for a run's folder.

    Raises:
        ConfigurationError: bad input; raised before any work starts.
        ServiceError: the service is unreachable or lacks the model or weights.
        TooManyFailuresError: more than ``max_failed_fraction`` of the episodes failed.
    """
    given = checked_arguments(rollout, locals())
    config = config or RolloutConfig()
    model = model_name(config.model.name, service)
    check_thinking(model, config.episode.renderer, config.episode.thinking)
    weights = find_weights(given["checkpoint"], service_folder=given["service_folder"])
    choice = EpisodeChoice().completed_by(config.episode)
    play = settings_of(
        PlaySettings,
        config.flat(),
        reward=reward or RecipeReward(),
        sampling=config.sampling,
        episodes=weights.episodes(choice, search).completed_by(RECIPE_EPISODES),
    )
    items = checked_questions(questions)
    async with playing(
        search,
        play,
        settings_of(ServiceChoice, config.flat(), service=service, model=model, local=config.local),
        weights=weights,
        tells_differences=True,
        progress=progress,
        emit=on_event,
    ) as (engine, policy):
        return await play_all(engine, items, policy, samples=play.group_size, phase="rollout", label="")


def _require_event_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise ConfigurationError(
            "train() starts a task: call it in a notebook's cell or in an async function (asyncio.run(main()))"
        ) from None
