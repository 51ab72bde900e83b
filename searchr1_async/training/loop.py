"""The training loop: questions are rolled out as groups, groups stream into minibatches, minibatches into steps, steps into weights.

Read :meth:`TrainingLoop._train` first. Beside it run the task that starts groups, one task per group, which rolls it out, and one
per closed step, which publishes its weights and records it. :class:`~.admission.Admission` alone decides what may start and what
makes up a batch, and knows the state of every group.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from anyio.abc import TaskGroup

from searchr1_async.episodes.types import GroupOutcome
from searchr1_async.events import (
    BatchClosed,
    EndReason,
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
from searchr1_async.training.batches import MinibatchGatherer, example_tokens, without_sequence_ids
from searchr1_async.training.held_out import Measuring
from searchr1_async.training.learner import Learner
from searchr1_async.training.losses import FALLBACK_LOSS
from searchr1_async.training.recorder import Recorder, Session, Step

STOP_SECONDS = 60.0
"""For steps whose optimizer step is at the trainer when the run is stopped: they are waited for and recorded. One took 2 to 17 s on
the embedded service; later ones are learned again after the resume."""


class TrainingLoop:
    """Reinforcement learning of one session, from the resume point.

    Args:
        weights: the resume point's; replaced at every publication.
    """

    def __init__(
        self, session: Session, learner: Learner, weights: NewestWeights, recorder: Recorder, measuring: Measuring
    ) -> None:
        self._job, self._control, self._emit = session.job, session.control, session.emit
        self._session, self._engine, self._total = session, session.engine, session.job.shape.total_steps
        self._learner, self._weights, self._recorder, self._measuring = learner, weights, recorder, measuring
        assert recorder.point is not None, "the start is saved before the first step"
        self._point = recorder.point
        self._admission = Admission(
            *(self._job.config.pipeline, self._job.learning, len(session.order)),
            next_place=self._point.next_place,
            step=self._point.step,
        )
        self._tasks: dict[int, GroupTask] = {}
        """Of the groups being rolled out, by place."""
        self._budgets: dict[int, FailureBudget] = {}
        self._gatherer = MinibatchGatherer(self._job.learning)
        self._taken = 0
        """Groups of the open step that were handed to the trainer or dropped."""
        self._steps: list[Step] = []
        """The last three that were closed; all earlier ones of the session are recorded."""
        self._last_state: PipelineChanged | None = None
        # Each is replaced by a fresh one when it has been acted upon.
        self._changed, self._may_start = anyio.Event(), anyio.Event()

    async def run(self) -> EndReason:
        """Trains until the steps, the epochs, the time or the money are over, or it is stopped; returns why it ended.

        Raises, within exception groups, what the engine and the learner raise.
        """
        await self._restore()
        reason: EndReason = "stopped"
        began = self._control.now()
        left = self._recorder.begin()
        least = self._job.config.length.min_steps
        self._emit(PhaseStarted("train", self._total, "steps", seconds_at_most=left, at_least=least))
        self._emit(PhaseAdvanced("train", self._point.step))
        async with self._measuring.beside():
            async with self._recorder.unlearned.writing(), self._completing() as completing:
                with self._control.interruptible():
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(self._start_groups)
                        reason = await self._train(completing)
                        tasks.cancel_scope.cancel()  # groups that no step needs any more, where the time was over
                self._measuring.training_ended(reason)
            self._emit(PhaseEnded("train", self._control.now() - began))
        return reason

    # --- the algorithm ------------------------------------------------------------------------------------------------

    async def _train(self, completing: TaskGroup) -> EndReason:
        opened, searched = self._control.now(), self._job.search.statistics
        while not self._admission.is_over:
            await self._control.wait_while_paused()
            if limit := self._recorder.limit_near(self._admission.step - 1, self._measuring.to_come):
                return limit
            closed = await self._gather_batch(opened)
            is_last = self._admission.is_over
            is_checkpoint = is_last or closed.step % self._job.learning.checkpoint_every == 0
            is_measured = self._measuring.closed(closed.step, is_last=is_last)
            metrics = {**self._job.search.statistics.since(searched).metrics(), **self._engine.metrics()}
            sampled, name = self._control.now(), f"step-{closed.step:06d}"
            training = await self._learner.finish_step(
                closed.step, self._total, name, keep=is_checkpoint, is_measured=is_measured
            )
            step = Step(closed, training, metrics, opened, sampled, is_checkpoint)
            self._steps = [*self._steps[-2:], step]
            completing.start_soon(self._complete, *self._steps[-2:])
            self._emit(BatchClosed(step.number, len(closed.places)))
            self._emit_state()
            # Of a trainer that is further behind, a kill would cost more than two steps.
            for earlier in self._steps[:-2]:
                await earlier.is_recorded.wait()
            if is_last or not self._job.config.pipeline.max_staleness:
                await step.is_published.wait()
            opened, searched = self._control.now(), self._job.search.statistics
            await self._measuring.wait_for_room()
        return "finished"

    async def _gather_batch(self, opened: float) -> Closed:
        """Sends minibatches to the trainer as groups finish, until the open step's batch is complete.

        Args:
            opened: when its rollout could begin, by the control's clock.
        """
        pipeline = self._job.config.pipeline
        self._gatherer, self._taken = MinibatchGatherer(self._job.learning, self._gatherer.mean_tokens), 0
        held, closed = list[GroupOutcome](), None
        async with anyio.create_task_group() as tasks:
            if pipeline.step_time_limit is not None:
                tasks.start_soon(self._cut_when_late, self._admission.step, opened + pipeline.step_time_limit)
            held = await self._fill_batch()
            # Before anything else is awaited: a group that ends from here on belongs into the next step.
            closed = self._close_batch()
            tasks.cancel_scope.cancel()
        assert closed is not None
        if pipeline.synchronous:
            tokens = sum(example_tokens(outcome.group) for outcome in held if not outcome.drop_reason)
            self._gatherer = MinibatchGatherer(self._job.learning, tokens / self._job.learning.groups_per_batch)
        for outcome in held:
            await self._learn(outcome, closed.step)
        await self._learner.submit(self._gatherer.end_part(), closed.step)
        return closed

    async def _fill_batch(self) -> list[GroupOutcome]:
        """Hands the open step's groups over as they finish; returns when it has all, with those that are held back."""
        step, held = self._admission.step, list[GroupOutcome]()
        while True:
            self._changed = anyio.Event()
            for outcome in self._admission.take():
                if self._job.config.pipeline.synchronous:
                    held.append(outcome)
                else:
                    await self._learn(outcome, step)
            self._emit_state()
            is_idle = self._learner.is_idle
            if is_idle and (minibatch := self._gatherer.trainer_is_idle()):
                await self._learner.submit(minibatch, step)
                is_idle = False
            if self._changed.is_set():
                continue  # groups ended while minibatches were handed over: they may belong into this step
            if self._admission.is_full:
                return held
            await self._wait_for_change(is_idle=is_idle)

    async def _learn(self, outcome: GroupOutcome, step: int) -> None:
        """The next group of the batch."""
        self._taken += 1
        if not outcome.drop_reason:
            await self._learner.submit(self._gatherer.add(outcome.group), step)
        size, parts = self._job.learning.groups_per_batch, self._job.learning.optimizer_steps
        if self._taken in {size * part // parts for part in range(1, parts)}:
            await self._learner.submit(self._gatherer.end_part(), step)
            self._learner.end_part(step, self._total)

    def _close_batch(self) -> Closed:
        closed = self._admission.close({place: self._tasks[place].group() for place in self._admission.must_come()})
        for outcome in self._admission.outcomes(closed):
            if outcome.place in closed.cancelled:
                self._tasks[outcome.place].cut()
                self._emit_dropped(outcome, closed.step)
        self._may_start.set()
        return closed

    async def _wait_for_change(self, *, is_idle: bool) -> None:
        """Until a group has ended, or a trainer that was not idle before has become so, perhaps meanwhile."""
        async with anyio.create_task_group() as tasks:

            async def until_idle() -> None:
                await self._learner.wait_idle()
                self._changed.set()

            if not is_idle:
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
                    self._admission.started(place)
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
        found = self._admission.restore(kept, self._point.open_places)
        self._recorder.unlearned.forget(set(kept) - found)
        if found:
            text = f"{len(found)} groups finished before the run stopped: they are not rolled out again"
            if self._learner.loss == "stable_reinforce":
                text += f", and are trained on with {FALLBACK_LOSS}, since another session sampled them"
            self._emit(Notice(text))

    # --- closed steps, in order ---------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _completing(self) -> AsyncIterator[TaskGroup]:
        """Tasks that complete closed steps beside the block. Ends when the last is recorded; after a stop, within a minute, and at
        once while the service does not answer."""
        scope = anyio.CancelScope()

        def cut() -> None:
            scope.deadline = anyio.current_time() + (0.0 if self._control.waits_for_service else STOP_SECONDS)

        # Also for a stop that comes when the last batch is closed: nothing but steps is in progress then.
        with self._control.ending_with(cut), scope:
            async with anyio.create_task_group() as tasks:
                yield tasks
                if self._control.stop_requested:
                    cut()

    async def _complete(self, *steps: Step) -> None:
        """Publishes the last of two steps and then records it, each after the step before."""
        *before, step = steps
        for earlier in before:
            await earlier.is_published.wait()
        await self._publish(step)
        for earlier in before:
            await earlier.is_recorded.wait()
        sampler_path = await self._recorder.record(step, self._admission)
        gone = self._admission.recorded(step.number)
        self._measuring.recorded(step.number, sampler_path)
        self._recorder.unlearned.forget(step.closed.places)
        step.is_recorded.set()
        # In a thread: in one piece it would stop the event loop, 0.27 s for 4,096 episodes.
        await anyio.to_thread.run_sync(gone.clear)

    async def _publish(self, step: Step) -> None:
        # Without an optimizer step the weights are the same, under a new number.
        client = await step.training.published() or self._weights.current.client
        step.published = self._control.now()
        step.is_published.set()
        self._weights.current = TinkerPolicy(client, step.number, self._job.config.sampling)
        self._admission.published(step.number)
        self._emit(WeightsPublished(step.number))
        self._emit_state()
        self._may_start.set()
        self._changed.set()

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
            trainer="stepping" if self._admission.step - 1 > self._admission.version else learner,
        )
        if state != self._last_state:
            self._last_state = state
            self._emit(state)
