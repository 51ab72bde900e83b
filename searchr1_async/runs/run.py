"""The handles of a run: of one that this process trains (:class:`Run`), and of any, by its folder (:class:`RecordedRun`)."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import ExitStack, aclosing
from functools import cached_property
from pathlib import Path
from typing import Any

import anyio
import polars as pl
import tinker

from searchr1_async.boundary.paths import absolute_path, shown_path
from searchr1_async.boundary.settings import checked_arguments
from searchr1_async.boundary.signals import Interrupts, ending_cleanly
from searchr1_async.config import AskConfig, TrainConfig
from searchr1_async.episodes.types import Episode
from searchr1_async.errors import ConfigurationError, RunFolderError
from searchr1_async.events import Emit, Event, EventStreams, Notice, RolloutSampled
from searchr1_async.records.run_records import RunRecords
from searchr1_async.runs.ask import Answer, LiveAnswers, ask, asked_question
from searchr1_async.runs.control import RunControl, register, run_under_way
from searchr1_async.runs.export import export
from searchr1_async.runs.folder import CONFIG_FILE, TrainingResult, is_claimed, result_of
from searchr1_async.runs.resume import KeptCheckpoint, ResumePoint, best_checkpoint, kept_checkpoints
from searchr1_async.runs.rollouts import ServiceChoice, watching
from searchr1_async.runs.weights import Step, find_weights
from searchr1_async.search.search import Search
from searchr1_async.service.connection import ServiceName
from searchr1_async.trackers.tracker import EVENTS_FILE, end_reason
from searchr1_async.watch.episode_parts import remember_tokenizer
from searchr1_async.watch.episodes_page import CellView, load_tokenizer, view_run
from searchr1_async.watch.views import Choice

logger = logging.getLogger(__name__)

INTERRUPT_SECONDS = 90.0
"""Seconds an interrupted run has to stop cleanly and keep its last weights; then it is cancelled."""
CELL_EPISODES = 200
"""Episodes in a notebook's inline viewer, all of which its file embeds."""
_SDK_REQUESTS = logging.getLogger("tinker.lib.retry_handler")


class RecordedRun:
    """A run, read from its folder. Every call reads the files again, so it also follows a run in another process."""

    def __init__(self, out_dir: str | Path) -> None:
        self._out_dir = absolute_path(out_dir, "out_dir")
        self._search: Search | None = None
        self._choice = ServiceChoice()

    @property
    def _point(self) -> ResumePoint | None:
        return ResumePoint.load(self._out_dir)

    @property
    def _records(self) -> RunRecords:
        return RunRecords(self._out_dir)

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self._out_dir)  # takes about a second

    @property
    def out_dir(self) -> Path:
        """The run's folder: settings, resume point, records, the embedded service's checkpoints."""
        return self._out_dir

    @property
    def done(self) -> bool:
        """No process is training in the folder."""
        return not is_claimed(self._out_dir)

    @property
    def step(self) -> int:
        """Optimizer steps finished."""
        return point.step if (point := self._point) else 0

    @property
    def settings(self) -> dict[str, Any]:
        """The run's settings as plain JSON values; empty before its first resume point."""
        return dict(point.settings) if (point := self._point) else {}

    @property
    def config(self) -> TrainConfig:
        """The settings of the run's last session, as given and chosen. Raises ConfigurationError if the folder has none."""
        return TrainConfig.load(self._out_dir / CONFIG_FILE)

    @property
    def result(self) -> TrainingResult:
        """The result so far. Its ``reason`` is ``"running"``, or why the last session ended (``"failed"`` included), or ``"ended"`` if
        its log does not say, as after a kill."""
        reason = end_reason(self._out_dir / EVENTS_FILE) or "ended" if self.done else "running"
        return result_of(self._out_dir, self._point, reason)

    @property
    def checkpoints(self) -> tuple[KeptCheckpoint, ...]:
        """Weights kept for sampling, by step, with their scores on the held-out questions."""
        return kept_checkpoints(self._out_dir)

    @property
    def best(self) -> KeptCheckpoint | None:
        """The kept weights with the highest exact match on the held-out questions; None before the first evaluation.

        They are selected on those questions, which biases their score upwards: report them on other questions.
        """
        return best_checkpoint(self._out_dir)

    @property
    def metrics(self) -> pl.DataFrame:
        """One row per finished step, with the recipe's metric names as columns."""
        return self._records.metrics()

    def episodes(self) -> pl.LazyFrame:
        """One row per episode of all finished steps, scanned from the run's Parquet files."""
        return self._records.episodes()

    def groups(self) -> pl.LazyFrame:
        """One row per group of all finished steps: trained on, or why dropped; which weights sampled it."""
        return self._records.groups()

    def evaluations(self) -> pl.LazyFrame:
        """One row per episode of all evaluations on the held-out questions; ``label`` names the evaluation."""
        return self._records.evaluations()

    def episode(self, step: int, group: int = 0, member: int = 0) -> Episode:
        """One training episode, token by token, with rich display in a notebook.

        Args:
            step: optimizer step, from 1.
            group: number of the group in its step.
            member: number of the episode in its group, as in :meth:`episodes`.

        Raises:
            ConfigurationError: there is none.
        """
        found = self._records.load_episode(step, group, member)
        if found is None:
            raise ConfigurationError(f"step {step} has no episode {member} of group {group}: run.episodes() lists all")
        if self._tokenizer is not None:
            remember_tokenizer(self._tokenizer)
        return found

    async def ask(
        self,
        question: str,
        search: Search | None = None,
        config: AskConfig | None = None,
        *,
        step: Step = "last",
        service: str | tinker.ServiceClient | None = None,
        progress: Choice = "quiet",
        on_event: Emit | None = None,
    ) -> Answer:
        """Asks the trained model one question, with the prompt, format and limits of training; see :func:`searchr1_async.ask`.

        A run of this process, paused or not, answers with its own service beside the training: for ``step="last"`` with its newest
        weights. Its records, episodes and limits stay as they are. If the run ends first, its last kept weights are asked.

        Args:
            search: the tool; None: the run's own.
            step: which kept weights: ``"last"``, ``"best"``, or a step's number (see :attr:`checkpoints`).
            config, service: model, service and its options are only for an ended run; None: the run's own, if this is its handle.
        """
        checked_arguments(RecordedRun.ask, locals())
        asked = asked_question(question)
        settings = config or AskConfig()

        async def put(answers: LiveAnswers) -> Answer:
            return await answers.answer(
                asked,
                settings.sampling,
                search=search,
                changes=settings.episode,
                weights=None if step == "last" else find_weights(self._out_dir, step),
            )

        if (run := run_under_way(self._out_dir)) is not None:
            _refuse_other_service(settings, service)
            async with watching("ask", progress, on_event) as watchers:
                watchers(Notice("the run's own service answers beside the training, once the run has weights"))
                if (answer := await run.control.answers.use(put)) is not None:
                    return answer
                await run.control.answers.wait_ended()  # two services would share a folder or a port
        if settings.local == AskConfig().local:
            settings = settings.replace(local=self._choice.local)
        return await ask(
            question,
            search or self._search,
            settings.replace(tokenizer=settings.model.tokenizer or self._choice.tokenizer),
            checkpoint=self._out_dir,
            step=step,
            service=service or self._choice.service,
            progress=progress,
            on_event=on_event,
        )

    def plot(self, kind: str = "learning", **options: Any) -> Any:
        """A chart of the run as an Altair object: modify it, or ``.save("chart.png")`` (or ``.svg``).

        Args:
            kind: ``"learning"``, ``"reward"``, ``"exact_match"``, ``"turns"``, ``"valid_calls"``, ``"timeline"`` (who waited for
                what in a step), ``"reward_by_turns"``, ``"suites"``, or the name of any metric.
            options: ``step`` of a timeline.

        Raises:
            ConfigurationError: an unknown kind.
        """
        from searchr1_async.watch.charts import draw

        return draw(self._out_dir, kind, **options)

    def view(self, path: str | Path | None = None, **options: Any) -> Path | CellView:
        """The episode viewer: filter, sort, read and compare the run's episodes.

        Args:
            path: writes one self-contained HTML page there and returns its path. None: shows 200 episodes in the notebook cell.
            options: ``steps``, ``labels`` and ``limit`` select the episodes. Raises RunFolderError if there are none.
        """
        if path is not None:
            return view_run(self._out_dir, path, **options)
        with tempfile.TemporaryDirectory(prefix="searchr1-view-") as scratch:
            options.setdefault("limit", CELL_EPISODES)
            page = view_run(self._out_dir, Path(scratch) / "view.html", **options)
            return CellView(page.read_text(encoding="utf-8"))

    async def export(self, folder: str | Path, **options: Any) -> Path:
        """Exports the run's weights into a folder; the options and errors are those of :func:`searchr1_async.export`."""
        return await export(self, folder, **options)

    def __repr__(self) -> str:
        state = "ended" if self.done else "running"
        return f"{type(self).__name__}({shown_path(self._out_dir)!r}, {self.step} steps, {state})"


def _refuse_other_service(config: AskConfig, service: ServiceName) -> None:
    """Refuses what a running run cannot change: it answers with its own service and prompt."""
    prompt: dict[str, Any] = dict.fromkeys(("format", "renderer", "thinking", "instructions", "model", "tokenizer"))
    if service is not None or config != config.replace(**prompt, local=AskConfig().local):
        raise ConfigurationError(
            "service, local, tokenizer, model and prompt are only for an ended run: this one answers with its own service"
        )


class Run(RecordedRun):
    """Handle to a running training run: await it, iterate its events, pause or stop it.

    The run starts at once in its own task and does not block the cell; ``await run`` waits for its result.

    In a program, Ctrl-C and SIGTERM stop the run like :meth:`stop`, then end the program
    (:mod:`searchr1_async.boundary.signals`); a second Ctrl-C ends it at once. In a notebook, interrupting the cell stops the run
    only if the cell awaits it; a second interrupt skips the slow part.

    A program that ends without awaiting its run cancels it, with a warning.
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
        _SDK_REQUESTS.disabled = False  # in case the program survived an earlier KeyboardInterrupt
        left = f"{self.out_dir} keeps every finished step: resume=True continues from the last."
        interrupts = self._interrupts = self._at_end.enter_context(ending_cleanly(self._interrupt, left))

        async def cancellable() -> TrainingResult:
            with interrupts.cancelling():
                return await work(self.control, self._streams)

        self._task = asyncio.ensure_future(cancellable())
        self._task.add_done_callback(self._ended)
        register(self.out_dir, self)

    def _interrupt(self) -> None:
        """Ctrl-C or SIGTERM."""
        if self._task is None or self._task.done():
            return
        self.control.emit(
            Notice("interrupted: stopping the run and keeping its last weights; interrupt again to end at once")
        )
        _SDK_REQUESTS.disabled = True  # it logs every request that the stop cancels
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
            logger.warning(
                "the run in %s was cancelled because the program ended without awaiting it: write `result = await sr.train(...)`. "
                "resume=True continues from its last finished step",
                self.out_dir,
            )

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
        """Stops cleanly, keeps the last weights, and returns the result so far; ``train(..., resume=True)`` continues from there.

        Episodes in flight are cancelled; an optimizer step at the trainer gets up to a minute to finish.
        """
        self.control.request_stop()
        return await self

    def request_stop(self) -> None:
        """Like :meth:`stop`, without waiting."""
        self.control.request_stop()

    async def pause(self) -> None:
        """Pauses the run, time limits included, until :meth:`resume`. Returns when no request is in flight; :meth:`ask` works."""
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

    def __aiter__(self) -> AsyncGenerator[Event, None]:
        """Events from now to the run's end. If the run fails the iteration just ends; ``await run`` raises the error."""
        return self._streams.events(lambda: self.done)


def open_run(path: str | Path) -> RecordedRun:
    """Opens a run by its folder, running or ended, after a kernel restart or from another process.

    If this process is training the run, this returns its :class:`Run`.

    Raises:
        RunFolderError: the folder holds no run.
    """
    folder = absolute_path(path)
    run = run_under_way(folder)
    if isinstance(run, Run):
        return run
    if ResumePoint.load(folder) is None and not is_claimed(folder) and not (folder / EVENTS_FILE).exists():
        raise RunFolderError(f"{folder} holds no run: pass the out_dir of a run")
    return RecordedRun(folder)
