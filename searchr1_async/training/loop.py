"""Overlaps rollout and training: groups stream into minibatches, minibatches into steps, steps into new weights.

Read :meth:`Pipeline._train` first. Background tasks: the *starter* starts groups when admission allows; each *group* rolls itself
out; :class:`~searchr1_async.training.loop.StepFinisher` publishes each step's weights and records it; the *keeper* saves finished
groups until a recorded step contains them; :class:`~searchr1_async.training.held_out.Measuring` evaluates recorded steps.

:class:`~searchr1_async.training.admission.Admission` decides what may start and what makes up a batch,
:class:`~searchr1_async.training.batches.MinibatchGatherer` which groups go to the trainer together.

Completes closed batches in the background, in order: publishes each step's new weights, then records the step.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import tinker
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from searchr1_async.episodes.types import Group
from searchr1_async.events import (
    BatchClosed,
    Emit,
    GroupDropped,
    GroupFinished,
    Notice,
    PhaseAdvanced,
    PhaseEnded,
    PhaseStarted,
    PipelineChanged,
    WeightsPublished,
)
from searchr1_async.records.run_records import GroupOutcome
from searchr1_async.rollout.engine import FailureBudget, GroupUnderWay, RolloutEngine
from searchr1_async.rollout.player import NewestWeights, TinkerPolicy
from searchr1_async.runs.control import RunControl
from searchr1_async.training.admission import Admission, Closed, QuestionOrder
from searchr1_async.training.batches import Minibatch, MinibatchGatherer, drop_reason
from searchr1_async.training.examples import without_sequence_ids
from searchr1_async.training.held_out import Measuring
from searchr1_async.training.job import TrainingJob
from searchr1_async.training.learner import FALLBACK_LOSS, Learner, StepInProgress
from searchr1_async.training.recorder import Keeper, StepRecorder, StepToRecord

STOP_SECONDS = 60.0
"""For steps whose optimiser step is at the trainer when the run is stopped: they are waited for and written down. One took
2 to 17 s on the embedded service; what comes later is learned again after the resume."""


@dataclass
class ClosedStep:
    """A closed batch: its optimiser step is submitted, its weights and checkpoint are pending."""

    to_record: StepToRecord
    in_progress: StepInProgress
    published: anyio.Event = field(default_factory=anyio.Event)
    """Set once its weights are published."""


class StepFinisher:
    """Completes closed steps.

    Args:
        recorder: records steps.
        keeper: keeps their groups on disk until then.
        admission: knows which groups belong to no closed step.
        published: called with each step's new weights (None: unchanged) and number.
        let_go: called in a worker thread with the groups of a recorded step.
        recorded: called for each recorded step, with the ``tinker://`` path of its weights if kept.
    """

    def __init__(
        self,
        recorder: StepRecorder,
        keeper: Keeper,
        admission: Admission,
        control: RunControl,
        *,
        published: Callable[[tinker.SamplingClient | None, int], None],
        let_go: Callable[[Collection[int]], None],
        recorded: Callable[[int, str | None], None],
    ) -> None:
        self._recorder, self._keeper, self._admission, self._control = recorder, keeper, admission, control
        self._published, self._let_go, self._recorded = published, let_go, recorded
        self._not_recorded: dict[int, set[int]] = {}
        self._stepping = 0
        self._to_publish: MemoryObjectSendStream[ClosedStep] | None = None

    @property
    def is_stepping(self) -> bool:
        """A closed step's weights are on their way."""
        return self._stepping > 0

    @asynccontextmanager
    async def finishing(self) -> AsyncIterator[None]:
        """Takes steps while the block runs, and ends when the last is written down; after a stop, within a minute, and at once
        while the service does not answer.

        Raises, within an exception group:
            ServiceError: a training call failed.
            CheckpointError: a checkpoint, or the records, could not be written.
        """
        scope = anyio.CancelScope()

        def cut() -> None:
            scope.deadline = anyio.current_time() + (0.0 if self._control.waits_for_service else STOP_SECONDS)

        # Also for a stop that comes when the last batch is closed: nothing but steps is under way then.
        with self._control.ending_with(cut), scope:
            async with anyio.create_task_group() as tasks:
                # Of one: a trainer that is further behind holds the loop up, so that a kill costs at most two steps.
                self._to_publish, publishing = anyio.create_memory_object_stream[ClosedStep](1)
                to_record, recording = anyio.create_memory_object_stream[ClosedStep](1)
                tasks.start_soon(self._publish, publishing, to_record)
                tasks.start_soon(self._record, recording)
                async with self._to_publish:
                    yield
                if self._control.stop_requested:
                    cut()

    def closed(self, step: int, places: Collection[int]) -> None:
        """A batch was closed just now: until its own record its groups are open in the records of the steps before it.

        In the moment of closing, since admission does not know them any more: a kill would lose their questions.
        """
        self._not_recorded[step] = set(places)

    async def take(self, step: ClosedStep) -> None:
        """Takes the next closed step, whose calls are submitted; waits while two before it are not done."""
        assert self._to_publish is not None, "only within finishing()"
        self._stepping += 1
        await _hand_on(self._to_publish, step)

    async def _publish(
        self, publishing: MemoryObjectReceiveStream[ClosedStep], to_record: MemoryObjectSendStream[ClosedStep]
    ) -> None:
        async with publishing, to_record:
            async for step in publishing:
                client = await step.in_progress.published()
                step.to_record.published = self._control.now()
                step.published.set()
                self._stepping -= 1
                self._published(client, step.to_record.step)
                await _hand_on(to_record, step)

    async def _record(self, recording: MemoryObjectReceiveStream[ClosedStep]) -> None:
        async with recording:
            async for step in recording:
                finished = await step.in_progress.finished()
                own = self._not_recorded.pop(step.to_record.step)
                later = set[int]().union(*self._not_recorded.values())
                await self._recorder.record(
                    step.to_record,
                    finished,
                    next_place=self._admission.next_place,
                    open_places=tuple(sorted({*self._admission.open_places, *later} - own)),
                )
                self._recorded(step.to_record.step, finished.sampler_path)
                self._keeper.forget(own)
                step.to_record.outcomes = ()
                # In a thread: in one piece it would stop the event loop.
                await anyio.to_thread.run_sync(self._let_go, own)


async def _hand_on(stream: MemoryObjectSendStream[ClosedStep], step: ClosedStep) -> None:
    try:
        try:
            stream.send_nowait(step)  # where there is room a stop cannot come between the step and its record
        except anyio.WouldBlock:
            await stream.send(step)
    except anyio.BrokenResourceError:
        await anyio.sleep_forever()  # its reader has failed: the error that cancels this says why


TOO_SLOW, STEP_TIME_LIMIT = "too_slow", "step_time_limit"
"""Why a group was cut."""
CONSTANT_REWARD = "constant_reward"
SEQUENCE_SECONDS = 20 * 3600.0
"""For which the sequences of a group are taken to be known to the service. It forgets them after a day; the rest is for the
time that a minibatch waits at the trainer."""


@dataclass(frozen=True, slots=True)
class _Finished:
    group: Group
    drop_reason: str | None
    began: float
    """When its first turn could be sampled, by the wall clock: none of its sequence ids is older."""

    @property
    def learnable(self) -> Group | None:
        return self.group if self.drop_reason is None else None


class Pipeline:
    """Reinforcement learning of one session, from the resume point.

    Args:
        job: the run's settings.
        order: of the questions.
        engine: rolls out groups.
        learner: trains on them.
        newest: the resume point's weights; replaced at every publication.
        recorder: records steps; holds the resume point.
        keeper: saves finished groups.
        measuring: evaluates steps on the held-out questions.
        control: stops or pauses the session.
    """

    def __init__(
        self,
        job: TrainingJob,
        order: QuestionOrder,
        engine: RolloutEngine,
        learner: Learner,
        newest: NewestWeights,
        *,
        recorder: StepRecorder,
        keeper: Keeper,
        measuring: Measuring,
        control: RunControl,
        emit: Emit,
    ) -> None:
        self._job, self._order, self._engine, self._learner = job, order, engine, learner
        self._recorder, self._keeper, self._measuring, self._emit = recorder, keeper, measuring, emit
        self._control = control
        learner.when_learned = self._tell
        self._newest = newest
        self._total = job.total_steps(order)
        point = recorder.point
        learning = job.learning
        self._end = None if learning.steps is not None else learning.epochs * len(order)
        self._admission = Admission(
            job.pipeline,
            learning.groups_per_batch,
            next_place=point.next_place,
            end=self._end,
            steps=learning.steps,
            step=point.step,
        )
        self._under_way: dict[int, GroupUnderWay] = {}
        self._finished: dict[int, _Finished] = {}
        self._budgets: dict[int, FailureBudget] = {}
        self._cut_step: int | None = None
        self._cut: set[int] = set()
        self._mean_tokens: float | None = None
        self._part = 0
        self._finisher = StepFinisher(
            recorder,
            keeper,
            self._admission,
            control,
            published=self._published,
            let_go=self._let_go,
            recorded=measuring.recorded,
        )
        self._told: PipelineChanged | None = None
        # Each is replaced by a fresh one when it has been acted upon.
        self._changed = anyio.Event()
        self._may_start = anyio.Event()

    async def run(self) -> str:
        """Trains until the steps, the epochs, the time or the money are over, or it is stopped; returns why it ended.

        Raises, within exception groups, what the engine and the learner raise.
        """
        await self._restore()
        began, reason, limit = self._control.now(), "stopped", self._job.time_limit
        left = None if limit is None else max(0.0, limit - self._recorder.point.seconds)
        self._emit(PhaseStarted("train", self._total, "steps", seconds_at_most=left))
        self._emit(PhaseAdvanced("train", self._recorder.point.step))
        self._recorder.begin(began)
        async with self._measuring.beside(self._newest.current, is_over=self._admission.is_over):
            async with self._keeper.keeping(), self._finisher.finishing():
                with self._control.interruptible():
                    reason = await self._play_and_train(left)
                self._measuring.training_ended(reason)
            self._emit(PhaseEnded("train", self._control.now() - began))
        return reason

    async def _play_and_train(self, left: float | None) -> str:
        reason = ""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._start_groups)
            reason = await self._train(left)
            tasks.cancel_scope.cancel()  # groups that no step needs any more, where the time was over
        return reason

    # --- the algorithm ------------------------------------------------------------------------------------------------

    async def _train(self, seconds_left: float | None) -> str:
        learning, began = self._job.learning, self._control.now()
        opened, searched = began, self._job.search.statistics
        while not self._admission.is_over:
            await self._control.wait_while_paused()
            longest = self._recorder.longest_step
            if seconds_left is not None and self._control.now() - began + longest > seconds_left:
                done = self._admission.step - 1
                self._emit(Notice(f"the time limit is near: reinforcement learning ends after {done} steps"))
                return "time_limit"
            if (problem := self._recorder.spending.problem(self._measuring.to_come)) is not None:
                done = self._admission.step - 1
                self._emit(Notice(f"{problem}: reinforcement learning ends after {done} steps"))
                return "max_cost"
            closed = await self._gather_batch(opened)
            step, is_last = closed.step, self._admission.is_over
            is_checkpoint = is_last or step % learning.checkpoint_every == 0
            is_measured = self._measuring.closed(step, is_last=is_last)
            to_record = StepToRecord(
                step=step,
                outcomes=self._outcomes(closed),
                searched=self._job.search.statistics.since(searched),
                engine={**self._engine.metrics(), **self._measuring.metrics()},
                opened=opened,
                closed=self._control.now(),
                is_checkpoint=is_checkpoint,
            )
            name, keep = f"step-{step:06d}", is_checkpoint
            in_progress = await self._learner.finish_step(step, self._total, name, keep=keep, is_measured=is_measured)
            self._emit(BatchClosed(step, len(to_record.outcomes)))
            await self._finisher.take(under_way := ClosedStep(to_record, in_progress))
            self._tell()
            if is_last or not self._job.pipeline.max_staleness:
                await under_way.published.wait()
            opened, searched = self._control.now(), self._job.search.statistics
            await self._measuring.wait_for_room()
        return "finished"

    async def _gather_batch(self, opened: float) -> Closed:
        """Sends minibatches to the trainer as groups finish, until the open step's batch is complete.

        Args:
            opened: when it could begin to play, by the control's clock.
        """
        step, learning = self._admission.step, self._job.learning
        gatherer = MinibatchGatherer(
            learning.groups_per_batch,
            learning.minibatches,
            optimizer_steps=learning.optimizer_steps,
            synchronous=self._job.pipeline.synchronous,
            mean_tokens=self._mean_tokens,
        )
        closed: Closed | None = None
        self._part = 0
        async with anyio.create_task_group() as tasks:
            if self._job.pipeline.step_time_limit is not None:
                tasks.start_soon(self._cut_when_late, step, opened + self._job.pipeline.step_time_limit)
            await self._fill(gatherer, step)
            # Before anything else is awaited: a group that ends from here on belongs into the next step.
            closed = self._close()
            tasks.cancel_scope.cancel()
        assert closed is not None
        await self._submit(gatherer.end_batch(), step)
        self._mean_tokens = gatherer.mean_tokens
        return closed

    async def _fill(self, gatherer: MinibatchGatherer, step: int) -> None:
        """Hands the open step's groups over as they finish; returns when it has all."""
        groups, parts = self._job.learning.groups_per_batch, self._job.learning.optimizer_steps
        part_ends, taken = {groups * part // parts for part in range(1, parts)}, 0
        while True:
            self._changed = anyio.Event()
            for place in self._admission.take():
                taken += 1
                group = self._finished[place].learnable
                await self._submit([] if group is None else gatherer.add(group), step)
                if taken in part_ends:
                    await self._submit(gatherer.end_part(), step)
                    if not self._job.pipeline.synchronous:
                        self._end_part(step)
            self._tell()
            if self._learner.is_idle:
                await self._submit(gatherer.trainer_is_idle(), step)
            if self._changed.is_set():
                continue  # groups ended while minibatches were handed over: they may belong into this step
            if self._is_complete():
                return
            await self._wait_for_change(is_learner_wanted=gatherer.is_enough)

    def _close(self) -> Closed:
        closed = self._admission.close()
        self._finisher.closed(closed.step, closed.places)
        for place in closed.cancelled:
            under_way = self._under_way[place]
            self._finished[place] = _Finished(under_way.group(), TOO_SLOW, under_way.began)
            under_way.cut(TOO_SLOW)
            self._drop(self._finished[place], closed.step)
        self._may_start.set()
        return closed

    async def _submit(self, minibatches: Sequence[Minibatch], step: int) -> None:
        for minibatch in minibatches:
            while minibatch.part > self._part:
                self._end_part(step)
            await self._learner.submit(self._with_known_ids(minibatch.groups), step)

    def _with_known_ids(self, groups: Sequence[Group]) -> list[Group]:
        """The groups; those that the service may have begun to forget are without their sequence ids."""
        forgotten = self._control.wall_clock() - SEQUENCE_SECONDS
        old = {id(one.group) for one in self._finished.values() if one.began < forgotten}
        return [without_sequence_ids(group) if id(group) in old else group for group in groups]

    def _end_part(self, step: int) -> None:
        self._part += 1
        self._learner.end_part(step, self._total)

    async def _wait_for_change(self, *, is_learner_wanted: bool) -> None:
        """Until a group has ended, or the trainer is idle while groups wait for it."""
        if not is_learner_wanted:
            await self._changed.wait()
            return
        async with anyio.create_task_group() as tasks:

            async def until_idle() -> None:
                await self._learner.wait_idle()
                self._changed.set()

            tasks.start_soon(until_idle)
            await self._changed.wait()
            tasks.cancel_scope.cancel()

    def _is_complete(self) -> bool:
        if self._admission.is_full:
            return True
        is_cut = self._cut_step == self._admission.step and self._cut.isdisjoint(self._admission.running)
        return is_cut and not self._admission.is_due

    async def _cut_when_late(self, step: int, deadline: float) -> None:
        await self._control.sleep_until(deadline)
        self._cut_step = step
        must = self._admission.must_come()
        # With staleness none may be due yet: those that began first are cut, as many as the batch lacks.
        others = [place for place in self._admission.running if place not in must]
        self._cut = {*must, *others[: max(0, self._admission.lacking - len(must))]}
        for place in self._cut:
            self._under_way[place].cut(STEP_TIME_LIMIT)
        self._changed.set()

    # --- the tasks beside it ------------------------------------------------------------------------------------------

    async def _start_groups(self) -> None:
        async with anyio.create_task_group() as tasks:
            while True:
                self._may_start = anyio.Event()
                while (place := self._next_start()) is not None:
                    self._admission.started(place)
                    task = self._engine.task(place, self._order.question(place), key=str(place))
                    self._under_way[place] = GroupUnderWay(task, began=self._control.wall_clock())
                    tasks.start_soon(self._play, self._under_way[place])
                    # One at a time: a prompt is rendered in about a millisecond, and a batch may be 512 of them.
                    await anyio.lowlevel.checkpoint()
                await self._may_start.wait()

    def _next_start(self) -> int | None:
        if len(self._under_way) >= self._engine.groups_in_flight or self._cut_step == self._admission.step:
            return None
        return self._admission.next_start()

    async def _play(self, under_way: GroupUnderWay) -> None:
        place = under_way.task.place
        # For good, also where its weights move on: the service keeps a key/value cache for each client.
        policy = self._newest.current
        try:
            group = await self._engine.play_group(under_way, policy, self._budget_of(place), step=self._admission.step)
        finally:
            del self._under_way[place]
        if under_way.cut_reason != TOO_SLOW:  # else its step has been closed without it
            self._ended(place, group, under_way)
        self._may_start.set()

    def _ended(self, place: int, group: Group, under_way: GroupUnderWay) -> None:
        finished = self._judge(group, under_way.began, under_way.cut_reason)
        self._finished[place] = finished
        self._admission.finished(place, is_constant=finished.drop_reason == CONSTANT_REWARD)
        self._keeper.keep(place, group)
        self._emit(GroupFinished(group, self._admission.step))
        if finished.drop_reason is not None:
            self._drop(finished, self._admission.step)
        self._changed.set()

    def _judge(self, group: Group, began: float, cut_reason: str | None = None) -> _Finished:
        reason = drop_reason(
            group,
            drop_constant_groups=self._job.learning.drop_constant_groups,
            min_members=self._job.pipeline.min_members,
        )
        return _Finished(group, cut_reason if reason == "too_few_episodes" and cut_reason else reason, began)

    def _drop(self, finished: _Finished, step: int) -> None:
        assert finished.drop_reason is not None
        self._emit(GroupDropped(finished.group, step, finished.drop_reason))

    # --- bookkeeping --------------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        """Says how learning stands, if that has changed."""
        is_learning = not self._learner.is_idle and not self._finisher.is_stepping
        now = PipelineChanged(
            step=self._admission.step,
            policy_version=self._admission.version,
            batch_groups=self._job.learning.groups_per_batch,
            taken_groups=self._admission.taken,
            waiting_groups=self._admission.waiting,
            trainer="stepping" if self._finisher.is_stepping else "learning" if is_learning else "idle",
        )
        if now != self._told:
            self._told = now
            self._emit(now)

    async def _restore(self) -> None:
        """Takes up what an earlier session left open: finished groups of weights that still exist are not played again.

        Their sequence ids name nothing in this session. With ``stable_reinforce`` they are trained on with another loss (see
        :class:`~searchr1_async.training.learner.Learner`), which costs a request more in the batches that hold some, where
        playing them again would cost all their samples and searches.
        """
        point, now = self._recorder.point, self._control.wall_clock()
        kept = await self._keeper.load()
        end = max([point.next_place, *(place + 1 for place in kept)])
        open_places = {*point.open_places, *range(point.next_place, end)}
        finished: dict[int, int] = {}
        for place, group in kept.items():
            versions = group.policy_versions or (point.step,)
            # Turns of weights that were published but not saved belong to a future that is lost.
            if place in open_places and versions[-1] <= point.step:
                finished[place] = versions[0]
                # A group that is not whole was cut by the step's time limit; one that was too slow is not kept.
                is_cut = len(group.episodes) + len(group.failed) < self._engine.group_size
                self._finished[place] = self._judge(
                    without_sequence_ids(group), now, STEP_TIME_LIMIT if is_cut else None
                )
        self._keeper.forget(set(kept) - set(finished))
        constant = [place for place in finished if self._finished[place].drop_reason == CONSTANT_REWARD]
        self._admission.restore(finished, open_places - set(finished), constant=constant)
        if finished:
            text = f"{len(finished)} groups finished before the run stopped: they are not rolled out again"
            if self._learner.loss == "stable_reinforce":
                text += f", and are trained on with {FALLBACK_LOSS}, since another session sampled them"
            self._emit(Notice(text))

    def _published(self, client: tinker.SamplingClient | None, step: int) -> None:
        """The weights after a step are there; without an optimiser step they are the same, under a new number."""
        self._newest.current = TinkerPolicy(client or self._newest.current.client, step, self._job.sampling)
        self._admission.published(step)
        self._emit(WeightsPublished(step))
        self._tell()
        self._may_start.set()
        self._changed.set()

    def _let_go(self, places: Collection[int]) -> None:
        """A recorded step holds the groups of these places. One by one: 4,096 episodes go in 0.27 s."""
        for place in places:
            del self._finished[place]

    def _outcomes(self, closed: Closed) -> tuple[GroupOutcome, ...]:
        return tuple(
            GroupOutcome(place, self._finished[place].group, self._finished[place].drop_reason)
            for place in closed.places
        )

    def _budget_of(self, place: int) -> FailureBudget:
        """One for each batch's worth of places, however these are spread over steps; smaller for the last."""
        size = self._job.learning.groups_per_batch
        window = place // size
        if window not in self._budgets:
            groups = size if self._end is None else min(size, self._end - window * size)
            self._budgets[window] = self._engine.failure_budget(groups)
        return self._budgets[window]
