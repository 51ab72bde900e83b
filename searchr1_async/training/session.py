"""Runs a training job.

Read :func:`_Training.run` from top to bottom: open the services, evaluate, warm up, train (:mod:`searchr1_async.training.loop`),
evaluate again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import anyio
import tinker

from searchr1_async.billing import TokenUsage
from searchr1_async.boundary.signals import is_interrupt
from searchr1_async.config import LossName
from searchr1_async.errors import SearchR1Error, ungrouped
from searchr1_async.events import CheckpointSaved, Emit, Notice, RunEnded, RunStarted
from searchr1_async.records.run_records import RunRecords
from searchr1_async.rollout.engine import RolloutEngine, open_engine
from searchr1_async.rollout.player import NewestWeights, TinkerPolicy
from searchr1_async.rollout.workers.messages import WorkerSpec
from searchr1_async.runs.ask import LiveAnswers
from searchr1_async.runs.checkpoints import CheckpointList, ResumePoint, WarmUpPlace
from searchr1_async.runs.control import RunControl
from searchr1_async.runs.estimate import estimate
from searchr1_async.runs.folder import (
    AFTER_RL,
    AFTER_WARM_UP,
    AT_START,
    UNTRAINED,
    claimed,
    finished_result,
    keep_config,
    keep_questions,
    keep_search,
    keep_tokenizer,
    load_point,
    result_of,
    writing_records,
)
from searchr1_async.runs.rollouts import open_search
from searchr1_async.service.availability import watching_service
from searchr1_async.service.connection import Service, find_endpoint, is_embedded, is_tinker_cloud
from searchr1_async.service.startup import billing_on, check_chat_format, check_service, open_service
from searchr1_async.trackers import Tracker, open_trackers
from searchr1_async.training.abilities import choose_loss
from searchr1_async.training.admission import QuestionOrder
from searchr1_async.training.checks import tell_near_overlap
from searchr1_async.training.held_out import Measuring
from searchr1_async.training.job import TrainingJob, TrainingResult, changed_inputs
from searchr1_async.training.learner import Learner
from searchr1_async.training.loop import Pipeline
from searchr1_async.training.recorder import Keeper, StepRecorder, delete_checkpoints, forget_attempt
from searchr1_async.training.spending import keep_spending, spending_of, tell_estimate, with_cost
from searchr1_async.training.start import open_start
from searchr1_async.training.warm_up import WarmingUp
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
    point = load_point(job, identity, order)
    if point is not None and (result := await anyio.to_thread.run_sync(finished_result, job, point, order)):
        emit(_started(job, identity, order, point, point.base_model))
        emit(Notice(f"nothing left to do: {point.step} steps are done"))
        billing = billing_on(job.service, point.base_model, job.price)
        cost = billing.cost_of(point.dollars, point.tokens)
        return replace(result, cost=cost, estimated_cost=estimate(job.shape, billing))
    # A resumed run keeps what it started with, even values that were defaults then.
    job = job.resumed(point)
    emit(Notice(find_endpoint(job.service).text))
    for note in job.notes:
        emit(Notice(note))
    with control.interruptible():
        model = await check_service(job.service, job.model, job.local, trains=True, emit=emit)
        await check_chat_format(
            job.service, model, job.tokenizer, renderer_name=job.renderer_name, thinking=job.thinking
        )
    if control.stop_requested:
        return await anyio.to_thread.run_sync(result_of, job.out_dir, point, "stopped")
    # On the same stack as the trackers, which close before the folder is released.
    opened.enter_context(claimed(job.out_dir))
    for tracker in await opened.enter_async_context(open_trackers(trackers)):
        emit.subscribe(tracker)
    # Again, now that no other process can write it.
    point = load_point(job, identity, order)
    job = job.resumed(point)
    if point is not None:
        if changed := changed_inputs(point.inputs, identity["inputs"]):
            text = f"this session continues with different input than the previous one: {'; '.join(changed)}"
            emit(Notice(text, is_warning=True))
        point = point.given(identity["inputs"])
    with control.interruptible():
        await tell_near_overlap(job.questions, job.held_out, emit)
        await open_search(job.search, emit)
        async with _opened(job, emit, control, identity, order, point) as training:
            return await training.run()
    return await anyio.to_thread.run_sync(result_of, job.out_dir, point, "stopped")


@asynccontextmanager
async def _opened(
    job: TrainingJob,
    emit: Emit,
    control: RunControl,
    identity: Mapping[str, Any],
    order: QuestionOrder,
    point: ResumePoint | None,
) -> AsyncIterator[_Training]:
    """The run's services: the Tinker service and the search."""
    async with (
        job.search,
        open_service(
            job.service,
            job.model,
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
        emit(_started(job, identity, order, point, service.model_name))
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
        async with open_engine(
            spec,
            service.tokenizer,
            search=job.search,
            sampling=job.sampling,
            reward=job.reward,
            group_size=job.learning.group_size,
            max_failed_fraction=job.learning.max_failed_fraction,
            emit=(emit := watch.hearing(emit)),
            search_metrics=lambda: job.search.statistics.metrics(),
        ) as engine:
            await keep_tokenizer(service.tokenizer, job.out_dir, anew=point is None)
            await anyio.to_thread.run_sync(partial(keep_questions, job.questions, job.out_dir, anew=point is None))
            await anyio.to_thread.run_sync(keep_search, job.search, job.out_dir)
            await anyio.to_thread.run_sync(keep_config, job.config, job.out_dir)
            async with control.serving(service):
                with control.holding(engine.pause), watch.holding(control.wait_for_service):
                    yield _Training(job, emit, control, service, engine, identity, order, point)


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


class _Training:
    """One session of a run, from its start or resume point to its end."""

    def __init__(
        self,
        job: TrainingJob,
        emit: Emit,
        control: RunControl,
        service: Service,
        engine: RolloutEngine,
        identity: Mapping[str, Any],
        order: QuestionOrder,
        point: ResumePoint | None,
    ) -> None:
        self._job, self._emit, self._service, self._engine, self._order = job, emit, service, engine, order
        self._control, self._identity, self._point = control, identity, point
        self._spending = spending_of(job, service, point)
        self._spending.count(engine.usage)
        self._held = ExitStack()
        """Context managers open for the session."""
        self._loss: LossName | None = None
        self._started_from: Mapping[str, Any] | None = None
        self._records = RunRecords(job.out_dir)
        self._kept = CheckpointList(job.out_dir, keep_best=job.keep_best)
        self._measuring = Measuring(job, service, engine, self._records, self._kept, control=control, emit=emit)

    async def run(self) -> TrainingResult:
        """Runs the session and saves its cost however it ends."""
        tell_estimate(self._spending, self._point, self._emit)
        try:
            with self._held:
                reason = await self._run()
        finally:
            if self._point is not None:
                self._point = await keep_spending(self._spending, self._point, self._job.out_dir, self._emit)
        result = await anyio.to_thread.run_sync(result_of, self._job.out_dir, self._point, reason)
        return with_cost(result, self._spending, self._emit)

    async def _run(self) -> str:
        job, control = self._job, self._control
        measure, reason, is_whole = self._measuring.measure, "stopped", False
        with control.interruptible():
            client = await self._restore_or_create()
            self._loss = await choose_loss(self._service, client, job, self._point, self._emit)
            learner = await self._learner(client)
            newest = NewestWeights(await self._first_policy(learner))
            answers = LiveAnswers(self._service, self._engine.dialect, job.search, job.limits, newest, self._emit)
            self._spending.count(lambda: answers.usage)
            with control.answering(answers):
                if self._point is None:
                    await measure(UNTRAINED if job.start is None else AT_START, newest.current)
                if self._point is None or self._point.warm_up is not None:
                    self._point = await self._warm_up(learner)
                    newest.current = TinkerPolicy(await learner.published(), 0, job.sampling)
                if job.warm_up is not None and self._point.step == 0:
                    await measure(AFTER_WARM_UP, newest.current)
                reason = await self._learn(learner, newest, self._point)
                if not control.stop_requested:
                    await measure(AFTER_RL, newest.current)
                    is_whole = True
        if control.stop_requested and not is_whole:
            reason = "stopped"
        if control.stop_requested:
            self._emit(Notice("stopped: every finished step is kept, resume=True continues from the last"))
        with control.ending_with(lambda: None):  # a stop from here on changes nothing
            if control.stop_requested and control.waits_for_service:
                text = (
                    "the service does not answer: weights newer than the last kept ones exist only in the resume point"
                )
                self._emit(Notice(text, is_warning=True))
            else:
                await self._keep_last()
        return reason

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
        self._held.enter_context(self._control.holding(learner.pause))
        return learner

    async def _first_policy(self, learner: Learner) -> TinkerPolicy:
        """The session's first weights: the base model's, those of ``start_from``, or the resume point's."""
        if self._point is None and self._job.start is None:
            return TinkerPolicy(await self._service.create_sampling_client(), 0, self._job.sampling)
        step = self._point.step if self._point else 0
        return TinkerPolicy(await learner.published(), step, self._job.sampling)

    async def _learn(self, learner: Learner, newest: NewestWeights, point: ResumePoint) -> str:
        """Reinforcement learning from the resume point; returns why it ended."""
        job, total = self._job, self._job.total_steps(self._order)
        recorder = StepRecorder(
            *(job, self._records, self._service, point, self._kept),
            total=total,
            spending=self._spending,
            emit=self._emit,
        )
        pipeline = Pipeline(
            job,
            self._order,
            self._engine,
            learner,
            newest,
            recorder=recorder,
            keeper=Keeper(job),
            measuring=self._measuring,
            control=self._control,
            emit=self._emit,
        )
        try:
            return await pipeline.run()
        finally:
            self._point = recorder.point

    async def _keep_last(self) -> None:
        """Keeps the last weights permanently if the last step was no checkpoint."""
        point = self._point
        if point is None or point.warm_up is not None or point.sampler_step == point.step:
            return
        # Weights kept for an evaluation will do.
        path = next((one.sampler_path for one in self._kept.checkpoints if one.step == point.step), None)
        state_path = point.state_path
        if path is None:
            # From the resume point: a stop within a step may have left the trainer's weights ahead of it. Its state is saved
            # again because that of a resume point expires.
            client = await self._service.restore_training_client(state_path)
            learner = await self._learner(client)
            state_path, path = await learner.keep_weights(f"step-{point.step:06d}")
        await self._save_kept(replace(point, state_path=state_path, sampler_path=path, sampler_step=point.step))

    async def _save_kept(self, point: ResumePoint) -> None:
        """Saves a resume point, and its kept weights if any."""
        self._point = point = self._spending.written_into(point)

        def save() -> None:
            if point.sampler_path is not None and point.sampler_step is not None:
                with writing_records(self._job.out_dir):
                    state = point.state_path if point.sampler_step == point.step else None
                    self._kept.add(point.sampler_step, point.sampler_path, for_good=True, state_path=state)
            point.save(self._job.out_dir)

        await anyio.to_thread.run_sync(save)

    async def _restore_or_create(self) -> tinker.TrainingClient:
        if self._point is None:
            await forget_attempt(self._job, self._records, self._kept, self._service)
            if self._job.start is not None:
                client, self._started_from = await open_start(
                    self._job.start, self._service, self._job.learning.lora_rank, self._emit
                )
                return client
            return await self._service.create_training_client(
                rank=self._job.learning.lora_rank, seed=self._job.learning.seed
            )
        self._records.truncate_after(self._point.step)
        if self._point.warm_up is None:
            self._emit(Notice(f"resuming after step {self._point.step} ({self._point.next_place} questions consumed)"))
        return await self._service.restore_training_client(self._point.state_path)

    async def _warm_up(self, learner: Learner) -> ResumePoint:
        """The supervised warm-up, if any; returns the resume point from which reinforcement learning starts."""
        job, point = self._job, self._point
        if job.warm_up is not None:
            warming = WarmingUp(job, job.warm_up, self._engine, self._control, self._emit)
            await warming.run(learner, point and point.warm_up, partial(self._keep_warm_up, learner))
        total = job.total_steps(self._order)
        saved = await (await learner.finish_step(0, total, "start", keep=job.warm_up is not None)).finished()
        before = self._point
        point = replace(
            self._first_point(learner, saved.state_path),
            sampler_path=saved.sampler_path,
            sampler_step=0 if saved.sampler_path else None,
            warm_up=None,
        )
        await self._save_kept(point)
        if before is not None:
            await delete_checkpoints(self._service, [before.state_path])
        self._emit(CheckpointSaved(0, point.state_path))
        return point

    async def _keep_warm_up(self, learner: Learner, place: WarmUpPlace) -> None:
        """Saves the warm-up's progress and weights, so the evaluation of the untrained model stays valid."""
        before = self._point
        path = await learner.save_state(
            f"warm-up-{place.step:04d}"
        )  # a new name: the previous state is valid until then
        await self._save_kept(replace(self._first_point(learner, path), warm_up=place))
        if before is not None:
            await delete_checkpoints(self._service, [before.state_path])

    def _first_point(self, learner: Learner, state_path: str) -> ResumePoint:
        if self._point is not None:
            return replace(self._point, state_path=state_path)
        return ResumePoint(
            step=0,
            next_place=0,
            state_path=state_path,
            order_fingerprint=self._order.fingerprint,
            base_model=self._service.model_name,
            settings=self._identity,
            loss=learner.loss,
            started_from=self._started_from,
        )
