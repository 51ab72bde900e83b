"""Writes a run's records: its steps with their resume points, its evaluations and kept weights, its cost, and finished groups that no
step has yet. It also decides how long the service keeps a checkpoint.

A resume point never exists without the records of its steps. Nothing of a step is lost by a stop: writing is shielded. What a
killed session did after its last recorded step is repeated, except for finished groups, which :class:`UnlearnedGroups` keeps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import anyio

from searchr1_async.billing import Spending, TokenUsage, check_max_cost
from searchr1_async.boundary.waits import GatheredItems
from searchr1_async.config import LossName
from searchr1_async.episodes.types import Group, GroupOutcome
from searchr1_async.errors import CheckpointError, ServiceError
from searchr1_async.events import CheckpointSaved, Emit, EndReason, Notice, StepFinished
from searchr1_async.records.metrics import group_metrics, outcome_metrics
from searchr1_async.records.run_records import RunRecords
from searchr1_async.rollout.engine import RolloutEngine
from searchr1_async.runs.control import RunControl
from searchr1_async.runs.evaluation import Evaluation
from searchr1_async.runs.folder import OF_NO_STEP, TrainingResult, UnlearnedGroups, result_of, writing_records
from searchr1_async.runs.resume import CheckpointList, ResumePoint
from searchr1_async.service.connection import Service
from searchr1_async.service.opening import billing_on
from searchr1_async.training.admission import Admission, Closed, QuestionOrder
from searchr1_async.training.batches import advantages
from searchr1_async.training.estimate import estimate
from searchr1_async.training.job import TrainingJob
from searchr1_async.training.learner import SubmittedBatch

logger = logging.getLogger(__name__)

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


@dataclass(slots=True, eq=False)
class Step:
    """A closed batch whose optimizer step is submitted. All times in seconds of the run's pausable clock."""

    closed: Closed
    training: SubmittedBatch
    metrics: Mapping[str, float]
    """Of the search and the engine while the batch was open, those of a concurrent evaluation included."""
    opened: float
    sampled: float
    """When its last group had finished."""
    is_checkpoint: bool
    """Its weights are kept permanently."""
    published: float = math.nan
    """When its new weights were published."""
    is_published: anyio.Event = field(default_factory=anyio.Event)
    is_recorded: anyio.Event = field(default_factory=anyio.Event)

    @property
    def number(self) -> int:
        return self.closed.step


class Recorder:
    """The only writer of a run's folder in one session.

    Raises:
        ConfigurationError: ``max_cost`` is given and the model's price is unknown.
    """

    def __init__(self, session: Session, identity: Mapping[str, Any], point: ResumePoint | None) -> None:
        self._session, self._job, self._emit = session, session.job, session.emit
        self._folder, self._identity = session.job.out_dir, identity
        self.point = point
        """Where the run stands on disk."""
        self.started_from: Mapping[str, Any] | None = None
        """Record of the weights of ``start_from``."""
        self.records = RunRecords(self._folder)
        self.kept = CheckpointList(self._folder, keep_best=self._job.config.checkpoints.keep_best)
        cost = self._job.config.cost
        billing = billing_on(self._job.service, session.service.model_name, cost.price)
        check_max_cost(cost.max_cost, billing)
        self.estimate = estimate(self._job.shape, billing)
        before: dict[str, Any] = {}
        if point is not None:
            before = {"used": point.tokens, "spent": point.dollars, "dearest_step": point.dearest_step}
        self.spending = Spending(billing, self.estimate.dollars_per_step, limit=cost.max_cost, **before)
        self.unlearned = UnlearnedWriter(self._folder)
        self._changing = anyio.Lock()
        """Of the resume point and the list of checkpoints: what one of them names is not deleted while the other is written."""
        self._longest_step = self._last_published = 0.0
        self._ends = math.inf
        """When ``time_limit`` is reached."""

    # --- the start and the end ------------------------------------------------------------------------------------------

    def emit_estimate(self) -> None:
        """Reports the estimated cost, if anything is billed."""
        if self.spending.is_billed:
            self._emit(Notice(f"estimated cost: {self.estimate.text}"))

    async def start_over(self) -> None:
        """Deletes what an earlier attempt without a step left: its evaluations, finished groups, resume point and weights."""

        def forget() -> list[str]:
            point = ResumePoint.load(self._folder)
            with writing_records(self._folder):
                self.records.truncate_after(-1)
                paths = [path for one in self.kept.clear() for path in one.paths]
                ResumePoint.forget(self._folder)
            return paths if point is None else [*paths, point.state_path]

        gone = await anyio.to_thread.run_sync(forget)
        await self.unlearned.clear()
        await self._delete(gone)

    async def save_start(
        self, state_path: str, loss: LossName, *, warm_up: int | None = None, sampler_path: str | None = None
    ) -> None:
        """Saves the resume point before the first step.

        Args:
            warm_up: finished steps of a warm-up in progress.
            sampler_path: of the weights, if they are kept.
        """
        point = self.point or ResumePoint(
            step=0,
            next_place=0,
            state_path=state_path,
            order_fingerprint=self._session.order.fingerprint,
            base_model=self._session.service.model_name,
            settings=self._identity,
            loss=loss,
            started_from=self.started_from,
        )
        await self.save(replace(point, state_path=state_path, warm_up=warm_up), sampler_path)
        if warm_up is None:
            self._emit(CheckpointSaved(0, state_path))

    async def save(self, point: ResumePoint, sampler_path: str | None) -> None:
        """Saves a resume point between steps, with its weights for sampling, which are kept, if there are any."""
        before = self.point
        if sampler_path is not None:
            point = replace(point, sampler_path=sampler_path, sampler_step=point.step)

        def keep() -> None:
            if sampler_path is not None:
                self.kept.add(point.step, sampler_path, for_good=True, state_path=point.state_path)

        await self._advance(replace(point, **self.spending.as_fields()), keep)
        await self._delete_state(before)

    async def save_spending(self) -> None:
        """Saves the usage since the resume point, if there is one; cannot be cancelled."""
        if self.point is None:
            return
        try:
            await self._advance(replace(self.point, **self.spending.as_fields()), lambda: None)
        except CheckpointError as error:  # the run is intact; only its cost is too low after a resume
            self._emit(Notice(f"could not save the usage since the last step: {error}", is_warning=True))

    async def result(self, reason: EndReason) -> TrainingResult:
        """The run's result so far, with its cost; reports the cost if anything is billed."""
        result = await anyio.to_thread.run_sync(result_of, self._folder, self.point, reason)
        cost, expected = self.spending.cost, self.estimate
        if self.spending.is_billed:
            self._emit(Notice(f"cost: {cost} ({cost.tokens}); estimated: {expected.text}"))
        return replace(result, cost=cost, estimated_cost=expected)

    # --- steps ----------------------------------------------------------------------------------------------------------

    def begin(self) -> float | None:
        """The session's first step begins; returns the seconds left of ``time_limit``, None without one."""
        assert self.point is not None, "the start is saved first"
        limit = self._job.config.length.time_limit
        self._last_published = self._session.control.now()
        left = None if limit is None else max(0.0, limit - self.point.seconds)
        self._ends = math.inf if left is None else self._last_published + left
        # The mean of earlier sessions, where no step was seen in this one.
        self._longest_step = self.point.seconds / self.point.step if self.point.step else 0.0
        self.spending.begin()
        return left

    def limit_near(self, done: int, to_come: TokenUsage) -> Literal["time_limit", "max_cost"] | None:
        """Whether another step might cross a limit. Reports it.

        Args:
            done: closed steps.
            to_come: usage that follows even without another step.
        """
        has_enough = done >= self._job.config.length.min_steps
        is_late = has_enough and self._session.control.now() + self._longest_step > self._ends
        problem = "the time limit is near" if is_late else self.spending.problem(to_come)
        if problem is None:
            return None
        self._emit(Notice(f"{problem}: reinforcement learning ends after {done} steps"))
        return "time_limit" if is_late else "max_cost"

    async def record(self, step: Step, admission: Admission) -> str | None:
        """Writes one step down, once the service has saved it, and emits it; steps come in order.

        Returns:
            The path of its weights for sampling, if a checkpoint or evaluation was due.
        """
        finished, before = await step.training.finished(), self.point
        assert before is not None
        outcomes, sampler_path = admission.outcomes(step.closed), finished.sampler_path
        next_place, open_places = admission.next_place, admission.open_after(step.number)
        metrics = await self._metrics(step, outcomes, finished.metrics)
        new = replace(
            before,
            **self.spending.as_fields(),
            step=step.number,
            next_place=next_place,
            open_places=open_places,
            state_path=finished.state_path,
            seconds=before.seconds + metrics["time/total"],
        )
        if sampler_path is not None and step.is_checkpoint:
            new = replace(new, sampler_path=sampler_path, sampler_step=step.number)

        def write() -> None:
            weigh = partial(advantages, kind=self._job.learning.advantage)
            self.records.write_step(step.number, outcomes, metrics, weigh)
            if sampler_path is not None:
                self.kept.add(step.number, sampler_path, for_good=step.is_checkpoint, state_path=finished.state_path)

        await self._advance(new, write)
        self._emit(CheckpointSaved(step.number, new.state_path))
        self._emit(StepFinished(step.number, metrics))
        await self._delete_state(before)
        return sampler_path

    async def _metrics(
        self, step: Step, outcomes: tuple[GroupOutcome, ...], learned: Mapping[str, float]
    ) -> dict[str, float]:
        total = step.published - self._last_published
        self._last_published = step.published
        self._longest_step = max(self._longest_step, total)

        def of_groups() -> dict[str, float]:
            groups = [outcome.group for outcome in outcomes]
            return {**group_metrics(groups, policy_version=step.number - 1), **outcome_metrics(outcomes)}

        return {
            "progress/batch": float(step.number),
            "progress/done_frac": min(1.0, step.number / self._job.shape.total_steps),
            # In a thread: 1,024 episodes take 0.1 s.
            **await anyio.to_thread.run_sync(of_groups),
            **step.metrics,
            **learned,
            **self.spending.step_recorded(),
            "time/total": total,
            "time/sampling": step.sampled - step.opened,
            "time/training_after_sampling": step.published - step.sampled,
        }

    # --- evaluations ----------------------------------------------------------------------------------------------------

    async def write_evaluation(self, label: str, evaluation: Evaluation, step: int) -> None:
        """Writes an evaluation of a step's weights down."""

        def write() -> None:
            with writing_records(self._folder):
                self.records.write_evaluation(label, evaluation.episodes, step)
                if label not in OF_NO_STEP:
                    self.kept.measured(step, evaluation.exact_match, evaluation.questions)

        await anyio.to_thread.run_sync(write)

    async def delete_unwanted(self, waiting: Collection[int]) -> None:
        """Deletes weights that were kept only for their evaluation, but not of the steps whose evaluation waits."""

        def take() -> list[str]:
            with writing_records(self._folder):
                return [path for one in self.kept.take_unwanted(waiting) for path in one.paths]

        async with self._changing:
            gone = await anyio.to_thread.run_sync(take)
            # The resume point's own state is deleted after the next step.
            spared = None if self.point is None else self.point.state_path
        await self._delete(path for path in gone if path != spared and not self.kept.holds_state(path))

    # --- writing and deleting -------------------------------------------------------------------------------------------

    async def _advance(self, point: ResumePoint, write: Callable[[], None]) -> None:
        """Writes records, then the resume point that names them. Shielded: a stop must not fall between a step and its record."""

        def write_all() -> None:
            with writing_records(self._folder):
                write()
            point.save(self._folder)

        with anyio.CancelScope(shield=True):
            async with self._changing:
                await anyio.to_thread.run_sync(write_all)
                self.point = point

    async def _delete_state(self, before: ResumePoint | None) -> None:
        """Deletes the state of an earlier resume point, unless it is still in use."""
        assert self.point is not None
        if before is None or before.state_path == self.point.state_path or self.kept.holds_state(before.state_path):
            return
        await self._delete([before.state_path])

    async def _delete(self, paths: Iterable[str]) -> None:
        """Deletes at the service what no file of the run names any more; what cannot be deleted costs only room."""
        for path in paths:
            try:
                await self._session.service.delete_checkpoint(path)
            except ServiceError as error:
                logger.info("%s was not deleted: %s", path, error)


class UnlearnedWriter:
    """Saves the finished groups of the run in a folder on disk, until a recorded step contains them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._groups = UnlearnedGroups(folder / "unlearned")
        self._gathered = GatheredItems(self._write, _GATHERING)
        self.writing = self._gathered.writing
        """A context that writes while its block runs, and what is left when it ends, also by an error or a cancellation."""

    async def load(self) -> dict[int, Group]:
        """What an earlier session left, by place."""

        def load() -> dict[int, Group]:
            with writing_records(self._folder):
                return self._groups.load()

        return await anyio.to_thread.run_sync(load)

    async def clear(self) -> None:
        """Forgets what another run may have left in this folder."""
        await anyio.to_thread.run_sync(self._groups.clear)

    def keep(self, place: int, group: Group) -> None:
        """Writes this group soon, in place of an earlier one."""
        self._gathered.take((place, group))

    def forget(self, places: Collection[int]) -> None:
        """Recorded steps hold these, or they are of no use: they may go."""
        for place in places:
            self._gathered.take((place, None))

    async def _write(self, items: Sequence[tuple[int, Group | None]]) -> None:
        latest = dict(items)

        def write() -> None:
            with writing_records(self._folder):
                self._groups.write({place: group for place, group in latest.items() if group is not None})
                self._groups.forget(place for place, group in latest.items() if group is None)

        await anyio.to_thread.run_sync(write)
