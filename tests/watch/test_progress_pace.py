from __future__ import annotations

from typing import Any

import pytest

from searchr1_async.events import (
    EpisodeFinished,
    Event,
    Notice,
    PhaseAdvanced,
    PhaseEnded,
    PhaseStarted,
    RunPaused,
    RunResumed,
    RunStarted,
    ServiceAnswers,
    ServiceSilent,
    StepFinished,
    Watchers,
)
from searchr1_async.watch.pace import PaceWarning
from tests.watch.builders import episode


class Run:
    """A run with a simulated clock, and the warnings it emitted."""

    def __init__(self, *, is_embedded: bool = True, **started: Any) -> None:
        self.now, self.heard = 1000.0, list[str]()
        self.watchers = Watchers()
        self.watchers.subscribe(PaceWarning(self.watchers, lambda: self.now))
        self.watchers.subscribe(self._hear)
        sizes = {"group_size": 8, "groups_per_batch": 512} | started
        self.watchers(RunStarted("train", "a model", is_embedded, "an embedder", **sizes))

    def _hear(self, event: Event) -> None:
        if isinstance(event, Notice):
            assert event.is_warning
            self.heard.append(event.text)

    def plays(self, episodes: int, seconds: float) -> None:
        for _ in range(episodes):
            self.now += seconds / episodes
            self.watchers(EpisodeFinished(episode(), 1))


def test_recipe_sizes_on_a_laptop_warn_after_a_minute() -> None:
    """30 episodes in 3 minutes, of 14 steps of 4,096."""
    run = Run()
    run.watchers(PhaseStarted("train", 14, "steps"))
    run.plays(9, 54)
    assert run.heard == []
    run.plays(21, 126)
    (warning,) = run.heard
    assert "about 4.0 days" in warning
    assert "57,344 episodes" in warning
    assert "groups_per_batch=" in warning
    assert "time_limit=" in warning


def test_no_episode_in_a_minute_warns() -> None:
    run = Run(groups_per_batch=64)
    run.watchers(PhaseStarted("train", 10, "steps"))
    run.now += 61
    run.watchers(PhaseAdvanced("train", 0))
    assert "days" in run.heard[0]


@pytest.mark.parametrize(("steps", "limit"), [(1, None), (14, 900.0)])
def test_run_within_a_day_does_not_warn(steps: int, limit: float | None) -> None:
    run = Run()
    run.watchers(PhaseStarted("train", steps, "steps", seconds_at_most=limit))
    run.plays(200, 1200)
    assert run.heard == []


def test_other_services_get_a_longer_grace_period() -> None:
    run = Run(is_embedded=False)
    run.watchers(PhaseStarted("train", 30, "steps"))
    run.plays(10, 100)
    run.plays(1000, 60)
    run.plays(5, 600)  # optimizer step and stragglers
    assert run.heard == []
    slow = Run(is_embedded=False)
    slow.watchers(PhaseStarted("train", 30, "steps"))
    slow.plays(60, 360)
    assert len(slow.heard) == 1


def test_long_evaluation_warns() -> None:
    run = Run()
    run.watchers(PhaseStarted("evaluate", 20_000, "questions", "untrained"))
    for done in range(1, 20):
        run.now += 6
        run.watchers(PhaseAdvanced("evaluate", done))
    (warning,) = run.heard
    assert "this evaluation needs" in warning
    assert "held_out=" in warning
    run.watchers(PhaseEnded("evaluate", 120.0))
    run.watchers(PhaseStarted("train", 14, "steps"))
    run.plays(20, 120)
    assert len(run.heard) == 2, "once per phase"


def test_pauses_and_earlier_steps_are_excluded() -> None:
    run = Run(groups_per_batch=8)
    run.watchers(PhaseStarted("train", 1000, "steps"))
    run.watchers(PhaseAdvanced("train", 999))
    run.watchers(RunPaused())
    run.now += 100_000
    run.watchers(RunResumed())
    run.plays(60, 90)
    run.watchers(StepFinished(1000, {}))
    assert run.heard == []


HELD: dict[str, list[Event]] = {
    "a pause": [RunPaused(), RunResumed()],
    "an outage": [ServiceSilent(), ServiceAnswers()],
    "an outage in a pause": [RunPaused(), ServiceSilent(), ServiceAnswers(), RunResumed()],
    "a pause in an outage": [ServiceSilent(), RunPaused(), RunResumed(), ServiceAnswers()],
}


@pytest.mark.parametrize("is_embedded", [True, False])
@pytest.mark.parametrize("held", HELD.values(), ids=HELD)
def test_nothing_is_counted_during_a_pause(held: list[Event], is_embedded: bool) -> None:
    """Events continue: the last requests finish, and rollout samples are still emitted."""
    run = Run(groups_per_batch=8, is_embedded=is_embedded)
    run.watchers(PhaseStarted("train", 1000, "steps"))
    run.plays(30, 30)
    for event in held[:-1]:
        run.watchers(event)
        for _ in range(10):
            run.now += 60
            run.watchers(PhaseAdvanced("train", 0))
    run.watchers(held[-1])
    assert run.heard == []
    run.plays(4, 400)
    assert len(run.heard) == 1, "counting resumes afterwards"
