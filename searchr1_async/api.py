"""The public functions ``train`` and ``rollout``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack

import anyio
import tinker

from searchr1_async.boundary.paths import FilePath
from searchr1_async.boundary.settings import checked_arguments
from searchr1_async.config import RolloutConfig, TrainConfig
from searchr1_async.data.questions import Questions, load_questions
from searchr1_async.episodes.rewards import RewardFunction
from searchr1_async.episodes.types import Group
from searchr1_async.errors import ConfigurationError
from searchr1_async.events import Emit, EventStreams
from searchr1_async.runs.control import RunControl
from searchr1_async.runs.folder import TrainingResult, past_events
from searchr1_async.runs.rollouts import ServiceChoice, open_watchers, play_all, playing
from searchr1_async.runs.run import Run
from searchr1_async.runs.weights import (
    GivenSearch,
    GivenWeights,
    find_weights,
)
from searchr1_async.trackers import Tracker, make_trackers
from searchr1_async.training.initial_weights import Demonstration
from searchr1_async.training.job import training_job
from searchr1_async.training.session import run_training
from searchr1_async.watch.views import Choice, open_view


def train(
    questions: Questions,
    search: GivenSearch,
    out_dir: FilePath,
    config: TrainConfig | None = None,
    *,
    held_out: Questions = (),
    demonstrations: Sequence[Demonstration] = (),
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
            cloud if the SDK has credentials, else the embedded service, started and stopped with the run, which reports the choice.
        resume: resume the run in ``out_dir`` from its last finished step; start fresh if there is none.
        progress: True shows the run live in the notebook cell or terminal, ``"plain"`` prints lines, False shows nothing.
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
    run = Run(
        job.out_dir, search, ServiceChoice(service, job.config.model.name, job.config.local, job.config.model.tokenizer)
    )
    view = open_view(progress, title=f"train {job.out_dir.name}")

    async def work(control: RunControl, streams: EventStreams) -> TrainingResult:
        async with AsyncExitStack() as stack:
            if resume and view is not None:
                await anyio.to_thread.run_sync(view.begin_with, lambda: past_events(job.out_dir))
            watchers = await open_watchers(stack, view, on_event)
            watchers.subscribe(streams)
            return await run_training(job, watchers, control, opened)

    run.begin(work)
    return run


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
    given, config = checked_arguments(rollout, locals()), config or RolloutConfig()
    weights = find_weights(given["checkpoint"], service_folder=given["service_folder"])
    items = load_questions(questions)
    async with playing(
        *(search, config, weights, service),
        questions=len(items),
        reward=reward,
        tells_differences=True,
        progress=progress,
        emit=on_event,
    ) as (engine, policy, play):
        return await play_all(engine, items, policy, samples=play.group_size, phase="rollout", label="")
    raise AssertionError("playing() hides no exception")


def _require_event_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise ConfigurationError(
            "train() starts a task: call it in a notebook's cell or in an async function (asyncio.run(main()))"
        ) from None
