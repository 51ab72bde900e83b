"""Selects the view of a run that fits the environment: widget, rich text, live terminal display, or plain lines.

Holds the two views of a notebook: an output that is updated during the run and finally replaced by what every viewer of a saved
notebook can show. The others are in :mod:`searchr1_async.watch.console`.
"""

from __future__ import annotations

import base64
import html
import importlib.util
import logging
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self, get_args

from searchr1_async.boundary.signals import in_kernel
from searchr1_async.errors import ConfigurationError
from searchr1_async.events import EvaluationFinished, Event, StepFinished
from searchr1_async.records.metrics import CURVES
from searchr1_async.watch.console import ConsoleView, QuietView
from searchr1_async.watch.drawing import Charts
from searchr1_async.watch.frame import Frame
from searchr1_async.watch.view import Controls, LiveView, News, curve_table
from searchr1_async.watch.viewer.markup import visible

__all__ = ["Choice", "Controls", "SafeView", "View", "console_view", "open_view"]

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_BUTTONS = ("pause", "resume", "stop", "hello")
_Named = Literal["auto", "widget", "rich", "terminal", "plain", "quiet"]
Choice = bool | _Named
"""``True`` and ``"auto"`` pick what fits, ``False`` shows nothing, other names select one kind. ``"quiet"`` stays silent for work
under :data:`searchr1_async.watch.console.QUIET_SECONDS` and prints plain lines for longer work."""


class Output:
    """Displays ``data`` (by MIME type) in the current cell.

    Needs IPython. The output stays with that cell even when later cells run.
    """

    def __init__(self, data: dict[str, Any], metadata: dict[str, Any] | None = None) -> None:
        from IPython.display import publish_display_data

        self._publish = publish_display_data
        self._id = f"searchr1-{uuid.uuid4().hex}"
        self._publish(data, metadata or {}, transient={"display_id": self._id})

    def update(self, data: dict[str, Any], metadata: dict[str, Any] | None = None) -> None:
        """Replace the displayed data."""
        self._publish(data, metadata or {}, transient={"display_id": self._id}, update=True)

    def settle(self, text: str, png: bytes | None) -> None:
        """Replace the output with its final state: the picture with ``text`` as its alternative, or ``text`` alone.

        No HTML: GitHub would prefer it to the picture and strip its styles.
        """
        if png is None:
            self.update({"text/plain": text})
            return
        # The picture is drawn at 2x for high-density screens.
        width = int.from_bytes(png[16:20], "big") // 2
        self.update(
            {"image/png": base64.b64encode(png).decode(), "text/plain": text},
            {"image/png": {"width": width, "alt": text}} if width else {},
        )


@cache
def widget_class() -> type[Any]:
    """The widget class, created lazily so that the package works without anywidget.

    Raises:
        ImportError: anywidget is not installed.
    """
    import anywidget
    import traitlets

    class LiveViewWidget(anywidget.AnyWidget):
        _esm = (_FOLDER / "live.js").read_text(encoding="utf-8")
        _css = (_FOLDER / "live.css").read_text(encoding="utf-8")
        frame = traitlets.Dict().tag(sync=True)
        curves = traitlets.List().tag(sync=True)
        has_controls = traitlets.Bool(False).tag(sync=True)

    return LiveViewWidget


class WidgetSurface:
    """A widget in the output of the current cell.

    The frame is a trait, so a reopened page has the latest one. Rows and charts are messages, so only new data is sent and none is
    saved with the notebook. A page that lacks data sends ``hello``.

    Args:
        title: shown to readers without the widget.
        has_controls: show buttons.
    """

    seconds_between = 0.25
    has_curves = True

    def __init__(self, title: str, *, has_controls: bool) -> None:
        self._widget = widget_class()(curves=curve_table(), has_controls=has_controls)
        self._pressed: Callable[[str], None] | None = None
        self._widget.on_msg(self._received)
        data, metadata = self._widget._repr_mimebundle_()
        # Fallback for viewers without widgets and for notebooks whose kernel was killed.
        data["text/plain"] = f"{title}: live view, shown only in a notebook with widgets."
        data["text/html"] = f"<p>{html.escape(data['text/plain'])}</p>"
        self._output = Output(data, metadata)

    def on_press(self, pressed: Callable[[str], None]) -> None:
        """Set the callback for buttons; it may run in another thread."""
        self._pressed = pressed

    def draw(self, frame: Frame, news: News | None) -> None:
        if news is not None:
            rows = {"kind": "rows", "first": news.first, "rows": news.rows, "evaluations": news.evaluations}
            self._widget.send(rows)
        self._widget.frame = dict(frame)

    def add_charts(self, charts: Charts | None) -> None:
        if charts is None:
            self._widget.send({"kind": "no charts"})
        else:
            self._widget.send({"kind": "charts", "specs": dict(charts.page)}, buffers=[charts.vega])

    def close(self, text: str, png: bytes | None) -> None:
        self._output.settle(text, png)
        self._widget.close()

    def _received(self, widget: Any, content: object, buffers: object) -> None:
        button = content.get("press") if isinstance(content, dict) else None
        if self._pressed is not None and button in _BUTTONS:
            self._pressed(button)


class RichTextSurface:
    """Draws on the output of the current cell, at most once per second because each update sends everything."""

    seconds_between = 1.0
    has_curves = False

    def __init__(self, title: str) -> None:
        self._output = Output({"text/plain": title})

    def draw(self, frame: Frame, news: News | None) -> None:
        self._output.update({"text/html": as_html(frame), "text/plain": as_text(frame)})

    def add_charts(self, charts: Charts | None) -> None:
        raise NotImplementedError("rich text has no curves")

    def close(self, text: str, png: bytes | None) -> None:
        self._output.settle(text, png)


def as_text(frame: Frame) -> str:
    """The frame as plain lines."""
    lines = [
        f"{frame['title']} ({frame['badge']})",
        " · ".join(part for part in (frame["progress"], frame["status"]) if part),
    ]
    lines += [f"{bar['name']}: {bar['text']}" for bar in frame["bars"]]
    lines += [f"{alert['kind']}: {alert['text']}" for alert in frame["alerts"]]
    lines += [f"{curve.heading}: {text}" for curve in CURVES if (text := frame["curves"].get(curve.name))]
    for stack in frame["stacks"]:
        lines.append(f"{stack['title']}: " + ", ".join(f"{part['count']:,} {part['name']}" for part in stack["parts"]))
    for section in frame["sections"]:
        lines.append(f"{section['title']}: " + ", ".join(f"{label} {value}" for label, value in section["rows"]))
    return "\n".join(lines)


def as_html(frame: Frame) -> str:
    """The same lines as HTML. All text is escaped."""
    title, *lines = map(visible, as_text(frame).splitlines())
    rows = "".join(f"<p style='margin:0'>{line}</p>" for line in (f"<b>{title}</b>", *lines))
    return f"<div style='font-size:var(--jp-ui-font-size1,13px)'>{rows}</div>"


class View(Protocol):
    """Shows a run: subscribe it, and keep it open while the run lasts."""

    def __call__(self, event: Event) -> None: ...
    async def __aenter__(self) -> Self: ...
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class SafeView:
    """Wraps a view so that its failures never affect the run: an exception from opening, drawing or closing it is logged in one
    line and the view is dropped.

    Args:
        make: creates the view; may fail (closed stream, disconnected kernel).

    Raises:
        ConfigurationError: from ``make``, if the requested view is unavailable here.
    """

    def __init__(self, make: Callable[[], View]) -> None:
        self._view: View | None = None
        try:
            self._view = make()
        except ConfigurationError:
            raise
        except Exception as error:
            self._give_up("opened", error)

    @property
    def view(self) -> View | None:
        """The wrapped view; None once it has failed."""
        return self._view

    def begin_with(self, past: Callable[[], Sequence[StepFinished | EvaluationFinished]]) -> None:
        """Show the steps and evaluations of earlier sessions. ``past`` reads files: call this in a worker thread."""
        if isinstance(self._view, LiveView):  # a console printed its lines at the time
            try:
                self._view.begin_with(past())
            except Exception as error:  # the run itself reports unreadable files
                logger.warning("the view starts without the run's history: %s: %s", type(error).__name__, error)

    def __call__(self, event: Event) -> None:
        if self._view is not None:
            try:
                self._view(event)
            except Exception as error:
                self._give_up("drawn", error)

    async def __aenter__(self) -> Self:
        if self._view is not None:
            try:
                await self._view.__aenter__()
            except Exception as error:
                self._give_up("opened", error)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._view is not None:
            try:
                await self._view.__aexit__(kind, error, trace)
            except Exception as failure:
                self._give_up("closed", failure)

    def _give_up(self, doing: str, error: Exception) -> None:
        view, self._view = self._view, None
        logger.warning(
            "the view of the run could not be %s (%s: %s); the run continues without it",
            doing,
            type(error).__name__,
            error,
        )
        if isinstance(view, ConsoleView | QuietView):
            with suppress(Exception):
                view.abandon()


def console_view() -> SafeView:
    """A live terminal display, or plain lines: for commands."""
    return SafeView(ConsoleView)


def open_view(choice: Choice = True, *, title: str, controls: Controls | None = None) -> SafeView | None:
    """Open a view of a run; in a notebook, call it from the cell that should show it.

    ``True`` and ``"auto"`` give a widget in a Jupyter kernel, rich text in one without anywidget, a live display on a terminal,
    and plain lines elsewhere. A view that fails is dropped: see :class:`SafeView`.

    Args:
        title: shown until kind and model of the work are known.
        controls: actions behind the widget's buttons; None if the work cannot be paused.

    Raises:
        ConfigurationError: ``choice`` is unknown or unavailable here.
    """
    if choice is False:
        return None
    if choice is not True and choice not in get_args(_Named):
        raise ConfigurationError(
            f"progress={choice!r} is unknown: choose True, False or one of {', '.join(map(repr, get_args(_Named)))}"
        )
    kind = _fitting() if choice is True or choice == "auto" else choice
    if kind in ("widget", "rich") and not in_kernel():
        raise ConfigurationError(f"progress={kind!r} needs a Jupyter kernel: use progress=True to select what fits")
    return SafeView(lambda: _made(kind, title, controls))


def _made(kind: str, title: str, controls: Controls | None) -> View:
    if kind == "widget":
        return _widget(title, controls)
    if kind == "rich":
        return LiveView(RichTextSurface(title), title=title, controls=controls)
    if kind == "quiet":
        return QuietView()
    return ConsoleView(live={"terminal": True, "plain": False}.get(kind))


def _widget(title: str, controls: Controls | None) -> LiveView:
    if not _has_anywidget():
        raise ConfigurationError(
            "progress='widget' needs anywidget, which is not installed: pip install 'searchr1_async[notebook]'"
        )

    surface = WidgetSurface(title, has_controls=controls is not None)
    view = LiveView(surface, title=title, controls=controls)
    surface.on_press(view.press)
    return view


def _fitting() -> str:
    if not in_kernel():
        return "console"
    return "widget" if _has_anywidget() else "rich"


def _has_anywidget() -> bool:
    return importlib.util.find_spec("anywidget") is not None
