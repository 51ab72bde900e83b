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
)
from searchr1_async.watch.fanout import Watchers
from searchr1_async.watch.pace import PaceWarning
from tests.watch.builders import episode


class Run:
    """A run whose events come by a clock of its own, and the warnings that its watchers hear."""

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


def test_the_recipe_s_sizes_on_a_laptop_are_told_after_a_minute() -> None:
    """30 episodes in 3 minutes, of 14 steps of 4,096."""
    run = Run()
    run.watchers(PhaseStarted("train", 14, "steps"))
    run.plays(9, 54)
    assert run.heard == []
    run.plays(21, 126)
    (told,) = run.heard
    assert "about 4.0 days" in told
    assert "57,344 episodes" in told
    assert "groups_per_batch=" in told
    assert "time_limit=" in told


def test_not_one_episode_in_a_minute_is_told_too() -> None:
    run = Run(groups_per_batch=64)
    run.watchers(PhaseStarted("train", 10, "steps"))
    run.now += 61
    run.watchers(PhaseAdvanced("train", 0))
    assert "days" in run.heard[0]


@pytest.mark.parametrize(("steps", "limit"), [(1, None), (14, 900.0)])
def test_a_run_that_ends_within_a_day_says_nothing(steps: int, limit: float | None) -> None:
    run = Run()
    run.watchers(PhaseStarted("train", steps, "steps", seconds_at_most=limit))
    run.plays(200, 1200)
    assert run.heard == []


def test_elsewhere_the_first_minutes_of_thousands_of_episodes_at_once_are_not_taken_for_the_pace() -> None:
    run = Run(is_embedded=False)
    run.watchers(PhaseStarted("train", 30, "steps"))
    run.plays(10, 100)
    run.plays(1000, 60)
    run.plays(5, 600)  # the optimiser, and the slowest of a batch
    assert run.heard == []
    slow = Run(is_embedded=False)
    slow.watchers(PhaseStarted("train", 30, "steps"))
    slow.plays(60, 360)
    assert len(slow.heard) == 1


def test_a_measurement_that_takes_days_is_told_as_well() -> None:
    run = Run()
    run.watchers(PhaseStarted("evaluate", 20_000, "questions", "untrained"))
    for done in range(1, 20):
        run.now += 6
        run.watchers(PhaseAdvanced("evaluate", done))
    (told,) = run.heard
    assert "this evaluation needs" in told
    assert "held_out=" in told
    run.watchers(PhaseEnded("evaluate", 120.0))
    run.watchers(PhaseStarted("train", 14, "steps"))
    run.plays(20, 120)
    assert len(run.heard) == 2, "once in each phase"


def test_a_pause_is_no_pace_and_a_resumed_run_has_less_to_do() -> None:
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
def test_while_a_run_is_held_nothing_is_counted(held: list[Event], is_embedded: bool) -> None:
    """Events still come: the last requests end, and a held run is looked at some times a second."""
    run = Run(groups_per_batch=8, is_embedded=is_embedded)
    run.watchers(PhaseStarted("train", 100, "steps"))
    run.plays(30, 30)
    for event in held[:-1]:
        run.watchers(event)
        for _ in range(10):
            run.now += 60
            run.watchers(PhaseAdvanced("train", 0))
    run.watchers(held[-1])
    assert run.heard == []
    run.plays(4, 400)
    assert len(run.heard) == 1, "it counts again afterwards"
