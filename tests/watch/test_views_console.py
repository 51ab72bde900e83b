from __future__ import annotations

import io
import re
from collections.abc import Callable

import pytest

from searchr1_async.events import (
    CheckpointSaved,
    EpisodeFinished,
    Event,
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
from searchr1_async.watch.markup import duration
from searchr1_async.watch.progress import Phase, WorkClock
from searchr1_async.watch.views import ConsoleView
from tests.watch.builders import episode

STEP = {
    "env/all/reward/total": 0.25,
    "env/all/correct": 0.5,
    "env/all/turns_per_episode": 2.25,
    "env/all/valid_calls": 0.9,
    "time/total": 61.0,
    "groups/trained": 7.0,
    "groups/dropped/constant_reward": 2.0,
    "groups/dropped/too_slow": 1.0,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def plain(events: Callable[[ConsoleView, Clock], None]) -> list[str]:
    stream, clock = io.StringIO(), Clock()
    with ConsoleView(stream, clock=clock) as progress:
        events(progress, clock)
    return stream.getvalue().splitlines()


def test_a_file_is_no_terminal_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert plain(lambda progress, clock: progress(Notice("look", is_warning=True))) == ["warning: look"]


def test_phase_prints_at_most_one_line_per_five_seconds() -> None:
    def events(progress: ConsoleView, clock: Clock) -> None:
        progress(PhaseStarted("evaluate", 200, "questions", "untrained"))
        for done in range(1, 201):
            clock.now += 0.1
            progress(PhaseAdvanced("evaluate", done, {"correct": 0.25}))
        progress(PhaseEnded("evaluate", 20.0))

    lines = plain(events)
    assert lines[0] == "evaluate (untrained): 200 questions"
    assert lines[-1] == "evaluate (untrained): 200 of 200 questions in 20 s"
    assert len(lines) == 2 + 3 or len(lines) == 2 + 4
    assert re.fullmatch(r"evaluate \(untrained\): 5\d of 200 questions, 1\d s left, exact match 25\.0%", lines[1])


def test_step_line_has_metrics_and_group_counts() -> None:
    def events(progress: ConsoleView, clock: Clock) -> None:
        progress(PhaseStarted("train", 4, "steps"))
        for step in (1, 2):
            clock.now += 60
            progress(StepFinished(step, STEP))
            progress(PhaseAdvanced("train", step))

    steps = [line for line in plain(events) if line.startswith("step")]
    assert steps == [
        "step 1/4 · reward +0.250, exact match 50.0%, turns 2.25, valid calls 90% · groups 7 trained, 3 dropped"
        " · 1 min 01 s · 3 min 00 s left",
        "step 2/4 · reward +0.250, exact match 50.0%, turns 2.25, valid calls 90% · groups 7 trained, 3 dropped"
        " · 1 min 01 s · 2 min 00 s left",
    ]


def test_long_step_prints_progress() -> None:
    def events(progress: ConsoleView, clock: Clock) -> None:
        progress(PhaseStarted("train", 4, "steps"))
        for _ in range(12):
            clock.now += 1
            progress(EpisodeFinished(episode(), 1))

    assert plain(events)[1] == "train: 0 of 4 steps, 5 episodes in this batch"


def test_notices_and_end_are_escaped_lines() -> None:
    def events(progress: ConsoleView, clock: Clock) -> None:
        progress(Notice("[bold]two\nlines\x1b[2J\udcff"))
        progress(Notice("slow service", is_warning=True))
        progress(CheckpointSaved(3, "tinker://run/state"))
        progress(PhaseAdvanced("never started", 3))
        progress(PhaseEnded("never started", 3))
        progress(Event())
        progress(RunEnded("stopped"))

    assert plain(events) == [
        "[bold]two lines\\x1b[2J\\udcff",
        "warning: slow service",
        "run stopped",
    ]


def test_terminal_gets_a_live_bar() -> None:
    stream = Terminal()
    clock = Clock()
    with ConsoleView(stream, live=True, clock=clock) as progress:
        progress(PhaseStarted("train", 3, "steps", "[red]"))
        progress(EpisodeFinished(episode(), 1))
        clock.now += 30
        progress(StepFinished(1, STEP))
        progress(PhaseStarted("evaluate", 10, "questions"))
        progress(PhaseAdvanced("evaluate", 10, {"correct": 0.5}))
        progress(PhaseEnded("evaluate", 3.0))
        progress(Notice("look", is_warning=True))
        progress(PhaseEnded("train", 90.0))
    text = stream.getvalue()
    for expected in (
        "train ([red])",
        "step 1/3 · reward",
        "1 of 3 steps",
        "warning: look",
        "evaluate: 10 of 10 questions in 3.0 s",
    ):
        assert expected in text
    assert text.endswith("\x1b[?25h") or "\x1b[?25h" in text, "the cursor is shown again"
    progress(Notice("after the end"))
    assert stream.getvalue().endswith("after the end\n")


def test_exception_leaves_the_terminal_clean() -> None:
    stream = Terminal()
    progress = ConsoleView(stream, live=True)

    def interrupted() -> None:
        with progress:
            progress(PhaseStarted("train", 3, "steps"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "\x1b[?25h" in stream.getvalue()


def test_ascii_stream() -> None:
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding="ascii")
    with ConsoleView(stream) as progress:
        progress(Notice("größe · 😀"))
    stream.flush()
    assert buffer.getvalue() == b"gr??e ? ?\n"


def test_time_left_follows_the_recent_pace() -> None:
    estimate = Phase(PhaseStarted("train", 100, "steps"), 0.0)
    assert estimate.seconds_left(5.0) is None
    estimate.advance(10, 10.0)
    assert estimate.seconds_left(10.0) == pytest.approx(90)
    assert estimate.seconds_left(14.0) == pytest.approx(86)
    for done in range(11, 41):
        estimate.advance(done, 10.0 + 2 * (done - 10))
    assert estimate.seconds_left(70.0) == pytest.approx(120)
    estimate.advance(100, 80.0)
    assert estimate.seconds_left(80.0) == 0


def test_steps_before_a_resume_do_not_count_for_the_pace() -> None:
    estimate = Phase(PhaseStarted("train", 100, "steps"), 0.0)
    estimate.advance(60, 0.2)
    assert estimate.seconds_left(5.0) is None
    estimate.advance(61, 10.2)
    assert estimate.seconds_left(10.2) == pytest.approx(390)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (7620, "2 h 07 min"), (float("nan"), "?")],
)
def test_duration_format(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_time_limit_bounds_the_time_left() -> None:
    free = Phase(PhaseStarted("warm-up", 40, "steps"), 0.0)
    bounded = Phase(PhaseStarted("warm-up", 40, "steps", seconds_at_most=300.0), 0.0)
    assert free.seconds_left(10.0) is None
    assert bounded.seconds_left(10.0) == 290.0
    for estimate in (free, bounded):
        estimate.advance(1, 60.0)
    assert free.seconds_left(60.0) == 39 * 60
    assert bounded.seconds_left(60.0) == 240.0
    bounded.advance(39, 100.0)
    assert (bounded.seconds_left(100.0) or 0) < 60


def test_time_left_includes_the_steps_that_a_time_limit_does_not_prevent() -> None:
    bounded = Phase(PhaseStarted("train", 40, "steps", seconds_at_most=300.0, at_least=8), 0.0)
    assert bounded.seconds_left(10.0) == 290.0
    bounded.advance(1, 60.0)
    assert bounded.seconds_left(60.0) == 7 * 60
    bounded.advance(8, 480.0)
    assert bounded.seconds_left(480.0) == 0.0


@pytest.mark.parametrize(
    "events",
    [
        {60: RunPaused(), 70: RunPaused(), 660: RunResumed(), 670: RunResumed()},
        {60: ServiceSilent(), 600: RunPaused(), 620: ServiceAnswers(), 660: RunResumed()},
    ],
)
def test_pauses_and_outages_are_no_working_time(events: dict[float, Event]) -> None:
    clock = WorkClock()
    for now, event in events.items():
        clock.see(event, now)
        if not isinstance(event, RunResumed):
            assert clock.time(now + 5) == 60
    assert clock.time(700) == 100
    assert not clock.is_paused
