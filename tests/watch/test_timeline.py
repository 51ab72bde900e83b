"""Timelines: known examples and arbitrary events."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.events import (
    BatchClosed,
    Event,
    GroupDropped,
    GroupFinished,
    MinibatchSubmitted,
    Notice,
    PipelineChanged,
    RolloutSampled,
    RunEnded,
    RunStarted,
    WeightsPublished,
)
from searchr1_async.trackers.tracker import LoggedEvent, decoded, encoded
from searchr1_async.watch.timeline import stage_shares, step_summary, timeline_of, trainer_shares
from tests.watch import builders

STARTED = RunStarted("train", "m", True, "hash")


def logged(*rows: tuple[float, Event]) -> list[LoggedEvent]:
    return [event for moment, row in rows if (event := decoded(encoded(moment, row))) is not None]


def sample(episodes: int, sampling: int, queued: int, searching: int) -> RolloutSampled:
    return RolloutSampled(episodes, sampling, queued, searching, 1, 0, 0, 0, {}, "nothing", 0.0, 0.0, 0.0, 0.0)


def opened(step: int, trainer: Any = "idle") -> PipelineChanged:
    return PipelineChanged(step, step - 1, 4, 0, 0, trainer)


STEP_TWO: tuple[tuple[float, Event], ...] = (
    (100.0, STARTED),
    (105.0, sample(10, 10, 0, 0)),
    (110.0, opened(2)),
    (115.0, sample(8, 4, 0, 2)),
    (116.0, GroupFinished(builders.group(), 2)),
    (117.0, opened(2, "learning")),
    (118.0, GroupDropped(builders.group(), 2, "constant_reward")),
    (119.0, opened(2)),
    (125.0, sample(0, 0, 0, 0)),
    (126.0, opened(2, "learning")),
    (127.0, BatchClosed(2, 4)),
    (128.0, opened(2, "stepping")),
    (130.0, WeightsPublished(2)),
    (140.0, sample(9, 9, 0, 0)),
)


def test_timeline_of_a_known_step() -> None:
    timeline = timeline_of(logged(*STEP_TWO))
    assert timeline is not None
    assert (timeline.step, timeline.seconds, timeline.is_over) == (2, 20.0, True)
    assert timeline.trainer.rows() == [
        (0, 7, "idle"), (7, 9, "learning"), (9, 16, "idle"), (16, 18, "learning"), (18, 20, "stepping"),
    ]  # fmt: skip
    assert trainer_shares(timeline)["idle"] == pytest.approx(14 / 20)
    assert timeline.stages["start"].to_list() == [0, 5, 15]
    # 5 s of 10 at the model, then 10 s of 4 there, 2 at the search and 2 between: 90 and 20 of 130 episode-seconds.
    assert stage_shares(timeline) == {
        "sampling": pytest.approx(90 / 130), "queued": 0.0, "searching": pytest.approx(20 / 130),
        "in between": pytest.approx(20 / 130),
    }  # fmt: skip
    assert step_summary(timeline) == [
        "trainer, of 20 s: learning 20%, stepping 10%, idle 70%",
        "episodes: sampling 69%, queued 0%, searching 15%, in between 15%",
    ]


def test_unfinished_step_ends_with_the_events() -> None:
    timeline = timeline_of(logged(*STEP_TWO[:9]), 2)
    assert timeline is not None
    assert (timeline.seconds, timeline.is_over) == (15.0, False)
    assert "in progress" in step_summary(timeline)[0]


def test_default_step_is_the_last_with_published_weights() -> None:
    events = logged(*STEP_TWO, (130.5, opened(3)), (135.0, MinibatchSubmitted(3, 1, 1, 1)))
    timeline = timeline_of(events)
    assert timeline is not None
    assert timeline.step == 2
    later = timeline_of(events, 3)
    assert later is not None
    assert (later.seconds, later.is_over) == (4.5, False)


def test_resumed_step_uses_the_last_session() -> None:
    again = [(moment + 1000, event) for moment, event in STEP_TWO[:8]]
    timeline = timeline_of(logged(*STEP_TWO, *again), 2)
    assert timeline is not None
    assert not timeline.is_over
    assert timeline.seconds == 9.0


def test_trainer_may_still_be_busy_with_the_previous_step() -> None:
    events = logged(
        (0, STARTED), (1, opened(1)), (4, opened(1, "learning")), (5, opened(2, "learning")), (6, opened(2, "stepping")),
        (8, opened(2)), (10, opened(2, "stepping")), (11, WeightsPublished(2)),
    )  # fmt: skip
    timeline = timeline_of(events, 2)
    assert timeline is not None
    assert timeline.trainer.rows() == [
        (0, 1, "learning"), (1, 3, "stepping"), (3, 5, "idle"), (5, 6, "stepping"),
    ]  # fmt: skip


def test_on_policy_step_starts_at_the_previous_weights() -> None:
    started = RunStarted("train", "m", True, "hash", settings={"pipeline": {"max_staleness": 0}})
    events = logged(
        (0, started), (1, opened(1)), (5, BatchClosed(1, 4)), (5, opened(2)), (8, WeightsPublished(1)),
        (10, BatchClosed(2, 4)), (11, WeightsPublished(2)),
    )  # fmt: skip
    timeline = timeline_of(events, 2)
    assert timeline is not None
    assert timeline.seconds == 3.0


def test_default_step_right_after_a_resume_is_the_previous_one() -> None:
    resumed = [(86_000.0, Notice("starting the service")), (86_010.0, STARTED), (86_020.0, opened(3))]
    timeline = timeline_of(logged(*STEP_TWO, (141.0, RunEnded("stopped")), *resumed))
    assert timeline is not None
    assert timeline.step == 2
    cut = timeline_of(logged(*STEP_TWO[:8], (131.0, RunEnded("stopped")), *resumed), 2)
    assert cut is not None
    assert cut.seconds == 21.0, "a step cut short by a stop ends with its session"


def test_no_such_step() -> None:
    assert timeline_of([]) is None
    assert timeline_of(logged((0, STARTED))) is None
    assert timeline_of(logged(*STEP_TWO), 7) is None


some_events = st.sampled_from(
    [event for _, event in STEP_TWO] + [opened(1), opened(3), BatchClosed(1, 4), WeightsPublished(1)]
)


@given(st.lists(st.tuples(st.floats(0, 50), some_events), max_size=30), st.sampled_from([None, 1, 2, 3]))
def test_any_events_give_a_consistent_timeline_or_none(rows: list[tuple[float, Event]], step: int | None) -> None:
    timeline = timeline_of(logged(*sorted(rows, key=lambda row: row[0])), step)
    if timeline is None:
        return
    spans = timeline.trainer
    assert (spans["end"] - spans["start"]).sum() == pytest.approx(timeline.seconds, abs=1e-6)
    assert spans["start"].to_list()[1:] == spans["end"].to_list()[:-1]
    assert all(0 <= second <= timeline.seconds for second in timeline.stages["start"])
    shares = stage_shares(timeline)
    assert not shares or sum(shares.values()) == pytest.approx(1.0)
    assert step_summary(timeline)
