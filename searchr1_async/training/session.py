"""Runs a training job: checks its folder, opens its services, then goes through its phases.

Read :meth:`_Phases._run` from top to bottom: evaluate, warm up, train (:mod:`searchr1_async.training.loop`), evaluate again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import anyio
import tinker

from searchr1_async.billing import TokenUsage
from searchr1_async.boundary.signals import is_interrupt
from searchr1_async.config import LossName, TrainConfig, WarmUp
from searchr1_async.errors import RunFolderError, ungrouped
from searchr1_async.events import (
    Emit,
    EndReason,
    Notice,
    PhaseAdvanced,
    PhaseEnded,
    PhaseStarted,
    RunEnded,
    RunStarted,
    Watchers,
)
from searchr1_async.records.run_records import RunRecords
from searchr1_async.rollout.player import NewestWeights, TinkerPolicy
from searchr1_async.runs.ask import LiveAnswers
from searchr1_async.runs.control import RunControl
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
from searchr1_async.runs.resume import ResumePoint
from searchr1_async.runs.rollouts import (
    PlaySettings,
    check_model,
    engine_on,
    opened_service,
    opening_search,
    worker_spec,
)
from searchr1_async.runs.weights import EpisodeChoice
from searchr1_async.service.connection import is_embedded, is_tinker_cloud
from searchr1_async.service.opening import billing_on
from searchr1_async.trackers import Tracker, open_trackers
from searchr1_async.training.admission import QuestionOrder
from searchr1_async.training.estimate import estimate
from searchr1_async.training.held_out import Measuring
from searchr1_async.training.initial_weights import find_start, open_start, warm_up_batches
from searchr1_async.training.job import TrainingJob, changed_inputs, refuse_other_measure
from searchr1_async.training.learner import Learner
from searchr1_async.training.loop import TrainingLoop
from searchr1_async.training.losses import choose_loss
from searchr1_async.training.recorder import Recorder, Session


async def run_training(
    job: TrainingJob, watchers: Watchers, control: RunControl, trackers: Sequence[Tracker] = ()
) -> TrainingResult:
    """Runs a job to its end, its time limit or a stop.

    Args:
        watchers: get every event.
        trackers: likewise, once the run's folder is claimed; opened and closed here.
    """
    control.emit = watchers
    async with AsyncExitStack() as opened:
        reason: EndReason = "failed"
        try:
            with ungrouped():
                result = await _run(job, watchers, control, trackers, opened)
            reason = cast(EndReason, result.reason)  # of a session that came to its end
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) or is_interrupt(error):
                reason = "stopped"
            else:
                watchers(Notice(f"{type(error).__name__}: {error}", is_warning=True))
            raise
        finally:
            watchers(RunEnded(reason))
            watchers.close()
    return result


async def _run(
    job: TrainingJob, emit: Watchers, control: RunControl, trackers: Sequence[Tracker], opened: AsyncExitStack
) -> TrainingResult:
    order = QuestionOrder(job.questions, seed=job.learning.seed)
    # First, and in a thread: it reads the whole corpus and refuses an unusable one.
    identity = await anyio.to_thread.run_sync(job.identity)
    point = _load_point(job, identity, order)
    if point is not None and (result := await anyio.to_thread.run_sync(_finished_result, job, point, order)):
        emit(_started(job, identity, point, point.base_model))
        emit(Notice(f"nothing left to do: {point.step} steps are done"))
        return result
    config = job.config  # kept as given: with the started model filled in, the kept file would not resume the run
    # A resumed run keeps what it started with, even values that were defaults then.
    job = job.resumed(point)
    with control.interruptible():
        await check_model(job.service_choice, job.config.episode, emit, trains=True)
        for note in job.notes:
            emit(Notice(note))
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
    started = partial(_started, job, identity, point)
    with control.interruptible():
        async with _opened(job, config, order, control, emit, is_new=point is None, started=started) as session:
            return await _Phases(session, Recorder(session, identity, point)).run()
    return await anyio.to_thread.run_sync(result_of, job.out_dir, point, "stopped")


def _load_point(job: TrainingJob, identity: Mapping[str, Any], order: QuestionOrder) -> ResumePoint | None:
    """The resume point of the run in the folder; None if there is none."""
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
    billing = billing_on(job.service, point.base_model, job.config.cost.price)
    cost = billing.cost_of(point.dollars, point.tokens)
    result = result_of(job.out_dir, point, "finished")
    return replace(result, cost=cost, estimated_cost=estimate(job.shape, billing))


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

    The search may still be opening in the block: an untrained model seldom searches, so it is evaluated while the index is built.
    The engine pauses with the run (:meth:`RunControl.holding`), which pauses while the service is silent.
    """
    play = PlaySettings(
        job.reward,
        job.config.sampling,
        EpisodeChoice().completed_by(job.config.episode),
        job.learning.group_size,
        job.learning.max_failed_fraction,
    )

    def keep() -> None:
        keep_questions(job.questions, job.out_dir, anew=is_new)
        keep_search(job.search, job.out_dir)
        keep_config(config, job.out_dir)

    async with (
        opening_search(job.search, emit),
        opened_service(job.service_choice, job.out_dir / "service", emit, trains=True) as service,
    ):
        watch = service.watch
        assert watch is not None
        emit(started(service.model_name))
        emit = watch.hearing(emit)
        spec, episodes = worker_spec(service, play), job.shape.episodes_in_flight
        async with engine_on(service, spec, job.search, play, emit, episodes=episodes) as engine:
            await keep_tokenizer(service.tokenizer, job.out_dir, anew=is_new)
            await anyio.to_thread.run_sync(keep)
            async with control.serving(service):
                with control.holding(engine.pause), watch.holding(control.wait_for_service):
                    yield Session(job, order, service, engine, control, emit)


def _started(job: TrainingJob, identity: Mapping[str, Any], point: ResumePoint | None, model_name: str) -> RunStarted:
    embedded = is_embedded(job.service)
    return RunStarted(
        "train",
        model_name,
        is_embedded=embedded,
        is_tinker=not embedded and is_tinker_cloud(job.service),
        embedder=job.search.embedder_name,
        out_dir=str(job.out_dir),
        step=point.step if point else 0,
        total_steps=job.shape.total_steps,
        group_size=job.learning.group_size,
        groups_per_batch=job.learning.groups_per_batch,
        settings=identity,
        price=job.config.cost.price,
        used=point.tokens if point else TokenUsage(),
        spent=point.dollars if point else 0.0,
    )


class _Phases:
    """The phases of one session, from the run's start or resume point to its end."""

    def __init__(self, session: Session, recorder: Recorder) -> None:
        self._session, self._recorder = session, recorder
        self._job, self._service, self._engine = session.job, session.service, session.engine
        self._control, self._emit = session.control, session.emit
        self._measuring = Measuring(session, recorder)
        self._loss: LossName | None = None
        self._exits = ExitStack()
        """Closed at the end of the session."""

    async def run(self) -> TrainingResult:
        """Runs the session and saves its cost however it ends."""
        self._recorder.emit_estimate()
        self._recorder.spending.count(self._engine.usage)
        try:
            with self._exits:
                reason = await self._run()
        finally:
            await self._recorder.save_spending()
        return await self._recorder.result(reason)

    async def _run(self) -> EndReason:
        job, control, recorder, measure = self._job, self._control, self._recorder, self._measuring.measure
        reason: EndReason = "stopped"
        with control.interruptible():
            client = await self._restore_or_create()
            pipeline = job.config.pipeline
            self._loss = await choose_loss(
                self._service, client, job.learning, pipeline, point=recorder.point, emit=self._emit
            )
            learner = await self._learner(client)
            newest = NewestWeights(await self._first_policy(learner))
            with self._answering(newest):
                if recorder.point is None:
                    await measure(UNTRAINED if job.start is None else AT_START, newest.current)
                if recorder.point is None or recorder.point.warm_up is not None:
                    await self._prepare(learner)
                    newest.current = TinkerPolicy(await learner.published(), 0, job.config.sampling)
                if job.config.warm_up is not None and recorder.point is not None and recorder.point.step == 0:
                    await measure(AFTER_WARM_UP, newest.current)
                await job.search.opened()  # before the clock of ``time_limit`` runs
                ended = await TrainingLoop(self._session, learner, newest, recorder, self._measuring).run()
                if not control.stop_requested:
                    await measure(AFTER_RL, newest.current)
                    reason = ended
        if control.stop_requested:
            self._emit(Notice("stopped: every finished step is kept, resume=True continues from the last"))
        with control.ending_with(lambda: None):  # a stop from here on changes nothing
            await self._keep_last()
        return reason

    @contextmanager
    def _answering(self, newest: NewestWeights) -> Iterator[None]:
        """The run answers questions during the block, with its newest weights; they belong to its cost."""
        answers = LiveAnswers(
            self._service, self._engine.dialect, self._job.search, self._job.config.episode.limits, newest, self._emit
        )
        self._recorder.spending.count(lambda: answers.usage)
        with self._control.answering(answers):
            yield

    async def _restore_or_create(self) -> tinker.TrainingClient:
        point, rank = self._recorder.point, self._job.learning.lora_rank
        if point is not None:
            self._recorder.records.truncate_after(point.step)
            if point.warm_up is None:
                self._emit(Notice(f"resuming after step {point.step} ({point.next_place} questions consumed)"))
            return await self._service.restore_training_client(point.state_path)
        await self._recorder.start_over()
        start = self._job.start
        if start is None:
            return await self._service.create_training_client(rank=rank, seed=self._job.learning.seed)
        if start.state is None and start.adapter is None:  # of a failed start, whose own state does not fit any more
            start = find_start(start.name, self._job.service, self._job.out_dir)
        client, self._recorder.started_from = await open_start(start, self._service, rank, self._emit)
        return client

    async def _learner(self, client: tinker.TrainingClient) -> Learner:
        learning = self._job.learning
        learner = Learner(
            client,
            learning,
            self._emit,
            loss=self._loss,
            weights_in_flight=self._job.config.pipeline.weights_in_flight,
            base=await self._service.create_sampling_client() if learning.kl_coefficient else None,
        )
        self._recorder.spending.count(lambda: learner.usage)
        self._exits.enter_context(self._control.holding(learner.pause))
        return learner

    async def _first_policy(self, learner: Learner) -> TinkerPolicy:
        """The session's first weights: the base model's, those of ``start_from``, or the resume point's."""
        point, sampling = self._recorder.point, self._job.config.sampling
        if point is None and self._job.start is None:
            return TinkerPolicy(await self._service.create_sampling_client(), 0, sampling)
        return TinkerPolicy(await learner.published(), point.step if point else 0, sampling)

    async def _prepare(self, learner: Learner) -> None:
        """The warm-up, if any; saves the resume point from which reinforcement learning starts."""
        warm_up = self._job.config.warm_up
        if warm_up is not None:
            await self._warm_up(learner, warm_up)
        saved = await learner.save("start", keep=warm_up is not None)
        await self._recorder.save_start(saved.state_path, learner.loss, sampler_path=saved.sampler_path)

    async def _warm_up(self, learner: Learner, warm_up: WarmUp) -> None:
        """Supervised steps on demonstrations, from where an earlier session stopped; the learning rate falls linearly to a tenth."""
        job, recorder = self._job, self._recorder

        async def save(done: int) -> None:
            # A new name, since the previous state is valid until then.
            saved = await learner.save(f"warm-up-{done:04d}", keep=False)
            await recorder.save_start(saved.state_path, learner.loss, warm_up=done)

        if recorder.point is None:
            await save(0)  # so that the evaluation of the untrained model counts, also while the search still opens
        batches = await warm_up_batches(
            job.demonstrations,
            job.questions,
            job.config,
            dialect=self._engine.dialect,
            search=job.search.search,
            emit=self._emit,
        )
        first = (recorder.point and recorder.point.warm_up) or 0
        began = anyio.current_time()
        self._emit(PhaseStarted("warm-up", len(batches), "steps"))
        if first:
            self._emit(Notice(f"the warm-up continues after step {first} of {len(batches)}"))
            self._emit(PhaseAdvanced("warm-up", first))
        for step, batch in enumerate(batches[first:], first):
            await self._control.wait_while_paused()
            rate = warm_up.learning_rate * (1 - 0.9 * step / len(batches))
            loss = await learner.supervised_step(batch, rate)
            await save(step + 1)
            self._emit(PhaseAdvanced("warm-up", step + 1, {"loss": loss}))
        self._emit(PhaseEnded("warm-up", anyio.current_time() - began))

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
            learner = await self._learner(await self._service.restore_training_client(state_path))
            saved = await learner.save(f"step-{point.step:06d}", keep=True)
            state_path, path = saved.state_path, saved.sampler_path
        await self._recorder.save(replace(point, state_path=state_path), path)
