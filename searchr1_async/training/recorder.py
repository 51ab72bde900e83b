"""Writes a run's records: its steps with their resume points, its kept weights, its cost, and finished groups that no step has yet.

A resume point never exists without the records of its steps. Nothing of a step is lost by a stop: writing is shielded. What a
killed session did after its last recorded step is repeated, except for finished groups, which :class:`UnlearnedGroups` keeps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from searchr1_async.billing import TokenUsage, billing_of
from searchr1_async.boundary.waits import GatheredWriting
from searchr1_async.episodes.table import GroupOutcome
from searchr1_async.episodes.types import Group
from searchr1_async.errors import CheckpointError, ServiceError
from searchr1_async.events import CheckpointSaved, Emit, Notice, StepFinished
from searchr1_async.records.metrics import group_metrics, outcome_metrics
from searchr1_async.records.run_records import RunRecords
from searchr1_async.rollout.engine import RolloutEngine
from searchr1_async.runs.checkpoints import CheckpointList, ResumePoint
from searchr1_async.runs.control import RunControl
from searchr1_async.runs.estimate import estimate
from searchr1_async.runs.finished_groups import UnlearnedGroups
from searchr1_async.runs.folder import TrainingResult, result_of, writing_records
from searchr1_async.runs.spending import Spending, check_max_cost
from searchr1_async.search.stats import SearchStatistics
from searchr1_async.service.connection import Service
from searchr1_async.training.admission import Admission, Closed, QuestionOrder
from searchr1_async.training.batches import advantages
from searchr1_async.training.job import TrainingJob
from searchr1_async.training.learner import FinishedStep, StepInProgress

logger = logging.getLogger(__name__)

STOP_SECONDS = 60.0
"""For steps whose optimizer step is at the trainer when the run is stopped: they are waited for and recorded. One took 2 to 17 s on
the embedded service; later ones are learned again after the resume."""
_GATHERING = 0.2
"""Seconds in which finished groups gather for one write: what a kill may cost."""


@dataclass(frozen=True, slots=True)
class Session:
    """What one session of a run works with."""

    job: TrainingJob
    order: QuestionOrder
    service: Service
    engine: RolloutEngine
    control: RunControl
    emit: Emit

    @property
    def total_steps(self) -> int:
        return self.job.total_steps(self.order)


@dataclass(slots=True)
class Step:
    """A closed batch whose optimizer step is submitted. All times in seconds of the run's pausable clock."""

    closed: Closed
    training: StepInProgress
    searched: SearchStatistics
    """Searches while the batch was open, those of a concurrent evaluation included."""
    engine: Mapping[str, float]
    """The engine's metrics when it closed, those of a concurrent evaluation included."""
    opened: float
    sampled: float
    """When its last group had finished."""
    is_checkpoint: bool
    """Its weights are kept permanently."""
    published: float = math.nan
    """When its new weights were published."""
    is_published: anyio.Event = field(default_factory=anyio.Event)

    @property
    def number(self) -> int:
        return self.closed.step


@asynccontextmanager
async def completing_steps(
    control: RunControl, publish: Callable[[Step], Awaitable[None]], record: Callable[[Step], Awaitable[None]]
) -> AsyncIterator[Callable[[Step], Awaitable[None]]]:
    """Publishes and then records closed steps, in order, beside the block. Ends when the last is recorded; after a stop, within a
    minute, and at once while the service does not answer.

    Yields:
        A function that hands over a closed step; it waits while two before it are not done.

    Raises, within an exception group, what ``publish`` and ``record`` raise.
    """
    scope = anyio.CancelScope()

    def cut() -> None:
        scope.deadline = anyio.current_time() + (0.0 if control.waits_for_service else STOP_SECONDS)

    async def each(
        steps: MemoryObjectReceiveStream[Step],
        complete: Callable[[Step], Awaitable[None]],
        following: MemoryObjectSendStream[Step] | None,
    ) -> None:
        async with steps, following or nullcontext():
            async for step in steps:
                await complete(step)
                if following is not None:
                    await _hand_over(following, step)

    # Also for a stop that comes when the last batch is closed: nothing but steps is in progress then.
    with control.ending_with(cut), scope:
        async with anyio.create_task_group() as tasks:
            # Of one: a trainer that is further behind holds the loop up, so that a kill costs at most two steps.
            to_publish, publishing = anyio.create_memory_object_stream[Step](1)
            to_record, recording = anyio.create_memory_object_stream[Step](1)
            tasks.start_soon(each, publishing, publish, to_record)
            tasks.start_soon(each, recording, record, None)
            async with to_publish:
                yield partial(_hand_over, to_publish)
            if control.stop_requested:
                cut()


async def _hand_over(stream: MemoryObjectSendStream[Step], step: Step) -> None:
    try:
        try:
            stream.send_nowait(step)  # where there is room a stop cannot come between the step and its record
        except anyio.WouldBlock:
            await stream.send(step)
    except anyio.BrokenResourceError:
        await anyio.sleep_forever()  # its reader has failed: the error that cancels this says why


class Recorder:
    """The only writer of a run's folder in one session.

    Args:
        identity: the run's settings.
        point: the resume point; None at the start of a run.
    """

    def __init__(self, session: Session, identity: Mapping[str, Any], point: ResumePoint | None) -> None:
        self._session, self._job, self._emit = session, session.job, session.emit
        self._identity = identity
        self.point = point
        """Where the run stands on disk."""
        self.started_from: Mapping[str, Any] | None = None
        """Record of the weights of ``start_from``."""
        self.records = RunRecords(self._job.out_dir)
        self.kept = CheckpointList(self._job.out_dir, keep_best=self._job.keep_best)
        self.spending = _spending_of(self._job, session.service, point)
        """What the run used and spent so far."""
        self.unlearned = UnlearnedWriter(self._job)
        self.longest_step = 0.0
        """Seconds between two steps' weights, the longest so far."""
        self._seconds_before = self._began = self._last_published = 0.0

    # --- the start and the end ------------------------------------------------------------------------------------------

    def emit_estimate(self) -> None:
        """Reports the estimated cost, if anything is billed."""
        if not self.spending.is_billed:
            return
        self._emit(Notice(f"estimated cost: {self.spending.estimate.text}"))
        if self.point is not None and self.point.step and self.point.tokens == TokenUsage():
            text = "earlier sessions did not record their usage: the cost counts from here"
            self._emit(Notice(text, is_warning=True))

    async def start_over(self) -> None:
        """Deletes what an earlier attempt left that came to no step: its evaluations, finished groups, resume point and weights.

        Raises:
            CheckpointError: the folder cannot be written.
        """

        def forget() -> list[str]:
            point = ResumePoint.load(self._job.out_dir)
            with writing_records(self._job.out_dir):
                self.records.truncate_after(-1)
                paths = [path for one in self.kept.clear() for path in one.paths]
                ResumePoint.forget(self._job.out_dir)
            return paths if point is None else [*paths, point.state_path]

        gone = await anyio.to_thread.run_sync(forget)
        await self.unlearned.clear()
        await self.delete(gone)

    def point_at_start(self, state_path: str, loss: Any) -> ResumePoint:
        """The resume point before the first step, with this state."""
        if self.point is not None:
            return replace(self.point, state_path=state_path)
        return ResumePoint(
            step=0,
            next_place=0,
            state_path=state_path,
            order_fingerprint=self._session.order.fingerprint,
            base_model=self._session.service.model_name,
            settings=self._identity,
            loss=loss,
            started_from=self.started_from,
        )

    async def save(self, point: ResumePoint, *, deletes_old: bool = False) -> None:
        """Saves a resume point between steps, and its kept weights if any; then deletes the state of the one before, if asked."""
        before = self.point
        self.point = point = self.spending.written_into(point)

        def write() -> None:
            if point.sampler_path is not None and point.sampler_step is not None:
                with writing_records(self._job.out_dir):
                    state = point.state_path if point.sampler_step == point.step else None
                    self.kept.add(point.sampler_step, point.sampler_path, for_good=True, state_path=state)
            point.save(self._job.out_dir)

        await anyio.to_thread.run_sync(write)
        if before is not None and deletes_old:
            await self.delete([before.state_path])

    async def save_spending(self) -> None:
        """Saves the usage since the resume point, if there is one; cannot be cancelled."""
        if self.point is None:
            return
        self.point = self.spending.written_into(self.point)
        with anyio.CancelScope(shield=True):
            try:
                await anyio.to_thread.run_sync(self.point.save, self._job.out_dir)
            except CheckpointError as error:  # the run is intact; only its cost is too low after a resume
                self._emit(Notice(f"could not save the usage since the last step: {error}", is_warning=True))

    async def result(self, reason: str) -> TrainingResult:
        """The run's result so far, with its cost; reports the cost if anything is billed."""
        result = await anyio.to_thread.run_sync(result_of, self._job.out_dir, self.point, reason)
        cost, expected = self.spending.cost, self.spending.estimate
        if self.spending.is_billed:
            self._emit(Notice(f"cost: {cost} ({cost.tokens}); estimated: {expected.text}"))
        return replace(result, cost=cost, estimated_cost=expected)

    # --- steps ----------------------------------------------------------------------------------------------------------

    def begin(self, now: float) -> None:
        """The session's first step begins."""
        assert self.point is not None, "the start is saved first"
        self._began = self._last_published = now
        self._seconds_before = self.point.seconds
        # The mean of earlier sessions, where no step was seen in this one.
        self.longest_step = self.point.seconds / self.point.step if self.point.step else 0.0
        self.spending.begin()

    def limit_near(self, done: int, seconds: float, seconds_left: float | None, to_come: TokenUsage) -> str | None:
        """Whether another step might cross a limit: ``time_limit``, ``max_cost``, or None. Reports it.

        Args:
            done: closed steps.
            seconds: of this session so far.
            seconds_left: at most, when it began; None: no limit.
            to_come: usage that follows even without another step.
        """
        problem, limit = self.spending.problem(to_come), "max_cost"
        if seconds_left is not None and seconds + self.longest_step > seconds_left:
            problem, limit = "the time limit is near", "time_limit"
        if problem is None:
            return None
        self._emit(Notice(f"{problem}: reinforcement learning ends after {done} steps"))
        return limit

    async def record(self, step: Step, finished: FinishedStep, admission: Admission) -> None:
        """Writes one step down and emits it; steps come in order.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        before, sampler_path = self.point, finished.sampler_path
        assert before is not None
        outcomes = admission.outcomes(step.closed)
        next_place, open_places = admission.next_place, admission.open_after(step.number)
        metrics = await self._metrics(step, outcomes, finished)
        is_newest = sampler_path is not None and step.is_checkpoint
        new = replace(
            self.spending.written_into(before),
            step=step.number,
            next_place=next_place,
            open_places=open_places,
            state_path=finished.state_path,
            sampler_path=sampler_path if is_newest else before.sampler_path,
            sampler_step=step.number if is_newest else before.sampler_step,
            seconds=self._seconds_before + step.published - self._began,
        )

        def write() -> None:
            with writing_records(self._job.out_dir):
                weigh = partial(advantages, kind=self._job.learning.advantage)
                self.records.write_step(step.number, outcomes, metrics, weigh)
                if sampler_path is not None:
                    self.kept.add(
                        step.number, sampler_path, for_good=step.is_checkpoint, state_path=finished.state_path
                    )
            new.save(self._job.out_dir)

        # Shielded: a stop must not fall between a step and its record.
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(write)
            self.point = new
        self._emit(CheckpointSaved(step.number, new.state_path))
        self._emit(StepFinished(step.number, metrics))
        if before.step and not self.kept.holds_state(before.state_path):
            await self.delete([before.state_path])

    async def _metrics(
        self, step: Step, outcomes: tuple[GroupOutcome, ...], finished: FinishedStep
    ) -> dict[str, float]:
        total = step.published - self._last_published
        self._last_published = step.published
        self.longest_step = max(self.longest_step, total)

        def of_groups() -> dict[str, float]:
            groups = [outcome.group for outcome in outcomes]
            return {**group_metrics(groups, policy_version=step.number - 1), **outcome_metrics(outcomes)}

        return {
            "progress/batch": float(step.number),
            "progress/done_frac": min(1.0, step.number / self._session.total_steps),
            # In a thread: 1,024 episodes take 0.1 s.
            **await anyio.to_thread.run_sync(of_groups),
            **step.searched.metrics(),
            **step.engine,
            **finished.metrics,
            **self.spending.step_recorded(),
            "time/total": total,
            "time/sampling": step.sampled - step.opened,
            "time/training_after_sampling": step.published - step.sampled,
        }

    async def delete(self, paths: Iterable[str]) -> None:
        """Deletes at the service what no file of the run names any more; what cannot be deleted costs only room."""
        for path in paths:
            try:
                await self._session.service.delete_checkpoint(path)
            except ServiceError as error:
                logger.info("%s was not deleted: %s", path, error)


def _spending_of(job: TrainingJob, service: Service, point: ResumePoint | None) -> Spending:
    """Refuses ``max_cost`` if the model's price is unknown."""
    billing = billing_of(service.model_name, is_embedded=service.is_local, is_tinker=service.is_tinker, price=job.price)
    check_max_cost(job.max_cost, billing)
    new = Spending(billing, estimate(job.shape, billing), limit=job.max_cost)
    if point is None:
        return new
    return Spending(
        *(billing, new.estimate),
        limit=job.max_cost,
        used=point.tokens,
        spent=point.dollars,
        dearest_step=point.dearest_step,
    )


class UnlearnedWriter:
    """Saves finished groups on disk, until a recorded step contains them."""

    def __init__(self, job: TrainingJob) -> None:
        self._job = job
        self._groups = UnlearnedGroups(job.out_dir / "unlearned")
        self._new: list[tuple[int, Group]] = []
        self._done: set[int] = set()
        self._gathered = GatheredWriting(self._write, _GATHERING)

    async def load(self) -> dict[int, Group]:
        """What an earlier session left, by place.

        Raises:
            CheckpointError: what a killed session left half done cannot be tidied up, such as on a full disk.
        """

        def load() -> dict[int, Group]:
            with writing_records(self._job.out_dir):
                return self._groups.load()

        return await anyio.to_thread.run_sync(load)

    async def clear(self) -> None:
        """Forgets what another run may have left in this folder."""
        await anyio.to_thread.run_sync(self._groups.clear)

    def keep(self, place: int, group: Group) -> None:
        """Writes this group soon, in place of an earlier one."""
        self._done.discard(place)
        self._new.append((place, group))
        self._gathered.want()

    def forget(self, places: Collection[int]) -> None:
        """Recorded steps hold these, or they are of no use: they may go."""
        self._done.update(places)
        self._gathered.want()

    def writing(self) -> AbstractAsyncContextManager[None]:
        """Writes while the block runs, and what is left at its end, however that comes.

        Raises, within an exception group:
            CheckpointError: the folder cannot be written.
        """
        return self._gathered.writing()

    async def _write(self) -> None:
        new, self._new = self._new, []
        done, self._done = self._done, set()

        def write() -> None:
            with writing_records(self._job.out_dir):
                if kept := [(place, group) for place, group in new if place not in done]:
                    self._groups.write(kept)
                if done:
                    self._groups.forget(done)

        if new or done:
            # Shielded: what was taken from the list must reach the disk, though the run is stopped just now.
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(write)
