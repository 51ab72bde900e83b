"""The live view of a notebook: folds a run's events and redraws a widget a few times per second, without ever raising into the run.

At the end, the output becomes what every viewer of a saved notebook can show.
"""

from __future__ import annotations

import asyncio
import base64
import html
import logging
import os
import pickle
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import anyio

from searchr1_async.events import EvaluationFinished, Event, RunStarted, StepFinished
from searchr1_async.watch.charts import last_picture, page_charts
from searchr1_async.watch.frame import frame, outcome, running_row, summary
from searchr1_async.watch.markup import asset, template
from searchr1_async.watch.state import ALL_SUITES, RunState

logger = logging.getLogger(__name__)

SECONDS_BETWEEN = 1 / 3
"""Between two redraws."""
SECONDS_TO_END = 15.0
"""Maximum wait for the final picture at the end of a run; drawing it takes 2 to 8 s."""
MOST_ROWS = 1000
"""Steps that a page gets, evenly spaced."""
_SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")
"""Words in the names of environment variables that the drawing process does not get."""
_PARTS = ("head", "bars", "alerts", "stacks", "sections")

Drawing = Callable[..., Awaitable[Any]]
"""Awaits the result of a function and its arguments."""


async def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, from a process of its own: vl-convert holds the GIL throughout, so a picture would block the event loop
    for 2 s even from a thread. Cancelling kills the process.

    Raises:
        RuntimeError: the function failed; the message is its last line of output.
    """
    # The process imports what this one would, however it found this package.
    path = [entry for entry in sys.path if isinstance(entry, str)]
    code = (
        f"import pickle, sys; sys.path[:] = {path!r}; function, arguments = pickle.load(sys.stdin.buffer); "
        "sys.stdout.buffer.write(pickle.dumps(function(*arguments)))"
    )
    done = await anyio.run_process(
        [sys.executable, "-P", "-c", code],
        input=pickle.dumps((function, arguments)),
        check=False,
        env={name: value for name, value in os.environ.items() if not any(word in name.upper() for word in _SECRETS)},
        start_new_session=True,  # a notebook's stop button interrupts the kernel's whole process group
    )
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise RuntimeError(last[0])
    return pickle.loads(done.stdout)


@cache
def widget_class() -> type[Any]:
    """The widget class, created lazily so that the package works without anywidget.

    Raises:
        ImportError: anywidget is not installed.
    """
    import anywidget
    import traitlets

    class LiveViewWidget(anywidget.AnyWidget):
        _esm = asset("live.js")
        _css = asset("live.css")
        # Each part on its own: only what changed is sent.
        head = traitlets.Unicode().tag(sync=True)
        bars = traitlets.Unicode().tag(sync=True)
        alerts = traitlets.Unicode().tag(sync=True)
        stacks = traitlets.Unicode().tag(sync=True)
        sections = traitlets.Unicode().tag(sync=True)
        steps = traitlets.List().tag(sync=True)
        evaluations = traitlets.List().tag(sync=True)
        running = traitlets.List().tag(sync=True)
        spec = traitlets.Dict().tag(sync=True)
        vega = traitlets.Bytes().tag(sync=True)

    return LiveViewWidget


class WidgetSurface:
    """A widget in the output of the current cell. Its traits are what is shown, so a reopened page shows the same.

    Args:
        title: shown to readers without the widget.
    """

    def __init__(self, title: str) -> None:
        from IPython.display import display

        self._widget = widget_class()()
        data, metadata = self._widget._repr_mimebundle_()
        # Fallback for viewers without widgets and for notebooks whose kernel was killed.
        data["text/plain"] = f"{title}: live view, shown only in a notebook with widgets."
        data["text/html"] = f"<p>{html.escape(data['text/plain'])}</p>"
        # The output stays with its cell even when later cells run.
        self._output: Any = display(data, metadata=metadata, raw=True, display_id=True)

    def draw(self, shown: Mapping[str, Any], rows: Mapping[str, list[Any]]) -> None:
        """Show a frame, and the curves' ``steps``, ``evaluations`` and ``running`` rows; what is as before is not sent again."""
        macros = template("live.html").module
        parts = {name: str(getattr(macros, name)(shown)) for name in _PARTS}
        with self._widget.hold_sync():  # one message
            for name, own in {**parts, **rows}.items():
                setattr(self._widget, name, own)

    def add_charts(self, spec: Mapping[str, Any], vega: bytes) -> None:
        self._widget.spec, self._widget.vega = dict(spec), vega

    def close(self, text: str, png: bytes | None) -> None:
        """Replace the widget with its final state: the picture with ``text`` as its alternative, or ``text`` alone."""
        # No HTML: GitHub would prefer it to the picture and strip its styles.
        data: dict[str, Any] = {"text/plain": text}
        metadata: dict[str, Any] = {}
        if png is not None:
            data["image/png"] = base64.b64encode(png).decode()
            # The picture is drawn at 2x for high-density screens.
            metadata["image/png"] = {"width": int.from_bytes(png[16:20], "big") // 2, "alt": text}
        self._output.update(data, metadata=metadata, raw=True)
        self._widget.close()


class LiveView:
    """Shows a run on a surface.

    Subscribe it, and keep it open with ``async with`` while the run lasts; at the end the surface keeps a still picture. Nothing
    here raises into the run: the first failure is logged, and what could not be drawn is missing.

    Args:
        surface: is drawn on immediately.
        title: shown until kind and model of the work are known.
        drawing: calls what draws charts and pictures.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        surface: WidgetSurface,
        *,
        title: str = "",
        drawing: Drawing = in_process,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._surface, self._title, self._drawing, self._clock = surface, title, drawing, clock
        self._state = RunState()
        self._past: Sequence[StepFinished | EvaluationFinished] = ()
        self._has_logged_failure = False
        self._tasks: list[asyncio.Task[None]] = []
        self._draw()

    def begin_with(self, past: Callable[[], Sequence[StepFinished | EvaluationFinished]]) -> None:
        """Show the steps and evaluations of earlier sessions, up to the step from which this one resumes. ``past`` reads files:
        call this in a worker thread."""
        with self._skipping_failures("the run's history"):  # the run itself reports unreadable files
            self._past = past()

    def __call__(self, event: Event) -> None:
        """Fold in ``event``; drawing happens later."""
        self._state.see(event, self._clock())
        if isinstance(event, RunStarted):
            for earlier in self._past:
                if (earlier.step or 0) <= event.step:
                    self._state.see(earlier, self._clock())
            self._past = ()
            if event.kind == "train":
                self._start(self._add_charts(event))

    async def __aenter__(self) -> LiveView:
        self._start(self._redraw())
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._state.end(_reason(error), self._clock())
        png: bytes | None = None
        try:
            with anyio.CancelScope(shield=True):
                for task in self._tasks:
                    task.cancel()
                await asyncio.wait(self._tasks)
                self._draw()
                with anyio.move_on_after(SECONDS_TO_END):
                    png = await self._picture()
        finally:
            with self._skipping_failures("the end of the live view"):
                self._surface.close(summary(self._state, self._clock(), self._title), png)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        # Plain asyncio tasks: a task group would wrap the run and cancel it on failure.
        self._tasks.append(asyncio.get_running_loop().create_task(work))

    async def _redraw(self) -> None:
        while True:
            self._draw()
            await asyncio.sleep(SECONDS_BETWEEN)

    def _draw(self) -> None:
        state, now = self._state, self._clock()
        with self._skipping_failures("the live view"):
            running = running_row(state)
            rows = {
                "steps": state.steps[:: 1 + len(state.steps) // MOST_ROWS],
                "evaluations": [
                    row for row in state.evaluations if row["suite"] == ALL_SUITES and row["step"] is not None
                ],
                "running": [] if running is None else [running],
            }
            self._surface.draw(frame(state, now, self._title), rows)

    async def _add_charts(self, run: RunStarted) -> None:
        with self._skipping_failures("the live view's curves"):
            self._surface.add_charts(*await self._drawing(page_charts, run.total_steps or 100))

    async def _picture(self) -> bytes | None:
        state = self._state
        if state.steps or state.evaluations:
            with self._skipping_failures("the picture of the run's end"):
                title, *rest = outcome(state, self._clock(), self._title)
                return await self._drawing(last_picture, title.removesuffix("."), rest, state.steps, state.evaluations)
        return None

    @contextmanager
    def _skipping_failures(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception:
            if not self._has_logged_failure:
                self._has_logged_failure = True
                logger.warning("%s could not be drawn; the run continues", what, exc_info=True)


def _reason(error: BaseException | None) -> str:
    if error is None:
        return "finished"
    return "stopped" if isinstance(error, asyncio.CancelledError | KeyboardInterrupt) else "failed"
