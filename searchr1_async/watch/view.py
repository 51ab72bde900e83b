"""The live view: folds a run's events and redraws a surface a few times per second, without ever raising into the run."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import anyio

from searchr1_async.events import EvaluationFinished, Event, RunStarted, StepFinished
from searchr1_async.records.metrics import CURVES, EXACT_MATCH
from searchr1_async.watch.console import duration
from searchr1_async.watch.drawing import Charts, Drawer, DrawingError
from searchr1_async.watch.frame import Frame, compact, counted_steps, frame, heading, shown, summary
from searchr1_async.watch.progress import Mark, Row
from searchr1_async.watch.state import EvaluationState, RunState

logger = logging.getLogger(__name__)

SECONDS_TO_END = 20.0
"""Maximum wait for the final picture at the end of a run; drawing it takes 2 to 8 s."""
SECONDS_TO_STOP = 10.0
"""The same after an interrupt."""
_IDLE_SECONDS = 2.0
"""Redraw interval without events: clocks advance."""


@dataclass(frozen=True, slots=True)
class News:
    """Curve data that is new since the last draw."""

    first: int
    """Row index of ``rows[0]``; the page replaces its rows from there on."""
    rows: list[Row]
    evaluations: list[dict[str, Any]]
    """All evaluations."""


class Surface(Protocol):
    """Where a view is drawn. Called on the event loop's thread; ``draw`` must return within milliseconds."""

    seconds_between: float
    """Minimum seconds between two redraws."""
    has_curves: bool
    """Whether it shows charts and takes news."""

    def draw(self, frame: Frame, news: News | None) -> None: ...
    def add_charts(self, charts: Charts | None) -> None:
        """None: charts are unavailable."""
        ...

    def close(self, text: str, png: bytes | None) -> None:
        """Replace the live view with its final state."""


class Controls(Protocol):
    """Actions behind a view's buttons."""

    async def pause(self) -> None: ...
    async def resume(self) -> None: ...
    def request_stop(self) -> None: ...


class LiveView:
    """Shows a run on a surface.

    Subscribe it, and keep it open with ``async with`` while the run lasts; at the end the surface keeps a still picture. Nothing
    here raises into the run: failures are logged once and skipped.

    Args:
        surface: is drawn on immediately.
        title: shown until kind and model of the work are known.
        controls: of the run, for :meth:`press`; None without buttons.
        drawer: draws charts and pictures.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        surface: Surface,
        *,
        title: str = "",
        controls: Controls | None = None,
        drawer: Drawer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._surface, self._title, self._controls = surface, title, controls
        self._drawer = drawer or _DRAWER
        self._clock = clock
        self._state = RunState()
        self._past: Sequence[StepFinished | EvaluationFinished] = ()
        self._changed = True
        self._drawn_at = -_IDLE_SECONDS
        self._frame: Frame | None = None
        self._mark, self._seen = Mark(), (0, 0)
        self._charts: Charts | None = None
        self._has_asked_for_charts = False
        self._has_logged_failure = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._draw()

    def begin_with(self, past: Sequence[StepFinished | EvaluationFinished]) -> None:
        """Steps and evaluations of earlier sessions; shown up to the step from which this session resumes."""
        self._past = past

    def __call__(self, event: Event) -> None:
        """Fold in ``event``; drawing happens later."""
        self._state.see(event, self._clock())
        self._changed = True
        if isinstance(event, RunStarted):
            for earlier in self._past:
                if (earlier.step or 0) <= event.step:
                    self._state.see(earlier, self._clock())
            self._past = ()

    async def __aenter__(self) -> LiveView:
        self._loop = asyncio.get_running_loop()
        self._start(self._redraw())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop = None
        self._state.end(_reason(error), self._clock())
        self._changed = True
        png: bytes | None = None
        try:
            with anyio.CancelScope(shield=True):
                await self._stop_tasks()
                self._draw()
                with anyio.move_on_after(SECONDS_TO_END if error is None else SECONDS_TO_STOP):
                    png = await self._picture()
        except Exception:
            self._log_failure("the picture of the run's end")
        finally:
            self._close(png)

    def press(self, button: str) -> None:
        """Handle a button: ``pause``, ``resume`` or ``stop``; ``hello`` requests all data again. Thread-safe."""
        loop = self._loop
        if loop is None:
            return
        try:
            loop.call_soon_threadsafe(self._pressed, button)
        except RuntimeError:  # the loop has just been closed
            logger.debug("%s was pressed after the run's end", button)

    def _pressed(self, button: str) -> None:
        controls = self._controls
        if self._loop is None:
            return
        if button == "hello":
            self._mark, self._seen, self._changed = Mark(), (0, 0), True
            if self._charts is not None:
                self._surface.add_charts(self._charts)
        elif controls is not None and button == "pause":
            self._start(self._run_control(controls.pause, button))
        elif controls is not None and button == "resume":
            self._start(self._run_control(controls.resume, button))
        elif controls is not None and button == "stop":
            controls.request_stop()

    async def _run_control(self, what: Callable[[], Coroutine[Any, Any, None]], button: str) -> None:
        try:
            await what()
        except Exception:
            logger.warning("the %s button failed; the run continues", button, exc_info=True)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        # Plain asyncio tasks: a task group would wrap the run and cancel it on failure.
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _stop_tasks(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _redraw(self) -> None:
        while True:
            self._draw()
            if self._wants_charts() and not self._has_asked_for_charts:
                self._has_asked_for_charts = True
                self._start(self._add_charts())
            await asyncio.sleep(self._surface.seconds_between)

    def _wants_charts(self) -> bool:
        return self._surface.has_curves and self._state.has_started and self._state.run.kind == "train"

    def _draw(self) -> None:
        now = self._clock()
        if not self._changed and now - self._drawn_at < _IDLE_SECONDS:
            return
        self._changed, self._drawn_at = False, now
        try:
            new = frame(self._state, now, self._title)
            news = self._news()
            if new != self._frame or news is not None:
                self._frame = new
                self._surface.draw(new, news)
        except Exception:
            self._log_failure("the live view")

    def _news(self) -> News | None:
        state = self._state
        seen = (state.steps.added, state.evaluated)
        if not self._surface.has_curves or seen == self._seen:
            return None
        self._seen = seen
        first, rows, self._mark = state.steps.since(self._mark)
        return News(first, rows, evaluation_rows(state))

    async def _add_charts(self) -> None:
        try:
            window = chart_window(self._state.run.total_steps or 100)
            charts = await self._drawer.charts(window, curve_table(), from_zero=self._state.run.step == 0)
            self._charts = charts
            self._surface.add_charts(charts)
        except DrawingError as error:
            logger.warning("the live view continues without curves: %s", error)
            self._surface.add_charts(None)
        except Exception:
            self._log_failure("the live view's curves")

    async def _picture(self) -> bytes | None:
        task = picture_task(self._state, self._clock(), self._title)
        if task is None:
            return None
        try:
            if self._charts is not None and task["steps"]:
                task["spec"] = self._charts.picture
            return await self._drawer.picture(task)
        except DrawingError as error:
            logger.warning("the run's final picture is missing: %s", error)
            return None

    def _close(self, png: bytes | None) -> None:
        try:
            self._surface.close(summary(self._state, self._clock(), self._title), png)
        except Exception:
            self._log_failure("the end of the live view")

    def _log_failure(self, what: str) -> None:
        if not self._has_logged_failure:
            self._has_logged_failure = True
            logger.warning("%s could not be drawn; the run continues", what, exc_info=True)


_DRAWER = Drawer()
"""Shared by all views of the process, so that Vega is bundled once. Not tied to an event loop."""


def _reason(error: BaseException | None) -> str:
    if error is None:
        return "finished"
    return "stopped" if isinstance(error, asyncio.CancelledError | KeyboardInterrupt) else "failed"


def chart_window(steps: int) -> int:
    """Half-width in rows of the smoothing window: about a twentieth of the curve in total."""
    return min(8, max(1, round(min(steps, 500) / 40)))


def evaluation_rows(state: RunState) -> list[dict[str, Any]]:
    """Held-out evaluations that have a step, as chart rows."""
    return [
        {"step": point.step, "label": shown(point.label, 60), "mean": point.mean, "low": point.low, "high": point.high}
        for point in state.evaluations
        if point.step is not None
    ]  # fmt: skip


def curve_table() -> list[dict[str, Any]]:
    """What a page and the drawing process need of the curves' metrics."""
    return [
        {"name": curve.name, "heading": curve.heading.capitalize(), "form": curve.form, "is_share": curve.is_share,
         "low": curve.low, "high": curve.high, "is_evaluated": curve is EXACT_MATCH}
        for curve in CURVES
    ]  # fmt: skip


def picture_task(state: RunState, now: float, title: str = "") -> dict[str, Any] | None:
    """Input of :func:`searchr1_async.watch.drawing.picture_spec`; None if there is nothing to draw."""
    steps = state.steps.rows()
    if not steps and not state.evaluations:
        return None
    return {
        "title": f"{heading(state, title)}: {_outcome(state, now)}",
        "subtitle": _subtitle(state),
        "curves": curve_table(),
        "window": chart_window(len(steps)),
        "from_zero": state.run.step == 0,
        "steps": steps,
        "evaluations": evaluation_rows(state),
        "suites": [] if steps else _suites(state.evaluations[-1]),
    }


def _outcome(state: RunState, now: float) -> str:
    what = f"{counted_steps(state)} in " if state.run.kind == "train" else ""
    return f"{what}{duration(state.seconds(now))}, {shown(state.reason, 40)}"


def _subtitle(state: RunState) -> list[str]:
    lines: list[str] = []
    if evaluations := state.evaluations:
        ends = evaluations[:1] if len(evaluations) == 1 else [evaluations[0], evaluations[-1]]
        texts = [f"{shown(e.label, 40)} {e.mean:.1%} [{e.low:.1%}, {e.high:.1%}]" for e in ends]
        lines.append(f"Held-out exact match, 95 % interval: {' → '.join(texts)}")
    if state.finished_episodes:
        counts = f"{state.finished_episodes:,} episodes · {compact(state.used.sampled)} tokens sampled"
        lines.append(f"{counts} · cost: {shown(state.cost.text, 60)}")
    return lines


def _suites(evaluation: EvaluationState) -> list[dict[str, Any]]:
    whole = {"suite": "all questions", "mean": evaluation.mean, "low": evaluation.low, "high": evaluation.high}
    if len(evaluation.suites) < 2:
        return [whole]
    return [whole, *({"suite": shown(name, 40), "mean": share} for name, share in evaluation.suites.items())]
