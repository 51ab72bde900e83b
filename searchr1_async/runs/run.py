"""The handle to a training run, returned by ``train()``: await it, iterate its events, pause or stop it, read its results."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import ExitStack, aclosing
from pathlib import Path

import anyio

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.boundary.signals import Interrupts, ending_cleanly, in_kernel
from searchr1_async.events import Emit, Event, Notice, RolloutSampled
from searchr1_async.runs.ask import Answer, LiveAnswers
from searchr1_async.runs.control import RunControl, register, run_under_way, runs_under_way
from searchr1_async.runs.folder import TrainingResult
from searchr1_async.runs.recorded import RecordedRun, recorded_run
from searchr1_async.runs.rollouts import ServiceChoice, watching
from searchr1_async.search.search import Search
from searchr1_async.watch.dashboard import Choice
from searchr1_async.watch.subscribers import EventStreams

logger = logging.getLogger(__name__)

INTERRUPT_SECONDS = 90.0
"""Seconds an interrupted run has to stop cleanly and keep its last weights; then it is cancelled."""


class Run(RecordedRun):
    """Handle to a running training run: await it, iterate its events, pause or stop it.

    The run starts at once in its own task and does not block the cell; ``await run`` waits for its result.

    In a program, Ctrl-C and SIGTERM stop the run like :meth:`stop`, then end the program
    (:mod:`searchr1_async.boundary.signals`); a second Ctrl-C ends it at once. In a notebook, interrupting the cell stops the run
    only if the cell awaits it; a second interrupt skips the slow part.

    A program that ends without awaiting its run cancels it, says so, and exits with status 1.
    """

    def __init__(self, out_dir: Path, search: Search | None = None, choice: ServiceChoice | None = None) -> None:
        super().__init__(out_dir)
        self._search, self._choice = search, choice or ServiceChoice()
        self.control = RunControl()
        self._streams = EventStreams()
        self._task: asyncio.Future[TrainingResult] | None = None
        self._is_awaited = False
        self._at_end = ExitStack()
        self._interrupts: Interrupts | None = None

    def begin(self, work: Callable[[RunControl, EventStreams], Awaitable[TrainingResult]]) -> None:
        """Starts the work, passing it the run's control and event streams; called by :func:`train`."""
        _SDK_REQUESTS.removeFilter(_drop_record)  # in case the program survived an earlier KeyboardInterrupt
        left = f"{self.out_dir} keeps every finished step: resume=True continues from the last."
        self._interrupts = self._at_end.enter_context(ending_cleanly(self._interrupt, left))
        self._task = asyncio.ensure_future(self._cancellable(work))
        self._task.add_done_callback(self._ended)
        register(self)

    async def _cancellable(
        self, work: Callable[[RunControl, EventStreams], Awaitable[TrainingResult]]
    ) -> TrainingResult:
        assert self._interrupts is not None
        with self._interrupts.cancelling():
            return await work(self.control, self._streams)

    def _interrupt(self) -> None:
        """Ctrl-C or SIGTERM."""
        if self._task is None or self._task.done():
            return
        self.control.emit(
            Notice("interrupted: stopping the run and keeping its last weights; interrupt again to end at once")
        )
        _SDK_REQUESTS.addFilter(_drop_record)  # it logs every request that the stop cancels
        self.control.request_stop()
        asyncio.get_running_loop().call_later(INTERRUPT_SECONDS, self._task.cancel)

    def _ended(self, task: asyncio.Future[TrainingResult]) -> None:
        self._streams.wake()
        self.control.end()
        self._at_end.close()
        if self._interrupts is not None and self._interrupts.received:
            # The program is ending and nobody awaits the run.
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.warning("the run failed while it was stopping: %s: %s", type(error).__name__, error)
        elif task.cancelled() and not (self._is_awaited or self.control.stop_requested):
            _unawaited.append(self.out_dir)
            asyncio.get_running_loop().call_soon(_exit_unawaited)

    @property
    def done(self) -> bool:
        return self._task is not None and self._task.done()

    def __await__(self) -> Generator[object, None, TrainingResult]:
        # Awaiting the task directly would pass a cancellation to it and return before it has closed its services.
        return self._wait().__await__()

    async def _wait(self) -> TrainingResult:
        assert self._task is not None, "begin() comes first"
        self._is_awaited = True
        try:
            return await asyncio.shield(self._task)
        except asyncio.CancelledError:
            if not self._task.done():
                self.control.request_stop()
                # Shielded: a cancelled anyio scope cancels again on every loop iteration.
                with anyio.CancelScope(shield=True):
                    try:
                        await asyncio.wait([self._task], timeout=INTERRUPT_SECONDS)
                    finally:
                        if not self._task.done():
                            self._task.cancel()
                            await asyncio.wait([self._task])
            raise

    async def stop(self) -> TrainingResult:
        """Stops cleanly and returns the result so far; ``train(..., resume=True)`` continues from there.

        Episodes in flight are cancelled, an optimiser step at the trainer gets up to a minute to finish, and the last weights
        are kept for sampling.
        """
        self.control.request_stop()
        return await self

    def request_stop(self) -> None:
        """Like :meth:`stop`, without waiting."""
        self.control.request_stop()

    async def pause(self) -> None:
        """Pauses the run, time limits included: no new model requests until :meth:`resume`. Returns when none is in flight.

        :meth:`ask` still works.
        """
        if self.done:
            return
        self.control.pause()
        async with aclosing(aiter(self)) as events:
            async for event in events:
                if not self.control.is_paused:
                    return
                if isinstance(event, RolloutSampled) and event.is_paused and not event.sampling and not event.searching:
                    return

    async def resume(self) -> None:
        """Resumes a paused run."""
        self.control.resume()

    @property
    def _is_live(self) -> bool:
        return not self.done

    async def _ask_live(
        self, put: Callable[[LiveAnswers], Awaitable[Answer]], progress: Choice, emit: Emit | None
    ) -> Answer | None:
        """Asks the running run; None if it ends before the answer, after its services are closed."""

        async def answering(answers: LiveAnswers) -> Answer:
            watchers(Notice("the run's own service answers, beside the training"))
            return await put(answers)

        async with watching("ask", progress, emit) as watchers:
            if not self.control.is_answering:
                watchers(Notice("the run has no weights yet: waiting for its services to open"))
            answer = await self.control.ask(answering)
            if answer is None and self._task is not None:
                watchers(Notice("the run is ending: waiting to ask its last weights once its services are closed"))
                await asyncio.wait([self._task])  # two services would share a folder or a port
        return answer

    def __aiter__(self) -> AsyncGenerator[Event, None]:
        """Events from now to the run's end. If the run fails the iteration just ends; ``await run`` raises the error."""
        return self._streams.events(lambda: self.done)


_SDK_REQUESTS = logging.getLogger("tinker.lib.retry_handler")


def _drop_record(record: logging.LogRecord) -> bool:
    """A logging filter that drops everything."""
    return False


_unawaited: list[Path] = []
"""Folders of runs that were cancelled because they were never awaited, not yet reported."""


def _exit_unawaited() -> None:
    """Called by the closing event loop, which passes SystemExit on."""
    if not _unawaited or runs_under_way():  # the last run reports for all
        return
    folders = ", ".join(map(str, _unawaited))
    _unawaited.clear()
    if sys.exc_info()[0] is not None:
        return  # the program failed or was interrupted, which its user should see instead
    text = (
        f"The run in {folders} was cancelled because the program ended without awaiting it: write `result = await "
        "sr.train(...)`, or `await run` at the end. resume=True continues from its last finished step."
    )
    if threading.current_thread() is threading.main_thread() and not in_kernel():
        raise SystemExit(text)  # Python prints it; the exit status is 1
    logger.warning("%s", text)


def open_run(path: str | Path) -> RecordedRun:
    """Opens a run by its folder, running or ended, after a kernel restart or from another process.

    If this process is training the run, this returns its :class:`Run`.

    Raises:
        RunFolderError: the folder holds no run.
    """
    folder = absolute_path(path)
    run = run_under_way(folder)
    return run if isinstance(run, Run) else recorded_run(folder)
