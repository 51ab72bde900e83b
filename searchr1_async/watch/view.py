"""Live view: folds a run's events and redraws a surface a few times per second.

Runs :mod:`searchr1_async.watch.drawing` in a subprocess (see there for why).

Data for the final still picture of a run. Pure; the picture is drawn out-of-process.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

import anyio

from searchr1_async.events import EvaluationFinished, Event, RunStarted, StepFinished
from searchr1_async.watch.console import duration
from searchr1_async.watch.frame import Frame, compact, counted_steps, frame, heading, shown, summary
from searchr1_async.watch.snapshot import EvaluationState, Mark, Row, Snapshot
from searchr1_async.watch.state import RunState

_SCRIPT = Path(__file__).with_name("drawing.py")
_SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIALS")


class DrawingError(Exception):
    """Drawing failed. The view logs it and continues without; it never reaches the run."""


@dataclass(frozen=True, slots=True)
class Charts:
    """What a page needs to draw its curves."""

    page: Mapping[str, Any]
    """A Vega-Lite chart per curve."""
    picture: Mapping[str, Any]
    """One chart of all curves, for the final picture."""
    vega: bytes
    """Gzipped ES module."""


class Drawer:
    """Draws in a subprocess; Vega is bundled once and cached.

    Raises:
        DrawingError: from both methods, if the subprocess fails.
    """

    def __init__(self) -> None:
        self._vega = b""

    async def charts(self, window: int, *, from_zero: bool) -> Charts:
        """The charts of a page. Takes 2 to 5 s in the background."""
        said: list[bytes] = []

        async def specs() -> None:
            said.append(await run("charts", {"window": window, "from_zero": from_zero}))

        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(specs)
                if not self._vega:
                    self._vega = await run("vega", {})
        except* DrawingError as group:
            raise group.exceptions[0] from None
        return Charts(**json.loads(said[0]), vega=self._vega)

    async def picture(self, task: Mapping[str, Any]) -> bytes:
        """A PNG. Takes 2 to 3 s."""
        return await run("picture", task)


async def run(what: Literal["charts", "vega", "picture"], task: Mapping[str, Any]) -> bytes:
    """The subprocess's output for ``task``. Cancelling kills it."""
    if not sys.executable:
        raise DrawingError("sys.executable is empty, so the drawing process cannot be started")
    drawing = _Drawing(what, json.dumps(task).encode())
    try:
        # Own limiter: drawing must not use up the engine's worker threads.
        return await anyio.to_thread.run_sync(drawing.run, limiter=anyio.CapacityLimiter(1), abandon_on_cancel=True)
    except OSError as error:
        raise DrawingError(f"the drawing process did not start: {error}") from error
    except BaseException:
        drawing.abandon()
        raise


class _Drawing:
    """One subprocess, run from a thread: on Windows a notebook's event loop has no asyncio subprocesses."""

    def __init__(self, what: str, task: bytes) -> None:
        # -P: keeps the script's folder off sys.path, whose modules would shadow others.
        self._command = [sys.executable, "-P", str(_SCRIPT), what]
        self._what, self._task = what, task
        self._process: subprocess.Popen[bytes] | None = None
        self._is_abandoned = False

    def run(self) -> bytes:
        pipe = subprocess.PIPE
        with subprocess.Popen(
            self._command,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env=_environment(),
            start_new_session=True,  # a notebook's stop button interrupts the kernel's whole process group
        ) as process:
            self._process = process
            if self._is_abandoned:  # abandoned during startup
                process.kill()
            out, said = process.communicate(self._task)
        if process.returncode:
            last = said.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
            raise DrawingError(f"drawing {self._what} failed: {last[0]}")
        return out

    def abandon(self) -> None:
        """Kill the process; its thread then cleans up."""
        self._is_abandoned = True
        if self._process is not None:
            self._process.kill()


def _environment() -> dict[str, str]:
    """The environment without likely secrets."""
    return {name: value for name, value in os.environ.items() if not any(word in name.upper() for word in _SECRETS)}


def chart_window(steps: int) -> int:
    """Half-width in rows of the smoothing window: about a twentieth of the curve in total."""
    return min(8, max(1, round(min(steps, 500) / 40)))


def evaluation_rows(state: RunState) -> list[dict[str, Any]]:
    """Held-out evaluations that have a step, as chart rows."""
    return [
        {"step": point.step, "label": shown(point.label, 60), "exact_match": point.exact_match, "low": point.low, "high": point.high}
        for point in state.evaluations
        if point.step is not None
    ]  # fmt: skip


def picture_task(state: RunState, now: float, title: str = "") -> dict[str, Any] | None:
    """Input of :func:`searchr1_async.watch.drawing.picture_spec`; None if there is nothing to draw."""
    snapshot = state.snapshot(now)
    steps = state.steps.rows()
    if not steps and not state.evaluations:
        return None
    return {
        "title": f"{heading(snapshot, title)}: {_outcome(snapshot)}",
        "subtitle": list(_subtitle(snapshot, state.evaluations)),
        "window": chart_window(len(steps)),
        "from_zero": state.first_step == 0,
        "steps": steps,
        "evaluations": evaluation_rows(state),
        "suites": [] if steps else _suites(state.evaluations[-1]),
    }


def _outcome(snapshot: Snapshot) -> str:
    what = f"{counted_steps(snapshot)} in " if snapshot.kind == "train" else ""
    return f"{what}{duration(snapshot.seconds)}, {shown(snapshot.reason, 40)}"


def _subtitle(snapshot: Snapshot, evaluations: list[EvaluationState]) -> list[str]:
    lines: list[str] = []
    if evaluations:
        ends = evaluations[:1] if len(evaluations) == 1 else [evaluations[0], evaluations[-1]]
        texts = [f"{shown(e.label, 40)} {e.exact_match:.1%} [{e.low:.1%}, {e.high:.1%}]" for e in ends]
        lines.append(f"Held-out exact match, 95 % interval: {' → '.join(texts)}")
    if snapshot.finished_episodes:
        counts = f"{snapshot.finished_episodes:,} episodes · {compact(snapshot.used.sampled)} tokens sampled"
        lines.append(f"{counts} · cost: {shown(snapshot.cost.text, 60)}")
    return lines


def _suites(evaluation: EvaluationState) -> list[dict[str, Any]]:
    whole = {
        "suite": "all questions",
        "exact_match": evaluation.exact_match,
        "low": evaluation.low,
        "high": evaluation.high,
    }
    if len(evaluation.suites) < 2:
        return [whole]
    return [whole, *({"suite": shown(name, 40), "exact_match": share} for name, share in evaluation.suites.items())]


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
        return self._surface.has_curves and self._state.has_started and self._state.kind == "train"

    def _draw(self) -> None:
        now = self._clock()
        if not self._changed and now - self._drawn_at < _IDLE_SECONDS:
            return
        self._changed, self._drawn_at = False, now
        try:
            new = frame(self._state.snapshot(now), self._title)
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
            window = chart_window(self._state.total_steps or 100)
            charts = await self._drawer.charts(window, from_zero=self._state.first_step == 0)
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
            self._surface.close(summary(self._state.snapshot(self._clock()), self._title), png)
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
