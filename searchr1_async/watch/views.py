"""The views of a run on a terminal (a live line, or plain lines elsewhere), and which view is used where.

A view of a notebook is a :class:`~searchr1_async.watch.live_view.LiveView`. Views show a :class:`RunState`, and fold nothing themselves.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, Self, TextIO, cast

from rich.console import Console
from rich.live import Live
from rich.text import Text

from searchr1_async.boundary.signals import in_kernel
from searchr1_async.errors import ConfigurationError
from searchr1_async.events import (
    EpisodeFinished,
    EvaluationFinished,
    Event,
    Notice,
    PhaseAdvanced,
    PhaseEnded,
    PhaseStarted,
    RunEnded,
    RunPaused,
    RunResumed,
    StepFinished,
)
from searchr1_async.records.metrics import described
from searchr1_async.watch.live_view import LiveView, WidgetSurface
from searchr1_async.watch.markup import duration, one_line
from searchr1_async.watch.progress import Phase
from searchr1_async.watch.state import RunState

logger = logging.getLogger(__name__)

LIVE_PER_SECOND = 4
"""Redraws of a terminal's live line."""
LINE_SECONDS = 5.0
"""Minimum seconds between two plain progress lines."""
QUIET_SECONDS = 5.0
"""Silence of a quiet view before its first line."""

Choice = bool | Literal["plain", "quiet"]
"""``True`` picks what fits, ``False`` shows nothing, ``"plain"`` prints lines anywhere, and ``"quiet"`` does so for work that takes longer
than :data:`QUIET_SECONDS`."""


class ConsoleView:
    """Writes a run's events to a stream; subscribe it to the run, and use it as a context manager.

    On a terminal a live line shows each phase's count, remaining time and key metrics; steps and notices scroll above. Elsewhere (log
    file, pipe, notebook) everything is a plain line, with at most one progress line every five seconds. A stream that fails, such as a
    vanished terminal, gets no more. Not thread-safe: call it from the event loop's thread.

    Args:
        stream: output; defaults to the current ``sys.stderr``.
        live: override ``stream.isatty()``.
        quiet_for: seconds of silence at first, for work that is usually short; then the last line of it is shown.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        live: bool | None = None,
        quiet_for: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        file = _Stream(sys.stderr if stream is None else stream)
        # Not as rich decides: kernels and CI set FORCE_COLOR, and a file is still no terminal.
        is_terminal = file.isatty() if live is None else live
        self._console = Console(
            file=cast("TextIO", file),
            force_jupyter=False,  # else rich in a notebook writes HTML through IPython
            force_terminal=is_terminal,
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        is_live = live or (is_terminal and not self._console.is_dumb_terminal)
        self._clock = clock
        self._quiet_for, self._held = quiet_for, ""
        self._timer: asyncio.TimerHandle | None = None
        self._state = RunState()
        self._texts: dict[str, str] = {}
        """What was last said of each phase's progress."""
        self._line_due = 0.0
        """When the next plain progress line may be printed."""
        self._live: Live | None = None
        if is_live:
            # A pipe keeps what the program prints.
            options: dict[str, Any] = {
                "redirect_stdout": sys.stdout is not None and sys.stdout.isatty(),
                "transient": True,
            }
            self._live = Live(
                console=self._console, get_renderable=self._status, refresh_per_second=LIVE_PER_SECOND, **options
            )

    def begin_with(self, past: Callable[[], Sequence[StepFinished | EvaluationFinished]]) -> None:
        """Nothing: their lines were printed at the time."""

    def __enter__(self) -> Self:
        if self._quiet_for:
            self._timer = asyncio.get_running_loop().call_later(self._quiet_for, self._speak)
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._live is not None:
            self._live.stop()

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(self, *raised: object) -> None:
        self.__exit__()

    def _speak(self) -> None:
        self._quiet_for = 0.0
        if self._held:
            self._line(self._held)

    def __call__(self, event: Event) -> None:
        """Show ``event``; kinds without console output are ignored."""
        now, state = self._clock(), self._state
        ending = state.phases.get(event.phase) if isinstance(event, PhaseEnded) else None
        state.see(event, now)
        match event:
            case Notice():
                self._line(f"warning: {event.text}" if event.is_warning else event.text, warning=event.is_warning)
            case PhaseStarted():
                self._texts[event.phase], self._line_due = "", now + LINE_SECONDS
                if self._live is None:
                    self._line(f"{state.phases[event.phase].name}: {event.total:,} {event.unit}")
            case PhaseAdvanced():
                self._progress(event.phase, now, _text(event.metrics))
            case PhaseEnded() if ending is not None:
                self._line(f"{ending.name}: {ending.counted()} in {duration(event.seconds)}")
            case EpisodeFinished():
                self._progress("train", now, f"{state.batch.episodes:,} episodes in this batch")
            case StepFinished():
                self._step(event, now)
            case RunPaused() | RunResumed():  # of an outage, the service emits its own notice
                self._line("paused: no new requests are sent" if isinstance(event, RunPaused) else "resumed")
            case RunEnded():
                self._line(f"run {event.reason}", warning=event.reason == "failed")
            case _:
                pass

    def _progress(self, name: str, now: float, text: str) -> None:
        """Say ``text`` of a phase: in the live line, or in a plain line if one is due."""
        self._texts[name] = text
        if self._live is None and now >= self._line_due and (phase := self._state.phases.get(name)) is not None:
            self._line_due = now + LINE_SECONDS
            self._line(self._words(phase, now))

    def _words(self, phase: Phase, now: float) -> str:
        left = phase.left(self._state.work.time(now))
        return f"{phase.name}: {', '.join(filter(None, (phase.counted(), left, self._texts.get(phase.event.phase))))}"

    def _status(self) -> Text:
        """The live line; called in the thread that redraws it."""
        now = self._clock()
        lines = [
            f"{duration(self._state.seconds(now))} · {self._words(phase, now)}"
            for phase in list(self._state.phases.values())
        ]
        return Text("\n".join(map(one_line, lines)), style="cyan", no_wrap=True, overflow="ellipsis")

    def _step(self, event: StepFinished, now: float) -> None:
        of_total = left = ""
        if (phase := self._state.phases.get("train")) is not None:
            of_total, left = f"/{phase.event.total}", phase.left(self._state.work.time(now))
            self._line_due = now + LINE_SECONDS  # the step has its own line
        dropped = sum(value for name, value in event.metrics.items() if name.startswith("groups/dropped/"))
        groups = f"groups {event.metrics.get('groups/trained', 0):.0f} trained, {dropped:.0f} dropped"
        took = duration(event.metrics.get("time/total", 0.0))
        self._line(" · ".join(filter(None, (f"step {event.step}{of_total}", _text(event.metrics), groups, took, left))))

    def _line(self, text: str, *, warning: bool = False) -> None:
        text = one_line(text)
        if self._quiet_for:
            self._held = text
        else:
            self._console.print(Text(text, style="yellow" if warning else ""))


class _Stream:
    """A stream that never raises: what it cannot encode is replaced, and what a vanished terminal cannot show is lost.

    Args:
        stream: None for a process without standard error.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.encoding: str = getattr(stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def write(self, text: str) -> int:
        if self._stream is not None:
            with suppress(OSError, ValueError):
                self._stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            with suppress(OSError, ValueError):
                self._stream.flush()


def _text(metrics: Mapping[str, float]) -> str:
    """The curves' values as text; if none is present, the first three metrics."""
    return ", ".join(described(metrics) or [f"{name} {value:.4g}" for name, value in list(metrics.items())[:3]])


View = ConsoleView | LiveView
"""Shows a run: subscribe it, and keep it open with ``async with`` while the run lasts."""


def open_view(choice: Choice = True, *, title: str) -> View | None:
    """Open a view of a run; in a notebook, call it from the cell that should show it.

    ``True`` gives a widget in a Jupyter kernel with anywidget, a live line on a terminal, and plain lines elsewhere. No view fails the
    run: what cannot be opened or drawn is logged and skipped.

    Args:
        title: shown until kind and model of the work are known.

    Raises:
        ConfigurationError: ``choice`` is unknown.
    """
    if choice not in (True, False, "plain", "quiet"):
        raise ConfigurationError(f"progress={choice!r} is unknown: choose True, False, 'plain' or 'quiet'")
    if choice is False:
        return None
    if choice is True and in_kernel() and importlib.util.find_spec("anywidget") is not None:
        try:
            return LiveView(WidgetSurface(title), title=title)
        except Exception as error:  # the kernel may have lost its page
            logger.warning("the live view could not be opened (%s); the run continues without it", error)
            return None
    return ConsoleView(live=None if choice is True else False, quiet_for=QUIET_SECONDS if choice == "quiet" else 0.0)
