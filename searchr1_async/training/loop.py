"""The training loop: questions are rolled out as groups, groups stream into minibatches, minibatches into steps, steps into weights.

Read :meth:`TrainingLoop._train` first. Beside it run the task that starts groups and one task per group, which rolls it out; two
tasks complete closed steps in order: one publishes each step's weights, one records it. :class:`~.admission.Admission` alone
decides what may start and what makes up a batch, and knows the state of every group.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import anyio

from searchr1_async.episodes.table import GroupOutcome
from searchr1_async.events import (
    BatchClosed,
    GroupDropped,
    GroupFinished,
    Notice,
    PhaseAdvanced,
    PhaseEnded,
    PhaseStarted,
    PipelineChanged,
    WeightsPublished,
)
from searchr1_async.rollout.engine import FailureBudget
from searchr1_async.rollout.player import GroupTask, NewestWeights, TinkerPolicy
from searchr1_async.training.admission import Admission, Closed
from searchr1_async.training.batches import Minibatch, MinibatchGatherer
from searchr1_async.training.examples import without_sequence_ids
from searchr1_async.training.held_out import Measuring
from searchr1_async.training.learner import FALLBACK_LOSS, Learner
from searchr1_async.training.recorder import Recorder, Session, Step, completing_steps

SEQUENCE_SECONDS = 20 * 3600.0
"""How long the sequences of a group are taken to be known to the service. It forgets them after a day; the rest is for the time
that a minibatch waits at the trainer."""


class TrainingLoop:
    """Reinforcement learning of one session, from the resume point.

    Args:
        weights: the resume point's; replaced at every publication.
    """

    def __init__(
        self, session: Session, learner: Learner, weights: NewestWeights, recorder: Recorder, measuring: Measuring
    ) -> None:
        self._job, self._control, self._emit = session.job, session.control, session.emit
        self._session, self._engine, self._total = session, session.engine, session.total_steps
        self._learner, self._weights, self._recorder, self._measuring = learner, weights, recorder, measuring
        learner.when_learned = self._emit_state
        assert recorder.point is not None, "the start is saved before the first step"
        self._point = recorder.point
        self._admission = Admission(
            *(self._job.pipeline, self._job.learning, len(session.order)),
            next_place=self._point.next_place,
            step=self._point.step,
        )
        self._tasks: dict[int, GroupTask] = {}
        """Of the groups being rolled out, by place."""
        self._budgets: dict[int, FailureBudget] = {}
        self._mean_tokens: float | None = None
        self._unpublished = 0
        """Closed steps whose weights are on their way."""
        self._last_state: PipelineChanged | None = None
        # Each is replaced by a fresh one when it has been acted upon.
        self._changed, self._may_start = anyio.Event(), anyio.Event()

    async def run(self) -> str:
        """Trains until the steps, the epochs, the time or the money are over, or it is stopped; returns why it ended.

        Raises, within exception groups, what the engine and the learner raise.
        """
        await self._restore()
        began, reason, limit = self._control.now(), "stopped", self._job.time_limit
        left = None if limit is None else max(0.0, limit - self._point.seconds)
        self._emit(PhaseStarted("train", self._total, "steps", seconds_at_most=left))
        self._emit(PhaseAdvanced("train", self._point.step))
        self._recorder.begin(began)
        async with self._measuring.beside(self._weights.current, is_over=self._admission.is_over):
            async with (
                self._recorder.unlearned.writing(),
                completing_steps(self._control, self._publish, self._record) as complete,
            ):
                with self._control.interruptible():
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(self._start_groups)
                        reason = await self._train(complete, began, left)
                        tasks.cancel_scope.cancel()  # groups that no step needs any more, where the time was over
                self._measuring.training_ended(reason)
            self._emit(PhaseEnded("train", self._control.now() - began))
        return reason

    # --- the algorithm ------------------------------------------------------------------------------------------------

    async def _train(
        self, complete: Callable[[Step], Awaitable[None]], began: float, seconds_left: float | None
    ) -> str:
        opened, searched = self._control.now(), self._job.search.statistics
        while not self._admission.is_over:
            await self._control.wait_while_paused()
            done, seconds = self._admission.step - 1, self._control.now() - began
            if limit := self._recorder.limit_near(done, seconds, seconds_left, self._measuring.to_come):
                return limit
            closed = await self._gather_batch(opened)
            is_last = self._admission.is_over
            is_checkpoint = is_last or closed.step % self._job.learning.checkpoint_every == 0
            is_measured = self._measuring.closed(closed.step, is_last=is_last)
            searches = self._job.search.statistics.since(searched)
            metrics = {**self._engine.metrics(), **self._measuring.metrics()}
            sampled, name = self._control.now(), f"step-{closed.step:06d}"
            training = await self._learner.finish_step(
                closed.step, self._total, name, keep=is_checkpoint, is_measured=is_measured
            )
            step = Step(closed, training, searches, metrics, opened, sampled, is_checkpoint)
            self._emit(BatchClosed(step.number, len(closed.places)))
            self._unpublished += 1
            await complete(step)
            self._emit_state()
            if is_last or not self._job.pipeline.max_staleness:
                await step.is_published.wait()
            opened, searched = self._control.now(), self._job.search.statistics
            await self._measuring.wait_for_room()
        return "finished"

    async def _gather_batch(self, opened: float) -> Closed:
        """Sends minibatches to the trainer as groups finish, until the open step's batch is complete.

        Args:
            opened: when its rollout could begin, by the control's clock.
        """
        pipeline = self._job.pipeline
        gatherer = MinibatchGatherer.of(self._job.learning, pipeline, self._mean_tokens)
        closed: Closed | None = None
        async with anyio.create_task_group() as tasks:
            if pipeline.step_time_limit is not None:
                tasks.start_soon(self._cut_when_late, self._admission.step, opened + pipeline.step_time_limit)
            await self._fill_batch(gatherer)
            # Before anything else is awaited: a group that ends from here on belongs into the next step.
            closed = self._close_batch()
            tasks.cancel_scope.cancel()
        assert closed is not None
        await self._submit(gatherer.end_batch(), closed.step)
        self._mean_tokens = gatherer.mean_tokens
        return closed

    async def _fill_batch(self, gatherer: MinibatchGatherer) -> None:
        """Hands the open step's groups over as they finish; returns when it has all."""
        step, taken = self._admission.step, 0
        while True:
            self._changed = anyio.Event()
            for outcome in self._admission.take():
                taken += 1
                await self._submit([] if outcome.drop_reason else gatherer.add(outcome.group), step)
                if taken in gatherer.part_ends:
                    await self._submit(gatherer.end_part(), step)
                    if not self._job.pipeline.synchronous:
                        self._learner.end_part(step, self._total)
            self._emit_state()
            if self._learner.is_idle:
                await self._submit(gatherer.trainer_is_idle(), step)
            if self._changed.is_set():
                continue  # groups ended while minibatches were handed over: they may belong into this step
            if self._admission.is_full:
                return
            await self._wait_for_change(is_learner_wanted=gatherer.is_enough)

    def _close_batch(self) -> Closed:
        closed = self._admission.close({place: self._tasks[place].group() for place in self._admission.must_come()})
        for outcome in self._admission.outcomes(closed):
            if outcome.place in closed.cancelled:
                self._tasks[outcome.place].cut()
                self._emit_dropped(outcome, closed.step)
        self._may_start.set()
        return closed

    async def _submit(self, minibatches: Sequence[Minibatch], step: int) -> None:
        part = minibatches[0].part if minibatches else 0
        for minibatch in minibatches:
            if minibatch.part > part:
                self._learner.end_part(step, self._total)
            part = minibatch.part
            # Groups that the service may have begun to forget are trained on without their sequence ids.
            forgotten = self._control.wall_clock() - SEQUENCE_SECONDS
            old = set(map(id, self._admission.started_before(forgotten)))
            groups = [without_sequence_ids(group) if id(group) in old else group for group in minibatch.groups]
            await self._learner.submit(groups, step)

    async def _wait_for_change(self, *, is_learner_wanted: bool) -> None:
        """Until a group has ended, or the trainer is idle while groups wait for it."""
        async with anyio.create_task_group() as tasks:

            async def until_idle() -> None:
                await self._learner.wait_idle()
                self._changed.set()

            if is_learner_wanted:
                tasks.start_soon(until_idle)
            await self._changed.wait()
            tasks.cancel_scope.cancel()

    async def _cut_when_late(self, step: int, deadline: float) -> None:
        await self._control.sleep_until(deadline)
        if self._admission.step != step:
            return  # its last group finished at the deadline: a task that already wakes cannot be cancelled
        for place in self._admission.cut_open_step():
            self._tasks[place].cut()
        self._changed.set()

    # --- rollouts -----------------------------------------------------------------------------------------------------

    async def _start_groups(self) -> None:
        async with anyio.create_task_group() as tasks:
            while True:
                self._may_start = anyio.Event()
                while len(self._tasks) < self._engine.groups_in_flight:
                    if (place := self._admission.next_start()) is None:
                        break
                    self._admission.started(place, self._control.wall_clock())
                    question = self._session.order.question(place)
                    self._tasks[place] = self._engine.task(place, question, key=str(place))
                    tasks.start_soon(self._roll_out, self._tasks[place])
                    # One at a time: a prompt is rendered in about a millisecond, and a batch may be 512 of them.
                    await anyio.lowlevel.checkpoint()
                await self._may_start.wait()

    async def _roll_out(self, task: GroupTask) -> None:
        # For good, also where its weights move on: the service keeps a key/value cache for each client.
        policy = self._weights.current
        window, groups = self._admission.window(task.place)
        budget = self._budgets.setdefault(window, self._engine.failure_budget(groups))
        try:
            group = await self._engine.play_group(task, policy, budget, step=self._admission.step)
        finally:
            del self._tasks[task.place]
        outcome = self._admission.finished(task.place, group)
        if outcome is not None:
            self._recorder.unlearned.keep(task.place, group)
            self._emit(GroupFinished(group, self._admission.step))
            self._emit_dropped(outcome, self._admission.step)
            self._changed.set()
        self._may_start.set()

    async def _restore(self) -> None:
        """Restores an earlier session's groups. Their sequence ids name nothing here: ``stable_reinforce`` cannot train on them."""
        kept = {place: without_sequence_ids(group) for place, group in (await self._recorder.unlearned.load()).items()}
        found = self._admission.restore(kept, self._point.open_places, now=self._control.wall_clock())
        self._recorder.unlearned.forget(set(kept) - found)
        if found:
            text = f"{len(found)} groups finished before the run stopped: they are not rolled out again"
            if self._learner.loss == "stable_reinforce":
                text += f", and are trained on with {FALLBACK_LOSS}, since another session sampled them"
            self._emit(Notice(text))

    # --- closed steps, in order ---

    async def _publish(self, step: Step) -> None:
        client = await step.training.published()
        step.published = self._control.now()
        step.is_published.set()
        self._unpublished -= 1
        # Without an optimizer step the weights are the same, under a new number.
        client = client or self._weights.current.client
        self._weights.current = TinkerPolicy(client, step.number, self._job.sampling)
        self._admission.published(step.number)
        self._emit(WeightsPublished(step.number))
        self._emit_state()
        self._may_start.set()
        self._changed.set()

    async def _record(self, step: Step) -> None:
        finished = await step.training.finished()
        await self._recorder.record(step, finished, self._admission)
        gone = self._admission.recorded(step.number)
        self._measuring.recorded(step.number, finished.sampler_path)
        self._recorder.unlearned.forget(step.closed.places)
        # In a thread: in one piece it would stop the event loop, 0.27 s for 4,096 episodes.
        await anyio.to_thread.run_sync(gone.clear)

    # --- events -------------------------------------------------------------------------------------------------------

    def _emit_dropped(self, outcome: GroupOutcome, step: int) -> None:
        if outcome.drop_reason is not None:
            self._emit(GroupDropped(outcome.group, step, outcome.drop_reason))

    def _emit_state(self) -> None:
        """Emits the state of the loop, if it has changed."""
        learner = "idle" if self._learner.is_idle else "learning"
        state = PipelineChanged(
            step=self._admission.step,
            policy_version=self._admission.version,
            batch_groups=self._job.learning.groups_per_batch,
            taken_groups=self._admission.taken,
            waiting_groups=self._admission.waiting,
            trainer="stepping" if self._unpublished else learner,
        )
        if state != self._last_state:
            self._last_state = state
            self._emit(state)
