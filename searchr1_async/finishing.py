"""Completes closed batches in the background, in order: publishes each step's new weights, then records the step."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import tinker
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from searchr1_async.control import RunControl
from searchr1_async.learn.learner import StepInProgress
from searchr1_async.recording import Keeper, StepRecorder, StepToRecord
from searchr1_async.rollout.admission import Admission

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
