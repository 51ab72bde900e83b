"""Runs a training job: checks its folder, opens its services, then goes through its phases.

Read :meth:`_Phases._run` from top to bottom: evaluate, warm up, train (:mod:`searchr1_async.training.loop`), evaluate again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import anyio
import tinker

from searchr1_async.billing import TokenUsage
from searchr1_async.boundary.signals import is_interrupt
from searchr1_async.config import LossName, TrainConfig, WarmUp
from searchr1_async.episodes.types import Episode
from searchr1_async.errors import RunFolderError, SearchR1Error, ungrouped
from searchr1_async.events import CheckpointSaved, Emit, Notice, RunEnded, RunStarted
from searchr1_async.records.run_records import RunRecords
from searchr1_async.rollout.engine import RolloutEngine, open_engine
from searchr1_async.rollout.player import NewestWeights, TinkerPolicy
from searchr1_async.rollout.workers.messages import WorkerSpec
from searchr1_async.runs.ask import LiveAnswers
from searchr1_async.runs.checkpoints import ResumePoint, WarmUpPlace
from searchr1_async.runs.control import RunControl
from searchr1_async.runs.estimate import estimate
from searchr1_async.runs.folder import (
    AFTER_RL,
    AFTER_WARM_UP,
    AT_START,
    UNTRAINED,
    TrainingResult,
    claimed,
    evaluation_steps,
    find_point,
    keep_config,
    keep_questions,
    keep_search,
    keep_tokenizer,
    result_of,
    work_in,
)
from searchr1_async.runs.rollouts import open_search
from searchr1_async.service.availability import watching_service
from searchr1_async.service.connection import Service, find_endpoint, is_embedded, is_tinker_cloud
from searchr1_async.service.startup import billing_on, check_chat_format, check_service, open_service
from searchr1_async.trackers import Tracker, open_trackers
from searchr1_async.training.admission import QuestionOrder
from searchr1_async.training.checks import tell_near_overlap
from searchr1_async.training.held_out import Measuring
from searchr1_async.training.job import TrainingJob, changed_inputs, refuse_other_measure
from searchr1_async.training.learner import Learner
from searchr1_async.training.loop import TrainingLoop
from searchr1_async.training.recorder import Recorder, Session
from searchr1_async.training.start import choose_loss, open_start
from searchr1_async.training.warm_up import (
    chosen_demonstrations,
    demonstration_batches,
    play_demonstrations,
    run_warm_up,
)
from searchr1_async.watch.subscribers import Watchers
from searchr1_async.watch.viewer.parts import remember_tokenizer


async def run_training(
    job: TrainingJob, watchers: Watchers, control: RunControl, trackers: Sequence[Tracker] = ()
) -> TrainingResult:
    """Runs a job to its end, its time limit or a stop.

    Args:
        watchers: get every event.
        trackers: likewise, once the run's folder is claimed; opened and closed here.

    Raises:
        SearchR1Error: any failure; the run's folder holds a resume point.
    """
    control.emit = watchers
    async with AsyncExitStack() as opened:
        reason = "failed"
        try:
            result = await _run_reporting_errors(job, watchers, control, trackers, opened)
            reason = result.reason
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) or is_interrupt(error):
                reason = "stopped"
            raise
        finally:
            watchers(RunEnded(reason))
            watchers.close()
    return result


async def _run_reporting_errors(
    job: TrainingJob, emit: Watchers, control: RunControl, trackers: Sequence[Tracker], opened: AsyncExitStack
) -> TrainingResult:
    try:
        with ungrouped():
            return await _run(job, emit, control, trackers, opened)
    except SearchR1Error as error:
        emit(Notice(f"{type(error).__name__}: {error}", is_warning=True))
        raise


async def _run(
    job: TrainingJob, emit: Watchers, control: RunControl, trackers: Sequence[Tracker], opened: AsyncExitStack
) -> TrainingResult:
    order = QuestionOrder(job.questions, seed=job.learning.seed)
    # First, and in a thread: it reads the whole corpus and refuses an unusable one.
    identity = await anyio.to_thread.run_sync(job.identity)
    point = _load_point(job, identity, order)
    if point is not None and (result := await anyio.to_thread.run_sync(_finished_result, job, point, order)):
        emit(_started(job, identity, order, point, point.base_model))
        emit(Notice(f"nothing left to do: {point.step} steps are done"))
        return result
    config = job.config  # kept as given: with the started model filled in, the kept file would not resume the run
    # A resumed run keeps what it started with, even values that were defaults then.
    job = job.resumed(point)
    await _check_service(job, control, emit)
    if control.stop_requested:
        return await anyio.to_thread.run_sync(result_of, job.out_dir, point, "stopped")
    # On the same stack as the trackers, which close before the folder is released.
    opened.enter_context(claimed(job.out_dir))
    for tracker in await opened.enter_async_context(open_trackers(trackers)):
        emit.subscribe(tracker)
    # Again, now that no other process can write it.
    point = _load_point(job, identity, order)
    job = job.resumed(point)
    if point is not None:
        if changed := changed_inputs(point.inputs, identity["inputs"]):
            text = f"this session continues with different input than the previous one: {'; '.join(changed)}"
            emit(Notice(text, is_warning=True))
        point = point.given(identity["inputs"])
    started = partial(_started, job, identity, order, point)
    with control.interruptible():
        await tell_near_overlap(job.questions, job.held_out, emit)
        await open_search(job.search, emit)
        async with _opened(job, config, order, control, emit, is_new=point is None, started=started) as session:
            return await _Phases(session, Recorder(session, identity, point)).run()
    return await anyio.to_thread.run_sync(result_of, job.out_dir, point, "stopped")


def _load_point(job: TrainingJob, identity: Mapping[str, Any], order: QuestionOrder) -> ResumePoint | None:
    """The resume point of the run in the folder; None if there is none.

    Raises:
        RunFolderError: a run exists but is not to be resumed, or has other settings or questions, or was evaluated differently.
    """
    point = find_point(job.out_dir, resume=job.resume)
    if point is None:
        return None
    try:
        point.refuse_changes(identity, order.fingerprint)
        if job.held_out and RunRecords(job.out_dir).evaluation_labels():
            refuse_other_measure(point.inputs, identity["inputs"])
    except RunFolderError:
        if work_in(job.out_dir, point):
            raise
        return None  # a failed start, now corrected
    return point


def _finished_result(job: TrainingJob, point: ResumePoint, order: QuestionOrder) -> TrainingResult | None:
    """The result of a run with nothing left to do, from its folder alone."""
    records = RunRecords(job.out_dir)
    is_measured = not job.held_out or evaluation_steps(records).get(AFTER_RL) == point.step
    if not job.is_over(point, order) or point.sampler_step != point.step or not is_measured:
        return None
    billing = billing_on(job.service, point.base_model, job.price)
    cost = billing.cost_of(point.dollars, point.tokens)
    result = result_of(job.out_dir, point, "finished")
    return replace(result, cost=cost, estimated_cost=estimate(job.shape, billing))


async def _check_service(job: TrainingJob, control: RunControl, emit: Emit) -> None:
    emit(Notice(find_endpoint(job.service).text))
    for note in job.notes:
        emit(Notice(note))
    with control.interruptible():
        model = await check_service(job.service, job.model, job.local, trains=True, emit=emit)
        await check_chat_format(
            job.service, model, job.tokenizer, renderer_name=job.renderer_name, thinking=job.thinking
        )


@asynccontextmanager
async def _opened(
    job: TrainingJob,
    config: TrainConfig,
    order: QuestionOrder,
    control: RunControl,
    emit: Emit,
    *,
    is_new: bool,
    started: Callable[[str], RunStarted],
) -> AsyncIterator[Session]:
    """Opens the search, the Tinker service and the rollout engine, and keeps in the folder what they were opened from.

    Args:
        config: the settings to keep in the folder.
        is_new: the run has no resume point.
        started: the event of the run's start, by the model's name.
    """
    async with (
        job.search,
        open_service(
            *(job.service, job.model),
            folder=job.out_dir / "service",
            local=job.local,
            emit=emit,
            tokenizer=job.tokenizer,
            trains=True,
        ) as service,
        watching_service(service.client, service.url, emit, job.max_service_outage) as watch,
    ):
        service = replace(service, watch=watch)
        remember_tokenizer(service.tokenizer)
        emit(started(service.model_name))
        async with _opened_engine(job, service, emit := watch.hearing(emit)) as engine:
            await keep_tokenizer(service.tokenizer, job.out_dir, anew=is_new)
            await anyio.to_thread.run_sync(partial(keep_questions, job.questions, job.out_dir, anew=is_new))
            await anyio.to_thread.run_sync(keep_search, job.search, job.out_dir)
            await anyio.to_thread.run_sync(keep_config, config, job.out_dir)
            async with control.serving(service):
                with control.holding(engine.pause), watch.holding(control.wait_for_service):
                    yield Session(job, order, service, engine, control, emit)


def _opened_engine(job: TrainingJob, service: Service, emit: Emit) -> AbstractAsyncContextManager[RolloutEngine]:
    spec = WorkerSpec(
        job.format_name,
        service.model_name,
        service.tokenizer.name_or_path,
        job.limits,
        renderer_name=job.renderer_name,
        thinking=job.thinking,
        instructions=job.instructions,
        first_turn=job.sampling.first_turn,
    )
    return open_engine(
        spec,
        service.tokenizer,
        search=job.search.for_cleaned,
        sampling=job.sampling,
        reward=job.reward,
        group_size=job.learning.group_size,
        max_failed_fraction=job.learning.max_failed_fraction,
        emit=emit,
        search_metrics=lambda: job.search.statistics.metrics(),
    )


def _started(
    job: TrainingJob,
    identity: Mapping[str, Any],
    order: QuestionOrder,
    point: ResumePoint | None,
    model_name: str,
) -> RunStarted:
    embedded = is_embedded(job.service)
    return RunStarted(
        "train",
        model_name,
        is_embedded=embedded,
        is_tinker=not embedded and is_tinker_cloud(job.service),
        embedder=job.search.embedder.name,
        out_dir=str(job.out_dir),
        step=point.step if point else 0,
        total_steps=job.total_steps(order),
        group_size=job.learning.group_size,
        groups_per_batch=job.learning.groups_per_batch,
        settings=identity,
        price=job.price,
        used=point.tokens if point else TokenUsage(),
        spent=point.dollars if point else 0.0,
    )


class _Phases:
    """The phases of one session, from the run's start or resume point to its end."""

    def __init__(self, session: Session, recorder: Recorder) -> None:
        self._session, self._recorder = session, recorder
        self._job, self._service, self._engine = session.job, session.service, session.engine
        self._control, self._emit = session.control, session.emit
        self._spending = recorder.spending
        self._spending.count(session.engine.usage)
        self._measuring = Measuring(session, recorder)
        self._loss: LossName | None = None
        self._exits = ExitStack()
        """Closed at the end of the session."""

    async def run(self) -> TrainingResult:
        """Runs the session and saves its cost however it ends."""
        self._recorder.emit_estimate()
        try:
            with self._exits:
                reason = await self._run()
        finally:
            await self._recorder.save_spending()
        return await self._recorder.result(reason)

    async def _run(self) -> str:
        job, control, recorder = self._job, self._control, self._recorder
        measure, reason, is_whole = self._measuring.measure, "stopped", False
        with control.interruptible():
            client = await self._restore_or_create()
            self._loss = await choose_loss(
                *(self._service, client, job.learning, job.pipeline), point=recorder.point, emit=self._emit
            )
            learner = await self._learner(client)
            newest = NewestWeights(await self._first_policy(learner))
            answers = LiveAnswers(self._service, self._engine.dialect, job.search, job.limits, newest, self._emit)
            self._spending.count(lambda: answers.usage)
            with control.answering(answers):
                if recorder.point is None:
                    await measure(UNTRAINED if job.start is None else AT_START, newest.current)
                if recorder.point is None or recorder.point.warm_up is not None:
                    await self._warm_up(learner)
                    newest.current = TinkerPolicy(await learner.published(), 0, job.sampling)
                if job.warm_up is not None and recorder.point is not None and recorder.point.step == 0:
                    await measure(AFTER_WARM_UP, newest.current)
                reason = await TrainingLoop(self._session, learner, newest, recorder, self._measuring).run()
                if not control.stop_requested:
                    await measure(AFTER_RL, newest.current)
                    is_whole = True
        if control.stop_requested and not is_whole:
            reason = "stopped"
        if control.stop_requested:
            self._emit(Notice("stopped: every finished step is kept, resume=True continues from the last"))
        with control.ending_with(lambda: None):  # a stop from here on changes nothing
            await self._keep_last()
        return reason

    async def _restore_or_create(self) -> tinker.TrainingClient:
        point, rank = self._recorder.point, self._job.learning.lora_rank
        if point is not None:
            self._recorder.records.truncate_after(point.step)
            if point.warm_up is None:
                self._emit(Notice(f"resuming after step {point.step} ({point.next_place} questions consumed)"))
            return await self._service.restore_training_client(point.state_path)
        await self._recorder.start_over()
        if self._job.start is None:
            return await self._service.create_training_client(rank=rank, seed=self._job.learning.seed)
        client, self._recorder.started_from = await open_start(self._job.start, self._service, rank, self._emit)
        return client

    async def _learner(self, client: tinker.TrainingClient) -> Learner:
        learning = self._job.learning
        learner = Learner(
            client,
            learning,
            self._emit,
            loss=self._loss,
            weights_in_flight=self._job.pipeline.weights_in_flight,
            base=await self._service.create_sampling_client() if learning.kl_coefficient else None,
        )
        self._spending.count(lambda: learner.usage)
        self._exits.enter_context(self._control.holding(learner.pause))
        return learner

    async def _first_policy(self, learner: Learner) -> TinkerPolicy:
        """The session's first weights: the base model's, those of ``start_from``, or the resume point's."""
        point = self._recorder.point
        if point is None and self._job.start is None:
            return TinkerPolicy(await self._service.create_sampling_client(), 0, self._job.sampling)
        return TinkerPolicy(await learner.published(), point.step if point else 0, self._job.sampling)

    async def _warm_up(self, learner: Learner) -> None:
        """The supervised warm-up, if any; saves the resume point from which reinforcement learning starts."""
        job, recorder = self._job, self._recorder

        async def save(place: WarmUpPlace) -> None:
            # A new name, since the previous state is valid until then. Saved so that the evaluation of the untrained model counts.
            path = await learner.save_state(f"warm-up-{place.step:04d}")
            point = replace(recorder.point_at_start(path, learner.loss), warm_up=place)
            await recorder.save(point, deletes_old=True)

        if job.warm_up is not None:
            batches, place = await self._warm_up_batches(job.warm_up), recorder.point and recorder.point.warm_up
            if job.start is not None and not (place and place.step):
                self._emit(Notice("the warm-up starts from the weights of start_from"))
            rate, control = job.warm_up.learning_rate, self._control
            await run_warm_up(learner, batches, place, save, learning_rate=rate, control=control, emit=self._emit)
        total = self._session.total_steps
        saved = await (await learner.finish_step(0, total, "start", keep=job.warm_up is not None)).finished()
        point = replace(
            recorder.point_at_start(saved.state_path, learner.loss),
            sampler_path=saved.sampler_path,
            sampler_step=0 if saved.sampler_path else None,
            warm_up=None,
        )
        await recorder.save(point, deletes_old=True)
        self._emit(CheckpointSaved(0, point.state_path))

    async def _warm_up_batches(self, warm_up: WarmUp) -> list[list[Episode]]:
        job, seed = self._job, self._job.learning.seed
        tried = job.demonstrations or chosen_demonstrations(job.questions, warm_up, seed=seed)
        episodes = await play_demonstrations(
            tried,
            dialect=self._engine.dialect,
            search=job.search.for_cleaned,
            limits=job.limits,
            max_failed_fraction=job.learning.max_failed_fraction,
            max_in_flight=job.sampling.max_episodes_in_flight,
        )
        if not episodes:
            raise SearchR1Error(
                f"none of {len(tried)} demonstrations found a golden answer: check that the corpus answers the questions"
            )
        self._emit(Notice(f"{len(episodes)} of {len(tried)} demonstrations found their answer and are trained on"))
        return demonstration_batches(episodes, steps=warm_up.steps, batch_size=warm_up.batch_size, seed=seed)

    async def _keep_last(self) -> None:
        """Keeps the last weights permanently if the last step was no checkpoint."""
        if self._control.stop_requested and self._control.waits_for_service:
            text = "the service does not answer: weights newer than the last kept ones exist only in the resume point"
            self._emit(Notice(text, is_warning=True))
            return
        point = self._recorder.point
        if point is None or point.warm_up is not None or point.sampler_step == point.step:
            return
        # Weights kept for an evaluation will do.
        path = next((one.sampler_path for one in self._recorder.kept.checkpoints if one.step == point.step), None)
        state_path = point.state_path
        if path is None:
            # From the resume point: a stop within a step may have left the trainer's weights ahead of it. Its state is saved
            # again because that of a resume point expires.
            client = await self._service.restore_training_client(state_path)
            learner = await self._learner(client)
            state_path, path = await learner.keep_weights(f"step-{point.step:06d}")
        await self._recorder.save(replace(point, state_path=state_path, sampler_path=path, sampler_step=point.step))
