"""Selects the view of a run that fits the environment: widget, rich text, live terminal display, or plain lines."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Literal, Protocol, Self, get_args

from searchr1_async.boundary.signals import in_kernel
from searchr1_async.errors import ConfigurationError
from searchr1_async.events import (
    EvaluationFinished,
    Event,
    Notice,
    PhaseAdvanced,
    PhaseEnded,
    PhaseStarted,
    StepFinished,
)
from searchr1_async.watch.live.view import Controls, LiveView
from searchr1_async.watch.progress import ConsoleProgress

__all__ = ["Choice", "Controls", "SafeView", "View", "console_view", "open_view"]

logger = logging.getLogger(__name__)

_Named = Literal["auto", "widget", "rich", "terminal", "plain", "quiet"]
Choice = bool | _Named
"""``True`` and ``"auto"`` pick what fits, ``False`` shows nothing, other names select one kind. ``"quiet"`` stays silent for work
under :data:`QUIET_SECONDS` and prints plain lines for longer work."""

QUIET_SECONDS = 5.0
"""Silence of a quiet view before its first line."""


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
        from searchr1_async.watch.live.rich_text import RichTextSurface

        return LiveView(RichTextSurface(title), title=title, controls=controls)
    if kind == "quiet":
        return QuietView()
    return ConsoleView({"terminal": True, "plain": False}.get(kind))


def _widget(title: str, controls: Controls | None) -> LiveView:
    if not _has_anywidget():
        raise ConfigurationError(
            "progress='widget' needs anywidget, which is not installed: pip install 'searchr1_async[notebook]'"
        )
    from searchr1_async.watch.live.widget import WidgetSurface

    surface = WidgetSurface(title, has_controls=controls is not None)
    view = LiveView(surface, title=title, controls=controls)
    surface.on_press(view.press)
    return view


class ConsoleView:
    """:class:`~searchr1_async.watch.progress.ConsoleProgress` as a view."""

    def __init__(self, live: bool | None = None) -> None:
        self._progress = ConsoleProgress(live=live)

    def __call__(self, event: Event) -> None:
        self._progress(event)

    def abandon(self) -> None:
        """Stop drawing after the stream failed. May raise."""
        self._progress.__exit__(None, None, None)

    async def __aenter__(self) -> Self:
        self._progress.__enter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)


class QuietView:
    """Silent for some seconds, then plain progress lines: for work that is usually short.

    Args:
        progress: output; None writes plain lines to ``sys.stderr``.
        seconds: delay before the first line.
    """

    def __init__(self, progress: ConsoleProgress | None = None, seconds: float = QUIET_SECONDS) -> None:
        self._progress = progress or ConsoleProgress(live=False)
        self._seconds = seconds
        self._last: Event | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_active = False

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Notice | PhaseStarted | PhaseAdvanced | PhaseEnded):
            return
        if self._is_active:
            self._progress(event)
        elif isinstance(event, Notice | PhaseStarted):
            self._last = event

    def abandon(self) -> None:
        """Stop drawing after the stream failed. May raise."""
        if self._timer is not None:
            self._timer.cancel()
        self._progress.__exit__(None, None, None)

    def _activate(self) -> None:
        self._is_active = True
        if self._last is not None:
            with suppress(OSError, ValueError):  # runs in a timer: nobody could handle it
                self._progress(self._last)

    async def __aenter__(self) -> Self:
        self._progress.__enter__()
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._activate)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._timer is not None
        self._timer.cancel()
        self._progress.__exit__(kind, error, trace)


def _fitting() -> str:
    if not in_kernel():
        return "console"
    return "widget" if _has_anywidget() else "rich"


def _has_anywidget() -> bool:
    return importlib.util.find_spec("anywidget") is not None
