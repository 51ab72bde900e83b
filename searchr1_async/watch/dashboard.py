"""The view of a run that fits where it is called: a widget, rich text, a terminal's live display, or plain lines."""

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
"""``True`` and ``"auto"`` take what fits, ``False`` shows nothing; the others are one kind by its name. ``"quiet"`` shows nothing
of work that takes under :data:`QUIET_SECONDS`, and plain lines of what longer work is waiting for."""

QUIET_SECONDS = 5.0
"""After which a person who waits is told what for."""


class View(Protocol):
    """Shows a run: subscribe it as an emitter, and hold it open while the run goes on."""

    def __call__(self, event: Event) -> None: ...
    async def __aenter__(self) -> Self: ...
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class SafeView:
    """A view that never changes what becomes of the work: whatever opening, drawing or closing it raises is logged in one line,
    and the work goes on without it.

    Args:
        make: makes the view, which may fail too (a stream that is closed, a kernel whose page is gone).

    Raises:
        ConfigurationError: ``make`` does, as the view that was asked for cannot be had here.
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
        """The view itself; None once it has failed."""
        return self._view

    def begin_with(self, past: Callable[[], Sequence[StepFinished | EvaluationFinished]]) -> None:
        """What earlier sessions of the run told, where the view shows it. ``past`` reads files: call this in a worker thread."""
        if isinstance(self._view, LiveView):  # a console has printed its lines already
            try:
                self._view.begin_with(past())
            except Exception as error:  # the run's own reading will say more
                logger.warning("the view begins without the run's past: %s: %s", type(error).__name__, error)

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
            "the view of the run could not be %s (%s: %s); the run goes on without it",
            doing,
            type(error).__name__,
            error,
        )
        if isinstance(view, ConsoleView | QuietView):
            with suppress(Exception):
                view.abandon()


def console_view() -> SafeView:
    """A terminal's live display, or plain lines: for commands."""
    return SafeView(ConsoleView)


def open_view(choice: Choice = True, *, title: str, controls: Controls | None = None) -> SafeView | None:
    """A view of a run, shown at once: in a notebook call it from the cell whose output it is to stand in.

    A view that fails is dropped: see :class:`SafeView`.

    ``True`` and ``"auto"`` give a widget in a Jupyter kernel, rich text in one without anywidget, a live display on a terminal,
    plain lines elsewhere.

    Args:
        title: of the work, until it says itself what it is.
        controls: what the widget's buttons do; None for work that cannot be paused.

    Raises:
        ConfigurationError: ``choice`` is unknown, or cannot be had here.
    """
    if choice is False:
        return None
    if choice is not True and choice not in get_args(_Named):
        raise ConfigurationError(
            f"progress={choice!r} is unknown: choose True, False or one of {', '.join(map(repr, get_args(_Named)))}"
        )
    kind = _fitting() if choice is True or choice == "auto" else choice
    if kind in ("widget", "rich") and not in_kernel():
        raise ConfigurationError(f"progress={kind!r} needs a Jupyter kernel: use progress=True, which takes what fits")
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
        """The stream is gone: stops what draws by itself. May raise."""
        self._progress.__exit__(None, None, None)

    async def __aenter__(self) -> Self:
        self._progress.__enter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)


class QuietView:
    """Says nothing for some seconds, then what is going on, as plain lines: for work that is short as a rule.

    Args:
        progress: where it says it; None is plain lines on ``sys.stderr``.
        seconds: of silence.
    """

    def __init__(self, progress: ConsoleProgress | None = None, seconds: float = QUIET_SECONDS) -> None:
        self._progress = progress or ConsoleProgress(live=False)
        self._seconds = seconds
        self._last: Event | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_speaking = False

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Notice | PhaseStarted | PhaseAdvanced | PhaseEnded):
            return
        if self._is_speaking:
            self._progress(event)
        elif isinstance(event, Notice | PhaseStarted):
            self._last = event

    def abandon(self) -> None:
        """The stream is gone. May raise."""
        if self._timer is not None:
            self._timer.cancel()
        self._progress.__exit__(None, None, None)

    def _speak(self) -> None:
        self._is_speaking = True
        if self._last is not None:
            with suppress(OSError, ValueError):  # of a timer: there is no work that could do without it
                self._progress(self._last)

    async def __aenter__(self) -> Self:
        self._progress.__enter__()
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._speak)
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
