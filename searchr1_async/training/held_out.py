"""Evaluation on the held-out questions during training.

An ``evaluate_every`` step is evaluated on its own weights, which the service keeps until the result is recorded. Evaluations run one
at a time, in step order, at lower priority than training requests. Training waits for them only if more than :data:`MOST_WAITING`
have not started, and at the end of the run.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

import anyio

from searchr1_async.billing import TokenUsage, sampling_usage, total_usage
from searchr1_async.episodes.types import Episode
from searchr1_async.errors import ServiceError
from searchr1_async.events import EndReason, Notice
from searchr1_async.rollout.player import TinkerPolicy
from searchr1_async.runs.evaluation import Evaluation
from searchr1_async.runs.folder import OF_NO_STEP, evaluation_steps, load_evaluation, writing_records
from searchr1_async.runs.rollouts import evaluate_policy
from searchr1_async.training.recorder import Recorder, Session

MOST_WAITING = 2
"""Queued evaluations above which training waits: each keeps weights at the service, and a curve that lags further is of little use."""


class Measuring:
    """The evaluations of one session of a run."""

    def __init__(self, session: Session, recorder: Recorder) -> None:
        self._session, self._job, self._recorder = session, session.job, recorder
        self._control, self._emit = session.control, session.emit
        self._every = session.job.config.evaluation.evaluate_every
        self._due: dict[int, str | None] = {}
        """By step, in order, the running one first: the saved weights; None until the step is recorded."""
        self._is_running = False
        self._scope = anyio.CancelScope()
        self._changed = anyio.Event()  # replaced at each change
        self._has_warned = False
        self._used = TokenUsage()
        """By the last evaluation."""
        self._last: Evaluation | None = None
        """Of this session."""

    async def measure(self, label: str, policy: TinkerPolicy, *, yields: bool = False) -> None:
        """Evaluates on the held-out questions, unless an earlier session did so at this step."""
        job, step, records = self._job, policy.version, self._recorder.records
        if not job.held_out or (await anyio.to_thread.run_sync(evaluation_steps, records)).get(label) == step:
            return
        if job.config.episode.limits.max_seconds is not None:
            await job.search.opened()  # no episode's time is spent on an index that is being built
        evaluation = await evaluate_policy(
            self._session.engine,
            job.held_out,
            policy,
            samples=job.config.evaluation.held_out_samples,
            label=label,
            step=step,
            yields=yields,
        )
        self._used = await anyio.to_thread.run_sync(_usage_of, evaluation.episodes)
        await self._recorder.write_evaluation(label, evaluation, step)
        before = "" if self._last is None else f" ({self._last.label}: {self._last.exact_match:.1%})"
        self._emit(Notice(f"{label}: {evaluation}{before}"))
        self._last = evaluation
        await self._recorder.delete_unwanted(list(self._due))

    @property
    def to_come(self) -> TokenUsage:
        """Expected tokens of the evaluations that happen even without a further step: the last weights, and a running one."""
        return total_usage([self._used] * (1 + self._is_running)) if self._job.held_out else TokenUsage()

    # --- notifications from training ----------------------------------------------------------------------------------

    def closed(self, step: int, *, is_last: bool) -> bool:
        """A step's batch is closed; returns whether the step will be evaluated once recorded. The last step is handled elsewhere."""
        if is_last or self._every is None or step % self._every:
            return False
        self._due[step] = None
        return True

    def recorded(self, step: int, sampler_path: str | None) -> None:
        """A step is on disk, and its weights, if kept, are at the service."""
        if step in self._due:
            self._due[step] = sampler_path
        self._notify()

    async def wait_for_room(self) -> None:
        """Waits until at most :data:`MOST_WAITING` evaluations are queued."""
        if len(self._waiting) > MOST_WAITING and not self._has_warned:
            self._has_warned = True
            text = (
                f"an evaluation takes longer than {self._every} steps, so training sometimes waits for one: use a larger "
                "evaluate_every, or fewer held-out questions or samples"
            )
            self._emit(Notice(text, is_warning=True))
        await self._wait_until(lambda: len(self._waiting) <= MOST_WAITING)

    def training_ended(self, reason: EndReason) -> None:
        """No step follows. A stop cancels all evaluations. At the time or cost limit a running one finishes and queued ones are
        skipped; the last weights are evaluated anyway.
        """
        skipped = self._waiting
        if self._control.stop_requested:
            self._scope.cancel()
            self._due.clear()
        elif reason in ("time_limit", "max_cost") and skipped:
            steps = ", ".join(map(str, skipped))
            self._emit(Notice(f"{reason} was reached before the evaluation of step {steps}: skipped"))
            for step in skipped:
                del self._due[step]
        self._notify()

    # --- the background task ------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def beside(self) -> AsyncIterator[None]:
        """Runs due evaluations in the background of the block, and the rest at its end, unless the run is stopped.

        Raises, within exception groups, what :meth:`measure` raises.
        """
        if self._job.held_out:
            self._due |= await anyio.to_thread.run_sync(self._left_over)
        await self._recorder.delete_unwanted(list(self._due))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._run)
            yield
            with self._control.interruptible():
                await self._wait_until(lambda: not self._due)
            tasks.cancel_scope.cancel()

    async def _run(self) -> None:
        with self._scope:
            while True:
                await self._wait_until(lambda: bool(self._due and next(iter(self._due.values()))))
                await self._control.wait_while_paused()
                if not self._due:
                    continue  # skipped meanwhile
                step, path = next(iter(self._due.items()))
                self._is_running = True
                self._notify()
                try:
                    client = await self._session.service.create_sampling_client(path)
                except ServiceError as error:
                    self._emit(Notice(f"step {step} is not evaluated: {error}", is_warning=True))
                else:
                    policy = TinkerPolicy(client, step, self._job.config.sampling)
                    await self.measure(f"step {step}", policy, yields=True)
                self._is_running = False
                self._due.pop(step, None)  # unless a stop has cleared them
                self._notify()

    def _left_over(self) -> dict[int, str | None]:
        """The evaluations that an earlier session left, whose weights are kept.

        Also adds the scores of evaluations that were recorded just before a kill to the kept weights.
        """
        records, kept = self._recorder.records, self._recorder.kept
        steps = {step: label for label, step in evaluation_steps(records).items() if label not in OF_NO_STEP}
        for one in kept.checkpoints:
            if one.step in steps and not one.is_measured:
                found = load_evaluation(records, steps[one.step], one.step)
                with writing_records(self._job.out_dir):
                    kept.measured(one.step, found.exact_match, found.questions)
        labels = records.evaluation_labels()
        if labels and self._used == TokenUsage():
            self._used = _usage_of(records.load_evaluation(labels[0]))
        if self._every is None:
            return {}
        newest, point = max((step or 0 for step in steps), default=0), self._recorder.point
        # Its evaluation is the one after training.
        last = point.step if point is not None and self._job.is_over(point, self._session.order) else None
        return {
            one.step: one.sampler_path
            for one in kept.checkpoints
            if not one.is_measured and one.step > newest and one.step != last and one.step % self._every == 0
        }

    @property
    def _waiting(self) -> list[int]:
        """Steps whose evaluation is due and has not started."""
        return list(self._due)[self._is_running :]

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def _wait_until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            await self._changed.wait()


def _usage_of(episodes: Iterable[Episode]) -> TokenUsage:
    return total_usage(map(sampling_usage, episodes))
