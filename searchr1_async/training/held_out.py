"""Evaluation on the held-out questions during training.

An ``evaluate_every`` step is evaluated on its own weights, which the service keeps until the result is recorded (unsaved sampling
weights may be gone by then). Evaluations run one at a time, in step order, at lower priority than training requests. Training waits
for them only if more than :data:`MOST_WAITING` have not started, and at the end of the run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio

from searchr1_async.billing import TokenUsage, sampling_usage, total_usage
from searchr1_async.episodes.types import Episode
from searchr1_async.errors import ServiceError
from searchr1_async.events import Notice
from searchr1_async.rollout.player import TinkerPolicy
from searchr1_async.runs.checkpoints import ResumePoint
from searchr1_async.runs.folder import OF_NO_STEP, evaluation_steps, load_evaluation, writing_records
from searchr1_async.runs.rollouts import evaluate_policy
from searchr1_async.training.recorder import Recorder, Session

MOST_WAITING = 2
"""Queued evaluations above which training waits: each keeps weights at the service, and a curve that lags further is of little use."""


@dataclass(slots=True)
class _Due:
    """A due evaluation."""

    step: int
    policy: TinkerPolicy | None = None
    """Its weights, if a sampling client is open."""
    sampler_path: str | None = None
    """The saved weights otherwise; None until the step is recorded."""

    @property
    def is_ready(self) -> bool:
        return self.policy is not None or self.sampler_path is not None


class Measuring:
    """The evaluations of one session of a run."""

    def __init__(self, session: Session, recorder: Recorder) -> None:
        self._job, self._service, self._engine = session.job, session.service, session.engine
        self._control, self._emit, self._recorder = session.control, session.emit, recorder
        self._records, self._kept = recorder.records, recorder.kept
        self._waiting: deque[_Due] = deque()
        self._under_way: _Due | None = None
        self._scope = anyio.CancelScope()
        self._changed = anyio.Event()  # replaced at each change
        self._episodes = 0
        self._has_warned = False
        self._used = TokenUsage()
        """By the last evaluation."""

    # --- one evaluation -----------------------------------------------------------------------------------------------

    async def measure(self, label: str, policy: TinkerPolicy, *, yields: bool = False) -> None:
        """Evaluates on the held-out questions, unless an earlier session did so at this step.

        Args:
            yields: run at lower priority than training.

        Raises, within exception groups:
            TooManyFailuresError: too many episodes failed.
            SearchError: the search failed fatally.
            CheckpointError: the folder cannot be written.
        """
        job, step = self._job, policy.version
        if not job.held_out or (await anyio.to_thread.run_sync(evaluation_steps, self._records)).get(label) == step:
            return
        evaluation = await evaluate_policy(
            self._engine,
            job.held_out,
            policy,
            samples=job.held_out_samples,
            label=label,
            step=step,
            yields=yields,
            on_question=self._count,
        )

        def write() -> None:
            self._used = _usage_of(evaluation.episodes)
            with writing_records(job.out_dir):
                self._records.write_evaluation(label, evaluation.episodes, step)
                if label not in OF_NO_STEP:
                    self._kept.measured(step, evaluation.exact_match, evaluation.questions)

        await anyio.to_thread.run_sync(write)
        self._emit(Notice(f"{label}: {evaluation}"))
        await self.delete_unwanted()

    async def delete_unwanted(self) -> None:
        """Deletes evaluated weights that were kept only for their evaluation; a failed deletion only costs storage."""
        waiting = [due.step for due in self._all()]

        def take() -> list[str]:
            with writing_records(self._job.out_dir):
                gone = self._kept.take_unwanted(waiting)
            # Load the point after changing the list: the recorder moves the point and then reads the list, so one of the two
            # deletes the state.
            point = ResumePoint.load(self._job.out_dir) if gone else None
            spared = {point.state_path} if point is not None else set[str]()
            return [
                path for one in gone for path in one.paths if path not in spared and not self._kept.holds_state(path)
            ]

        await self._recorder.delete(await anyio.to_thread.run_sync(take))

    @property
    def to_come(self) -> TokenUsage:
        """Expected tokens of the evaluations that happen even without a further step: the last weights, and a running one."""
        if not self._job.held_out:
            return TokenUsage()
        return self._used if self._under_way is None else self._used + self._used

    def _count(self) -> None:
        self._episodes += self._job.held_out_samples

    def _all(self) -> Iterable[_Due]:
        return self._waiting if self._under_way is None else (self._under_way, *self._waiting)

    # --- notifications from training ----------------------------------------------------------------------------------

    def closed(self, step: int, *, is_last: bool) -> bool:
        """A step's batch is closed; returns whether the step will be evaluated once recorded. The last step is handled elsewhere."""
        if is_last or not self._is_due(step):
            return False
        self._waiting.append(_Due(step))
        return True

    def recorded(self, step: int, sampler_path: str | None) -> None:
        """A step is on disk, and its weights, if kept, are at the service."""
        for due in self._waiting:
            if due.step == step:
                due.sampler_path = sampler_path
        self._notify()

    async def wait_for_room(self) -> None:
        """Waits until at most :data:`MOST_WAITING` evaluations are queued."""
        if len(self._waiting) <= MOST_WAITING:
            return
        if not self._has_warned:
            self._has_warned = True
            self._emit(
                Notice(
                    f"an evaluation takes longer than {self._job.evaluate_every} steps, so training sometimes waits for one: "
                    "use a larger evaluate_every, or fewer held-out questions or samples",
                    is_warning=True,
                )
            )
        await self._wait_until(lambda: len(self._waiting) <= MOST_WAITING)

    def training_ended(self, reason: str) -> None:
        """No step follows. A stop cancels all evaluations. At the time or cost limit a running one finishes and queued ones are
        skipped; the last weights are evaluated anyway.
        """
        if self._control.stop_requested:
            self._scope.cancel()
            self._waiting.clear()
        elif reason in ("time_limit", "max_cost") and self._waiting:
            steps = ", ".join(str(due.step) for due in self._waiting)
            what = "time" if reason == "time_limit" else "cost"
            self._emit(Notice(f"the {what} limit was reached before the evaluation of step {steps}: skipped"))
            self._waiting.clear()
        self._notify()

    def metrics(self) -> dict[str, float]:
        """Held-out episodes finished since the last call: a step's search and sample metrics include them."""
        episodes, self._episodes = self._episodes, 0
        return {} if self._job.evaluate_every is None else {"evaluation/episodes_beside": float(episodes)}

    # --- the background task ------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def beside(self, policy: TinkerPolicy, *, is_over: bool) -> AsyncIterator[None]:
        """Runs due evaluations in the background of the block, and the rest at its end, unless the run is stopped.

        Args:
            policy: of the session's first step.
            is_over: that step is the run's last.

        Raises, within exception groups, what :meth:`measure` raises.
        """
        if self._job.held_out:
            await self._resume(policy, is_over)
        await self.delete_unwanted()
        self._episodes = 0
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._run)
            yield
            with self._control.interruptible():
                await self._wait_until(lambda: not self._waiting and self._under_way is None)
            tasks.cancel_scope.cancel()

    async def _run(self) -> None:
        with self._scope:
            while True:
                await self._wait_until(lambda: bool(self._waiting) and self._waiting[0].is_ready)
                await self._control.wait_while_paused()
                if not self._waiting:
                    continue  # skipped meanwhile
                self._under_way = due = self._waiting.popleft()
                self._notify()
                if (policy := due.policy or await self._open(due)) is not None:
                    await self.measure(f"step {due.step}", policy, yields=True)
                self._under_way = None
                self._notify()

    async def _open(self, due: _Due) -> TinkerPolicy | None:
        try:
            client = await self._service.create_sampling_client(due.sampler_path)
        except ServiceError as error:
            self._emit(Notice(f"step {due.step} is not evaluated: {error}", is_warning=True))
            return None
        return TinkerPolicy(client, due.step, self._job.sampling)

    async def _resume(self, policy: TinkerPolicy, is_over: bool) -> None:
        """Queues the evaluations that an earlier session left, whose weights are kept."""
        measured, now = await anyio.to_thread.run_sync(self._adopt), policy.version
        if self._used == TokenUsage():
            self._used = await anyio.to_thread.run_sync(self._usage_of_earlier_session)
        paths = {one.step: one.sampler_path for one in self._kept.checkpoints if not one.is_measured}
        for step in sorted({*paths, now}):
            if step > measured and self._is_due(step) and not (is_over and step == now):
                # Saved weights can be opened later; without them there is only the open sampling client.
                path = paths.get(step)
                if path is None and self._job.pipeline.weights_in_flight == "inflight":
                    # The session's first step would change the weights under evaluation.
                    with self._control.interruptible():
                        await self.measure(f"step {step}", policy)
                else:
                    self._waiting.append(_Due(step, policy if path is None else None, path))

    def _adopt(self) -> int:
        """Adds scores of evaluations recorded just before a kill to the kept weights; returns the newest evaluated step."""
        steps = {label: step for label, step in evaluation_steps(self._records).items() if label not in OF_NO_STEP}
        for one in self._kept.checkpoints:
            label = next((label for label, step in steps.items() if step == one.step), None)
            if label is not None and not one.is_measured:
                found = load_evaluation(self._records, label, one.step)
                with writing_records(self._job.out_dir):
                    self._kept.measured(one.step, found.exact_match, found.questions)
        return max((step or 0 for step in steps.values()), default=0)

    def _usage_of_earlier_session(self) -> TokenUsage:
        """Tokens of an earlier session's first evaluation."""
        label = next(iter(self._records.evaluation_labels()), None)
        return TokenUsage() if label is None else _usage_of(self._records.load_evaluation(label))

    def _is_due(self, step: int) -> bool:
        every = self._job.evaluate_every
        return every is not None and step > 0 and step % every == 0

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def _wait_until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            await self._changed.wait()


def _usage_of(episodes: Iterable[Episode]) -> TokenUsage:
    return total_usage(map(sampling_usage, episodes))
