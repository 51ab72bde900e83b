"""Console view of a run: a live bar on a terminal, plain lines elsewhere. It shows a :class:`RunState`, and folds nothing itself."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

from searchr1_async.events import (
    EpisodeFinished,
    Event,
    GroupDropped,
    GroupFinished,
    MinibatchSubmitted,
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
from searchr1_async.watch.progress import Estimate, Phase
from searchr1_async.watch.state import RunState, StepCounts

SECONDS_BETWEEN_LINES = 5.0
QUIET_SECONDS = 5.0
"""Silence of a quiet view before its first line."""


class ConsoleProgress:
    """Writes a run's events to a stream; subscribe it to the run, and use it as a context manager.

    On a terminal each phase is a live bar with count, elapsed and remaining time, and key metrics; steps and notices scroll
    above. Elsewhere (log file, pipe, notebook) everything is a plain line, with at most one progress line per phase every
    five seconds. Not thread-safe: call it from the event loop's thread.

    Args:
        stream: output; defaults to the current ``sys.stderr``.
        live: override ``stream.isatty()``.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        # Without force_jupyter=False, rich in a notebook writes HTML through IPython.
        self._console = Console(
            file=self._stream, force_jupyter=False, force_terminal=live, highlight=False, markup=False, soft_wrap=True
        )
        self._live_wanted = self._console.is_terminal and not self._console.is_dumb_terminal if live is None else live
        self._clock = clock
        self._progress: Progress | None = None
        self._state = RunState()
        self._bars: dict[str, TaskID] = {}
        self._line_due: dict[str, float] = {}
        """When a phase may print its next progress line."""
        self._stepped_at = clock()

    def __enter__(self) -> ConsoleProgress:
        if self._live_wanted:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=28),
                _CountColumn(),
                _TimeColumn(self._clock),
                TextColumn("{task.fields[metrics]}", style="cyan", markup=False),
                console=self._console,
                refresh_per_second=4,
                transient=True,  # the phase's final line replaces the bar
            )
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        progress, self._progress = self._progress, None
        if progress is not None:
            progress.stop()
        self._bars.clear()

    def __call__(self, event: Event) -> None:
        """Show ``event``; kinds without console output are ignored."""
        now, state = self._clock(), self._state
        ending = state.phases.get(event.phase) if isinstance(event, PhaseEnded) else None
        state.see(event, now)
        match event:
            case Notice():
                self._line(f"warning: {event.text}" if event.is_warning else event.text, warning=event.is_warning)
            case PhaseStarted():
                self._start(state.phases[event.phase], now)
            case PhaseAdvanced():
                self._advance(event, now)
            case PhaseEnded() if ending is not None:
                self._end(ending, event.seconds)
            case EpisodeFinished() | GroupFinished() | GroupDropped() | MinibatchSubmitted():
                self._count(state.counts[event.step], now)
            case StepFinished():
                self._step(event, now)
            case RunPaused() | RunResumed():  # of an outage, the service emits its own notice
                self._line("paused: no new requests are sent" if isinstance(event, RunPaused) else "resumed")
            case RunEnded():
                self._line(f"run {event.reason}", warning=event.reason == "failed")
            case _:
                pass

    def _start(self, phase: Phase, now: float) -> None:
        event, name = phase.event, _name(phase)
        self._hide(event.phase)
        self._line_due[event.phase] = now + SECONDS_BETWEEN_LINES
        if event.phase == "train":
            self._stepped_at = now
        if self._progress is None:
            self._line(f"{name}: {event.total:,} {event.unit}")
        else:
            self._bars[event.phase] = self._progress.add_task(
                one_line(name), total=event.total, metrics="", unit=event.unit, estimate=phase.estimate
            )

    def _advance(self, event: PhaseAdvanced, now: float) -> None:
        phase = self._state.phases.get(event.phase)
        if phase is not None:
            text = _text(event.metrics)
            self._show(phase, now, text or None, _counted(phase, now) + (f", {text}" if text else ""))

    def _show(self, phase: Phase, now: float, metrics: str | None, line: str) -> None:
        """Update the phase's bar, or print ``line`` if one is due. ``metrics``: None keeps the bar's text."""
        name = phase.event.phase
        if self._progress is not None and name in self._bars:
            fields: dict[str, Any] = {} if metrics is None else {"metrics": metrics}
            self._progress.update(self._bars[name], completed=phase.estimate.done, **fields)
        elif now >= self._line_due[name]:
            self._line_due[name] = now + SECONDS_BETWEEN_LINES
            self._line(f"{_name(phase)}: {line}")

    def _end(self, phase: Phase, seconds: float) -> None:
        self._hide(phase.event.phase)
        estimate, unit = phase.estimate, phase.event.unit
        done = f"{estimate.done:,} of {estimate.total:,}" if estimate.done < estimate.total else f"{estimate.total:,}"
        self._line(f"{_name(phase)}: {done} {unit} in {duration(seconds)}")

    def _hide(self, name: str) -> None:
        bar = self._bars.pop(name, None)
        if self._progress is not None and bar is not None:
            self._progress.remove_task(bar)

    def _count(self, counts: StepCounts, now: float) -> None:
        phase = self._state.phases.get("train")
        if phase is not None:
            text = f"{counts.episodes} episodes, {counts.groups} groups in this step"
            self._show(phase, now, text, f"{_counted(phase, now)}, {text}")

    def _step(self, event: StepFinished, now: float) -> None:
        counts = self._state.counts.get(event.step, StepCounts())
        phase = self._state.phases.get("train")
        of_total = left = ""
        if phase is not None:
            of_total, left = f"/{phase.event.total}", _left(phase.estimate, now)
            self._line_due["train"] = now + SECONDS_BETWEEN_LINES  # the step has its own line
            self._show(phase, now, "", "")
        seconds = event.metrics.get("time/total", now - self._stepped_at)
        self._stepped_at = now
        parts = [
            f"step {event.step}{of_total}",
            _text(event.metrics),
            f"groups {counts.trained} trained, {counts.dropped} dropped",
            duration(seconds),
            left,
        ]
        self._line(" · ".join(part for part in parts if part))

    def _line(self, text: str, *, warning: bool = False) -> None:
        text = one_line(text)
        if self._progress is None:
            # Raw text: no colours or wrapping in log files.
            self._stream.write(_encodable(text, self._stream) + "\n")
            self._stream.flush()
        else:
            self._console.print(Text(text, style="yellow" if warning else ""))


class _CountColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{int(task.completed):,}/{int(task.total or 0):,} {task.fields['unit']}")


class _TimeColumn(ProgressColumn):
    """Elapsed and remaining time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock

    def render(self, task: Task) -> Text:
        estimate: Estimate = task.fields["estimate"]
        now = self._clock()
        left = _left(estimate, now)
        return Text(duration(now - estimate.started) + (f", {left}" if left else ""), style="dim")


def duration(seconds: float) -> str:
    """Format seconds: ``4.2 s``, ``38 s``, ``4 min 05 s``, ``2 h 07 min``."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _left(estimate: Estimate, now: float) -> str:
    seconds = estimate.seconds_left(now)
    return "" if seconds is None else f"{duration(seconds)} left"


def _name(phase: Phase) -> str:
    return f"{phase.event.phase} ({phase.event.label})" if phase.event.label else phase.event.phase


def _counted(phase: Phase, now: float) -> str:
    estimate, left = phase.estimate, _left(phase.estimate, now)
    share = f" ({estimate.done / estimate.total:.0%})" if estimate.total else ""
    text = f"{estimate.done:,}/{estimate.total:,} {phase.event.unit}{share}, {duration(now - estimate.started)}"
    return f"{text}, {left}" if left else text


def _text(metrics: Mapping[str, float]) -> str:
    """The curves' values as text; if none is present, the first three metrics."""
    return ", ".join(described(metrics) or [f"{name} {value:.4g}" for name, value in list(metrics.items())[:3]])


def one_line(text: str) -> str:
    """``text`` on one line, with control characters escaped."""
    return "".join(char if char.isprintable() else " " if char in "\n\r\t" else ascii(char)[1:-1] for char in text)


def _encodable(text: str, stream: TextIO) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


class ConsoleView(ConsoleProgress):
    """:class:`ConsoleProgress` as a view of a run."""

    def abandon(self) -> None:
        """Stop drawing after the stream failed. May raise."""
        self.__exit__(None, None, None)

    async def __aenter__(self) -> Self:
        self.__enter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)


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
