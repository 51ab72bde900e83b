"""Console view of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TextIO

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
    ServiceAnswers,
    ServiceSilent,
    StepFinished,
)

SECONDS_BETWEEN_LINES = 5.0

_SHOWN = (
    ("reward/total", "reward", "{:+.3f}"),
    ("correct", "exact match", "{:.1%}"),
    ("turns_per_episode", "turns", "{:.2f}"),
    ("valid_calls", "valid calls", "{:.0%}"),
)
"""Metrics on a step's line: name below ``env/all/``, heading, format."""


@dataclass(slots=True)
class Estimate:
    """Remaining time of a phase, from its recent pace. Pure: the caller passes the time in."""

    total: int
    started: float
    done: int = 0
    seconds_at_most: float | None = None
    """Upper bound on the phase's duration."""
    _history: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=20))
    _paused_at: float | None = None
    _paused: float = 0.0
    """Seconds spent paused; excluded from both the pace and the limit."""

    def __post_init__(self) -> None:
        self._history.append((self.started, self.done))

    def advance(self, done: int, now: float) -> None:
        """Record that ``done`` units are finished at ``now``.

        Progress reported within the first second was done by an earlier session and does not count towards the pace.
        """
        now = self._worked(now)
        if len(self._history) == 1 and now - self.started < 1.0:
            self._history.clear()
        self.done = done
        self._history.append((now, done))

    def seconds_left(self, now: float) -> float | None:
        """None while neither the pace nor a limit is known."""
        if self.done >= self.total:
            return 0.0
        now = self._worked(now)
        by_pace = self._by_pace(now)
        if self.seconds_at_most is None:
            return by_pace
        by_limit = max(0.0, self.started + self.seconds_at_most - now)
        return by_limit if by_pace is None else min(by_pace, by_limit)

    def pause(self, now: float) -> None:
        """Pause the clock."""
        if self._paused_at is None:
            self._paused_at = now

    def resume(self, now: float) -> None:
        """Resume the clock."""
        if self._paused_at is not None:
            self._paused += now - self._paused_at
            self._paused_at = None

    def _worked(self, now: float) -> float:
        """``now`` on a clock that stops while the run is paused."""
        return (now if self._paused_at is None else self._paused_at) - self._paused

    def _by_pace(self, now: float) -> float | None:
        then, before = self._history[0]
        latest, done = self._history[-1]
        if done <= before or latest <= then:
            return None
        seconds_per_unit = (latest - then) / (done - before)
        return max(0.0, (self.total - done) * seconds_per_unit - (now - latest))


@dataclass(slots=True)
class Pauses:
    """Why a run is paused: on request, because the Tinker service is not responding, or both."""

    reasons: set[str] = field(default_factory=set)

    def see(
        self, event: RunPaused | RunResumed | ServiceSilent | ServiceAnswers, estimates: Iterable[Estimate], now: float
    ) -> None:
        """Update the reasons, then pause or resume the estimates."""
        reason = "pause" if isinstance(event, RunPaused | RunResumed) else "service"
        if isinstance(event, RunPaused | ServiceSilent):
            self.reasons.add(reason)
        else:
            self.reasons.discard(reason)
        for estimate in estimates:
            self.apply(estimate, now)

    def apply(self, estimate: Estimate, now: float) -> None:
        """Pause or resume an estimate according to the current reasons."""
        (estimate.pause if self.reasons else estimate.resume)(now)


@dataclass(slots=True)
class _Phase:
    event: PhaseStarted
    estimate: Estimate
    line_due: float
    task: TaskID | None = None

    @property
    def name(self) -> str:
        return f"{self.event.phase} ({self.event.label})" if self.event.label else self.event.phase


@dataclass(slots=True)
class _Tally:
    """Counts of one step; kept per step because steps overlap."""

    episodes: int = 0
    groups: int = 0
    dropped: int = 0
    trained: int = 0


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
        self._phases: dict[str, _Phase] = {}
        self._tallies: defaultdict[int, _Tally] = defaultdict(_Tally)
        self._stepped_at = clock()
        self._pauses = Pauses()

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
        self._phases.clear()

    def __call__(self, event: Event) -> None:
        """Show ``event``; kinds without console output are ignored."""
        now = self._clock()
        match event:
            case Notice():
                self._line(f"warning: {event.text}" if event.is_warning else event.text, warning=event.is_warning)
            case PhaseStarted():
                self._start(event, now)
            case PhaseAdvanced():
                self._advance(event.phase, event.done, event.metrics, now)
            case PhaseEnded():
                self._end(event)
            case EpisodeFinished() | GroupFinished() | GroupDropped() | MinibatchSubmitted():
                self._count(event, now)
            case StepFinished():
                self._step(event, now)
            case RunPaused() | RunResumed() | ServiceSilent() | ServiceAnswers():
                self._pauses.see(event, [phase.estimate for phase in self._phases.values()], now)
                if isinstance(event, RunPaused | RunResumed):  # the service emits its own notice
                    is_paused = isinstance(event, RunPaused)
                    self._line("paused: no new requests are sent" if is_paused else "resumed")
            case RunEnded():
                self._line(f"run {event.reason}", warning=event.reason == "failed")
            case _:
                pass

    def _start(self, event: PhaseStarted, now: float) -> None:
        estimate = Estimate(event.total, now, seconds_at_most=event.seconds_at_most)
        self._pauses.apply(estimate, now)
        phase = _Phase(event, estimate, line_due=now + SECONDS_BETWEEN_LINES)
        if event.phase in self._phases:
            self._hide(self._phases.pop(event.phase))
        self._phases[event.phase] = phase
        if event.phase == "train":  # evaluations during training leave the step counts alone
            self._tallies.clear()
            self._stepped_at = now
        if self._progress is None:
            self._line(f"{phase.name}: {event.total:,} {event.unit}")
        else:
            phase.task = self._progress.add_task(
                _one_line(phase.name), total=event.total, metrics="", unit=event.unit, estimate=phase.estimate
            )

    def _advance(self, name: str, done: int, metrics: Mapping[str, float], now: float) -> None:
        phase = self._phases.get(name)
        if phase is None:
            return
        phase.estimate.advance(done, now)
        if self._progress is not None and phase.task is not None:
            if metrics:
                self._progress.update(phase.task, completed=done, metrics=_described(metrics))
            else:
                self._progress.update(phase.task, completed=done)
        elif now >= phase.line_due:
            phase.line_due = now + SECONDS_BETWEEN_LINES
            self._line(f"{phase.name}: {self._counted(phase, now)}{_after_comma(_described(metrics))}")

    def _end(self, event: PhaseEnded) -> None:
        phase = self._phases.pop(event.phase, None)
        if phase is None:
            return
        self._hide(phase)
        estimate, unit = phase.estimate, phase.event.unit
        done = f"{estimate.done:,} of {estimate.total:,}" if estimate.done < estimate.total else f"{estimate.total:,}"
        self._line(f"{phase.name}: {done} {unit} in {duration(event.seconds)}")

    def _hide(self, phase: _Phase) -> None:
        if self._progress is not None and phase.task is not None:
            self._progress.remove_task(phase.task)

    def _count(self, event: EpisodeFinished | GroupFinished | GroupDropped | MinibatchSubmitted, now: float) -> None:
        tally = self._tallies[event.step]
        match event:
            case EpisodeFinished():
                tally.episodes += 1
            case GroupFinished():
                tally.groups += 1
            case GroupDropped():
                tally.dropped += 1
            case MinibatchSubmitted():
                tally.trained += event.groups
        phase = self._phases.get("train")
        if phase is None:
            return
        text = f"{tally.episodes} episodes, {tally.groups} groups in this step"
        if self._progress is not None and phase.task is not None:
            self._progress.update(phase.task, metrics=text)
        elif now >= phase.line_due:
            phase.line_due = now + SECONDS_BETWEEN_LINES
            self._line(f"{phase.name}: {self._counted(phase, now)}, {text}")

    def _step(self, event: StepFinished, now: float) -> None:
        tally = self._tallies[event.step]
        self._tallies = defaultdict(_Tally, {step: later for step, later in self._tallies.items() if step > event.step})
        phase = self._phases.get("train")
        of_total = left = ""
        if phase is not None:
            self._advance_quietly(phase, event.step, now)
            of_total, left = f"/{phase.event.total}", _left(phase.estimate, now)
        seconds = event.metrics.get("time/total", now - self._stepped_at)
        self._stepped_at = now
        parts = [
            f"step {event.step}{of_total}",
            _described(event.metrics),
            f"groups {tally.trained} trained, {tally.dropped} dropped",
            duration(seconds),
            left,
        ]
        self._line(" · ".join(part for part in parts if part))

    def _advance_quietly(self, phase: _Phase, done: int, now: float) -> None:
        """Advance without a progress line: the step has its own."""
        if done > phase.estimate.done:
            phase.estimate.advance(done, now)
        phase.line_due = now + SECONDS_BETWEEN_LINES
        if self._progress is not None and phase.task is not None:
            self._progress.update(phase.task, completed=done, metrics="")

    def _counted(self, phase: _Phase, now: float) -> str:
        estimate = phase.estimate
        share = f" ({estimate.done / estimate.total:.0%})" if estimate.total else ""
        text = f"{estimate.done:,}/{estimate.total:,} {phase.event.unit}{share}, {duration(now - estimate.started)}"
        return text + _after_comma(_left(estimate, now))

    def _line(self, text: str, *, warning: bool = False) -> None:
        text = _one_line(text)
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


def _described(metrics: Mapping[str, float]) -> str:
    """The key metrics as text; if none is present, the first three metrics."""
    known = [
        f"{heading} {form.format(value)}"
        for name, heading, form in _SHOWN
        if (value := metrics.get(f"env/all/{name}", metrics.get(name))) is not None
    ]
    return ", ".join(known or [f"{name} {value:.4g}" for name, value in list(metrics.items())[:3]])


def _after_comma(text: str) -> str:
    return f", {text}" if text else ""


def _one_line(text: str) -> str:
    """``text`` on one line, with control characters escaped."""
    return "".join(char if char.isprintable() else " " if char in "\n\r\t" else ascii(char)[1:-1] for char in text)


def _encodable(text: str, stream: TextIO) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
