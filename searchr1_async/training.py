"""Training: the parts wired together, and the loop that is the algorithm.

Read :func:`_Training.run` from top to bottom: open the services, measure the model, warm it up, then for every batch of
questions play the groups, send minibatches to the trainer as they become complete, step, and write down where the run stands.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import anyio
import tinker

from searchr1_async.config import WarmUp
from searchr1_async.episodes.dialect import make_dialect
from searchr1_async.episodes.types import Group, Question
from searchr1_async.errors import SearchR1Error, ServiceError
from searchr1_async.evaluation.evaluate import evaluate_policy
from searchr1_async.events import (
    CheckpointSaved,
    Emit,
    Notice,
    PhaseAdvanced,
    PhaseEnded,
    PhaseStarted,
    RunEnded,
    StepFinished,
)
from searchr1_async.job import StopRequest, TrainingJob, TrainingResult
from searchr1_async.learn.checkpoints import ResumePoint
from searchr1_async.learn.demonstrations import Demonstration, demonstration_batches, play_demonstrations
from searchr1_async.learn.learner import FinishedStep, Learner
from searchr1_async.learn.minibatches import MinibatchGatherer, drop_reason
from searchr1_async.rollout.engine import RolloutEngine
from searchr1_async.rollout.order import QuestionOrder
from searchr1_async.rollout.policy import TinkerPolicy
from searchr1_async.run_folder import (
    AFTER_RL,
    AFTER_WARM_UP,
    UNTRAINED,
    claimed,
    evaluation_steps,
    finished_result,
    first_error,
    load_evaluations,
    load_point,
    writing_records,
)
from searchr1_async.search import Search
from searchr1_async.service import Service, check_service, open_service
from searchr1_async.watch.metrics import group_metrics
from searchr1_async.watch.records import GroupOutcome, RunRecords

logger = logging.getLogger(__name__)


async def run_training(job: TrainingJob, emit: Emit, stop: StopRequest) -> TrainingResult:
    """Runs a job to its end, to its time limit or to a stop.

    Raises:
        SearchR1Error: whatever went wrong, as one of the package's errors; the run's folder holds a resume point.
    """
    try:
        result = await _run(job, emit, stop)
    except* SearchR1Error as group:
        emit(RunEnded("failed"))
        raise first_error(group) from group
    emit(RunEnded(result.reason))
    return result


async def _run(job: TrainingJob, emit: Emit, stop: StopRequest) -> TrainingResult:
    order = QuestionOrder(job.questions, seed=job.learning.seed, groups_per_batch=job.learning.groups_per_batch)
    # In a thread, and first: it reads the corpus whole, and refuses one that cannot be used.
    identity = await anyio.to_thread.run_sync(job.identity)
    point = load_point(job, identity, order)
    if point is not None and (result := await anyio.to_thread.run_sync(finished_result, job, point, order)):
        return result
    await check_service(job.service, job.model, job.local)
    with claimed(job.out_dir):
        # Once more, now that nobody else can write it.
        point = load_point(job, identity, order)
        async with _opened(job, emit, identity, order, point) as training:
            return await training.run(stop)


@asynccontextmanager
async def _opened(
    job: TrainingJob, emit: Emit, identity: Mapping[str, Any], order: QuestionOrder, point: ResumePoint | None
) -> AsyncIterator[_Training]:
    """The services of a run: the Tinker service and the search, closed together whatever happens."""
    await open_search(job.search, emit)
    async with (
        job.search,
        open_service(
            job.service,
            job.model,
            folder=job.out_dir / "service",
            local=job.local,
            emit=emit,
            tokenizer=job.tokenizer,
        ) as service,
    ):
        yield _Training(job, emit, service, identity, order, point)


async def open_search(search: Search, emit: Emit) -> None:
    """Builds the search's index where there is none yet, showing progress."""
    started = False
    began = anyio.current_time()

    def on_progress(done: int, total: int) -> None:
        nonlocal started
        if not started:
            started = True
            emit(PhaseStarted("index", total, "passages"))
        emit(PhaseAdvanced("index", done))

    await search.build(on_progress)
    if started:
        emit(PhaseEnded("index", anyio.current_time() - began))


class _Training:
    """One session of a run: from its start, or from its resume point, to its end."""

    def __init__(
        self,
        job: TrainingJob,
        emit: Emit,
        service: Service,
        identity: Mapping[str, Any],
        order: QuestionOrder,
        point: ResumePoint | None,
    ) -> None:
        self._job, self._emit, self._service, self._order = job, emit, service, order
        self._identity, self._point = identity, point
        self._records = RunRecords(job.out_dir)
        dialect = make_dialect(
            job.format_name,
            service.model_name,
            service.tokenizer,
            renderer_name=job.renderer_name,
            instructions=job.instructions,
        )
        self._engine = RolloutEngine(
            dialect=dialect,
            search=job.search,
            limits=job.limits,
            sampling=job.sampling,
            reward=job.reward,
            group_size=job.learning.group_size,
            max_failed_fraction=job.learning.max_failed_fraction,
            emit=emit,
        )

    async def run(self, stop: StopRequest) -> TrainingResult:
        job = self._job
        reason = "stopped"
        with stop.interruptible():
            client = await self._restore_or_create()
            learner = Learner(client, job.learning, self._emit)
            if self._point is None:
                await self._measure(
                    UNTRAINED, TinkerPolicy(await self._service.create_sampling_client(), 0, job.sampling)
                )
                self._point = await self._warm_up(learner)
            policy = TinkerPolicy(await self._sampling_client(client), self._point.step, job.sampling)
            if job.warm_up is not None and self._point.step == 0:
                await self._measure(AFTER_WARM_UP, policy)
            reason, policy = await self._learn(learner, policy)
            await self._measure(AFTER_RL, policy)
        if stop.requested:
            self._emit(Notice("stopped: every finished step is kept, resume=True goes on from the last"))
        await self._keep_sampler()
        point = self._point
        return TrainingResult(
            out_dir=job.out_dir,
            steps=point.step if point else 0,
            reason=reason,
            checkpoint=point.sampler_path if point else None,
            evaluations=load_evaluations(self._records),
            seconds=point.seconds if point else 0.0,
        )

    async def _learn(self, learner: Learner, policy: TinkerPolicy) -> tuple[str, TinkerPolicy]:
        """Reinforcement learning, batch by batch, from the resume point on."""
        point = self._point
        assert point is not None
        learning, began, before = self._job.learning, anyio.current_time(), point.seconds
        total = learning.steps if learning.steps is not None else self._order.steps(learning.epochs)
        # What a step may take: the longest seen; the mean of earlier sessions where none was seen in this one.
        longest = before / point.step if point.step else 0.0
        reason = "finished"
        limit = None if self._job.time_limit is None else max(0.0, self._job.time_limit - before)
        self._emit(PhaseStarted("train", total, "steps", seconds_at_most=limit))
        self._emit(PhaseAdvanced("train", point.step))
        while point.step < total:
            step_began = anyio.current_time()
            if limit is not None and step_began - began + longest > limit:
                reason = "time_limit"
                self._emit(Notice(f"the time limit is near: reinforcement learning ends after {point.step} steps"))
                break
            step = point.step + 1
            questions = self._order.batch(point.next_place)
            searched_before = self._job.search.statistics
            groups = await self._play_and_submit(questions, policy, learner, step)
            sampled_at = anyio.current_time()
            is_last = step == total
            finished = await learner.finish_step(
                f"step-{step:06d}", keep=is_last or step % learning.checkpoint_every == 0
            )
            now = anyio.current_time()
            longest = max(longest, now - step_began)
            # In a thread: 1,024 episodes take 0.1 s.
            played = await anyio.to_thread.run_sync(partial(group_metrics, groups, policy_version=policy.version))
            metrics = {
                "progress/batch": float(step),
                "progress/done_frac": step / total,
                **played,
                **self._job.search.statistics.since(searched_before).metrics(),
                **finished.metrics,
                "time/total": now - step_began,
                "time/sampling": sampled_at - step_began,
                "time/training_after_sampling": now - sampled_at,
            }
            policy = TinkerPolicy(finished.sampling_client, step, self._job.sampling)
            point = await self._step_is_finished(point, finished, groups, metrics, len(questions), before + now - began)
            if self._job.evaluate_every and step % self._job.evaluate_every == 0 and not is_last:
                await self._measure(f"step {step}", policy)
        self._emit(PhaseEnded("train", anyio.current_time() - began))
        return reason, policy

    async def _play_and_submit(
        self, questions: Sequence[Question], policy: TinkerPolicy, learner: Learner, step: int
    ) -> list[Group]:
        """Plays one batch; each minibatch goes to the trainer the moment its last group is complete."""
        gatherer = MinibatchGatherer(len(questions), self._job.learning.minibatches)
        send, receive = anyio.create_memory_object_stream[Group](math.inf)
        groups: list[Group] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(self._engine.play_groups, questions, policy, send, step=step))
            async with receive:
                async for group in receive:
                    groups.append(group)
                    minibatch = gatherer.add(group)
                    if minibatch is not None:
                        await learner.submit(minibatch, step)
        return groups

    async def _step_is_finished(
        self,
        point: ResumePoint,
        finished: FinishedStep,
        groups: Sequence[Group],
        metrics: Mapping[str, float],
        consumed: int,
        seconds: float,
    ) -> ResumePoint:
        """Writes the step down, records first: a resume point without its records would hide what was trained on."""
        step = point.step + 1
        drop_constant = self._job.learning.drop_constant_groups
        rows = [
            GroupOutcome(place, group, drop_reason(group, drop_constant_groups=drop_constant))
            for place, group in enumerate(groups, start=point.next_place)
        ]
        new = replace(
            point,
            step=step,
            next_place=point.next_place + consumed,
            state_path=finished.state_path,
            sampler_path=finished.sampler_path or point.sampler_path,
            sampler_step=step if finished.sampler_path else point.sampler_step,
            seconds=seconds,
        )

        def write() -> None:
            with writing_records(self._job.out_dir):
                self._records.write_step(step, rows, metrics)
            new.save(self._job.out_dir)

        # Shielded: a stop must not fall between a step and its record.
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(write)
            self._point = new
        self._emit(CheckpointSaved(step, new.state_path))
        self._emit(StepFinished(step, metrics))
        if point.step % self._job.learning.checkpoint_every != 0 or point.step == 0:
            await self._forget(point.state_path)
        return new

    async def _keep_sampler(self) -> None:
        """Keeps the last weights for sampling, where the run ended at a step that was no checkpoint."""
        point = self._point
        if point is None or point.sampler_step == point.step:
            return
        # From the resume point: a stop in the middle of a step may have left the trainer's own weights ahead of it.
        client = await self._service.restore_training_client(point.state_path)
        learner = Learner(client, self._job.learning, self._emit)
        path = await learner.keep_sampler(f"step-{point.step:06d}")
        self._point = replace(point, sampler_path=path, sampler_step=point.step)
        await anyio.to_thread.run_sync(self._point.save, self._job.out_dir)

    async def _forget(self, state_path: str) -> None:
        """Deletes the resume point before the last; one that cannot be deleted costs only room."""
        try:
            await self._service.delete_checkpoint(state_path)
        except ServiceError as error:
            logger.info("an old resume point was not deleted: %s", error)

    async def _restore_or_create(self) -> tinker.TrainingClient:
        if self._point is None:
            # The untrained measurement of an earlier, other attempt in this folder goes too.
            self._records.truncate_after(-1)
            return await self._service.create_training_client(
                rank=self._job.learning.lora_rank, seed=self._job.learning.seed
            )
        self._records.truncate_after(self._point.step)
        self._emit(Notice(f"resuming after step {self._point.step} ({self._point.next_place} questions consumed)"))
        return await self._service.restore_training_client(self._point.state_path)

    async def _sampling_client(self, client: tinker.TrainingClient) -> tinker.SamplingClient:
        try:
            with anyio.fail_after(300):
                return await client.save_weights_and_get_sampling_client()
        except (tinker.TinkerError, ValueError, TimeoutError) as error:
            raise ServiceError(f"the weights could not be published: {type(error).__name__}: {error}") from error

    async def _warm_up(self, learner: Learner) -> ResumePoint:
        """Supervised steps on demonstrations, where asked for, and the run's first resume point."""
        job, warm_up = self._job, self._job.warm_up
        if warm_up is not None:
            batches = await self._demonstration_batches(warm_up)
            began = anyio.current_time()
            self._emit(PhaseStarted("warm-up", len(batches), "steps"))
            for done, batch in enumerate(batches):
                rate = warm_up.learning_rate * (1 - 0.9 * done / len(batches))
                loss = await learner.supervised_step(batch, rate)
                self._emit(PhaseAdvanced("warm-up", done + 1, {"loss": loss}))
            self._emit(PhaseEnded("warm-up", anyio.current_time() - began))
        finished = await learner.finish_step("start", keep=warm_up is not None)
        point = ResumePoint(
            step=0,
            next_place=0,
            state_path=finished.state_path,
            sampler_path=finished.sampler_path,
            sampler_step=0 if finished.sampler_path else None,
            order_fingerprint=self._order.fingerprint,
            base_model=self._service.model_name,
            settings=self._identity,
        )
        await anyio.to_thread.run_sync(point.save, job.out_dir)
        self._emit(CheckpointSaved(0, point.state_path))
        return point

    async def _demonstration_batches(self, warm_up: WarmUp) -> list[list[Any]]:
        wanted = warm_up.steps * warm_up.batch_size
        # Half as many again are tried, since a search does not always show the answer.
        tried = self._job.demonstrations or tuple(
            Demonstration.of(question)
            for question in random.Random(f"demonstrations/{self._job.learning.seed}").sample(
                self._job.questions, min(len(self._job.questions), wanted + wanted // 2)
            )
        )
        episodes = await play_demonstrations(
            tried,
            dialect=self._engine.dialect,
            search=self._job.search,
            limits=self._job.limits,
            max_failed_fraction=self._job.learning.max_failed_fraction,
            max_in_flight=self._job.sampling.max_episodes_in_flight,
        )
        if not episodes:
            raise SearchR1Error(
                f"none of {len(tried)} demonstrations showed a golden answer: check that the corpus answers the questions"
            )
        self._emit(Notice(f"{len(episodes)} of {len(tried)} demonstrations show their answer and are learned from"))
        return demonstration_batches(
            episodes, steps=warm_up.steps, batch_size=warm_up.batch_size, seed=self._job.learning.seed
        )

    async def _measure(self, label: str, policy: TinkerPolicy) -> None:
        """Evaluates on the held-out questions, unless an earlier session of the run has done so at this step."""
        job = self._job
        if not job.held_out or evaluation_steps(self._records).get(label) == policy.version:
            return
        evaluation = await evaluate_policy(
            self._engine,
            job.held_out,
            policy,
            samples=job.held_out_samples,
            label=label,
            step=policy.version,
        )

        def write() -> None:
            with writing_records(job.out_dir):
                self._records.write_evaluation(label, evaluation.episodes, policy.version)

        await anyio.to_thread.run_sync(write)
        self._emit(Notice(f"{label}: {evaluation}"))
