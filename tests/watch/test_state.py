"""Run state: values after known events, and robustness to any order."""

from __future__ import annotations

import json
import math
import time

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from searchr1_async.billing import TokenUsage
from searchr1_async.episodes.types import StopReason
from searchr1_async.events import (
    BatchClosed,
    BesideSampled,
    CheckpointSaved,
    EpisodeFinished,
    EvaluationFinished,
    Event,
    GroupDropped,
    GroupFinished,
    MinibatchLearned,
    MinibatchSubmitted,
    Notice,
    PhaseAdvanced,
    PhaseEnded,
    PhaseStarted,
    PipelineChanged,
    RolloutSampled,
    RunEnded,
    RunPaused,
    RunResumed,
    RunStarted,
    StepFinished,
    WeightsPublished,
)
from searchr1_async.models import Price
from searchr1_async.records.metrics import CURVES
from searchr1_async.watch.frame import frame, running_row, summary
from searchr1_async.watch.state import ALL_SUITES, RunState
from tests.watch.builders import HOSTILE, Script, episode, group, malformed_turn

REWARD = CURVES[0].column


def seen(*events: Event, at: float = 0.0) -> RunState:
    state = RunState()
    for event in events:
        state.see(event, at)
    return state


def sampled(finished: int = 0, tokens: int = 0, *, is_paused: bool = False, **search: float) -> RolloutSampled:
    named = {f"search/{name}": value for name, value in search.items()}
    return RolloutSampled(
        10, 6, 1, 2, 3, finished, 7 * tokens, tokens, named, "work", 0.001, 0.002, 0.003, 0.5, is_paused
    )


def test_complete_run() -> None:
    state = RunState()
    last = 0.0
    for at, event in Script(steps=30, groups=4, seconds_a_step=4, has_troubles=False).events():
        state.see(event, at)
        last = at
    assert (state.standing, state.reason, state.step, state.run.total_steps) == ("ended", "finished", 30, 30)
    assert state.seconds(last + 100) == pytest.approx(last), "the clock stops at the end"
    assert [row["label"] for row in state.evaluations if row["suite"] == ALL_SUITES] == [
        "untrained",
        "step 20",
        "after RL",
    ]
    assert len(state.steps) == 30
    assert state.finished_episodes == 960
    assert state.used.trained == 0, "4 groups do not fill a minibatch of 8"
    assert state.policy_version == 30
    assert state.phases == {}


def test_open_batch_resets_when_closed() -> None:
    wrong = episode(correct=0.0, turns=(malformed_turn(),))
    state = seen(EpisodeFinished(episode(), 1), EpisodeFinished(wrong, 1))
    batch = state.batch
    assert batch.episodes == 2
    assert batch.values == {"reward/total": 0.5, "correct": 0.5, "turns_per_episode": 1.5, "valid_calls": 0.5}
    assert batch.means.spread("reward/total") == pytest.approx(0.5)
    state.see(BatchClosed(1, 1), 0)
    assert state.batch.episodes == 0


def test_failed_episodes_count_and_have_no_values() -> None:
    failed = episode(stop_reason=StopReason.FAILED, turns=())
    batch = seen(EpisodeFinished(failed, 1)).batch
    assert (batch.episodes, batch.failed, batch.values) == (1, 1, {})
    assert batch.error == "SearchError: the store is gone"


def test_counts_continue_across_engines() -> None:
    """Each engine counts from 0."""
    state = seen(sampled(10, 100), sampled(20, 200), sampled(5, 50))
    assert (state.finished_episodes, state.used.sampled, state.used.prompt) == (25, 250, 1750)


def test_cost_includes_earlier_sessions_and_penalty() -> None:
    earlier = TokenUsage(prompt=10_000, cached=4_000, sampled=500, trained=2_000)
    begun = RunStarted("train", "m", False, "e", step=3, price=Price(1.0, 2.0, 3.0), used=earlier, spent=5.0)
    state = seen(begun, sampled(10, 100), BesideSampled(1_000, 250, 8), MinibatchLearned(4, 2, 602))
    session = TokenUsage(prompt=700 + 1_000, cached=250, sampled=100 + 8, trained=600)
    assert state.used == earlier + session
    assert state.cost.dollars == pytest.approx(5.0 + (1_450 + 0.2 * 250 + 2 * 108 + 3 * 600) / 1e6)
    unknown = seen(msgspec.structs.replace(begun, spent=None), sampled(10, 100))
    assert unknown.cost.text == "unknown"


def test_rates_use_a_recent_window() -> None:
    state = RunState()
    for second in range(60):
        # 2 episodes and 5 queries per second, then 10 and 20.
        episodes = 2 * second if second < 40 else 80 + 10 * (second - 40)
        queries = 5.0 * second if second < 40 else 200 + 20.0 * (second - 40)
        state.see(sampled(episodes, queries=queries), float(second))
    assert state.rates(59.0) == pytest.approx((10, 20))


def test_time_left_uses_recent_steps() -> None:
    state = seen(RunStarted("train", "m", True, "e", total_steps=10), PhaseStarted("train", 10, "steps"))
    for step in range(1, 6):
        state.see(StepFinished(step, {"time/total": 30.0}), 30.0 * step)
    phase = state.phases["train"]
    assert phase.done == 5
    assert phase.seconds_left(150.0) == pytest.approx(150.0)


def test_pausing() -> None:
    state = seen(RunStarted("train", "m", True, "e"), RunPaused())
    assert state.standing == "paused"
    state.see(RunResumed(), 0)
    assert state.standing == "running"
    state.see(sampled(is_paused=True), 0)
    assert state.standing == "running", "rollout processes report late: the run's own event counts"


def test_equal_warnings_are_merged() -> None:
    warning = Notice("the disk is nearly full", is_warning=True)
    warnings = seen(warning, Notice("by the way"), warning).warnings
    assert list(warnings) == ["the disk is nearly full"]


def test_constant_groups_raise_an_alert() -> None:
    alike, differing = group(corrects=(0.0, 0.0)), group(corrects=(1.0, 0.0))
    state = seen(RunStarted("train", "m", True, "e", group_size=2), *[GroupFinished(alike, 1)] * 20)
    assert state.constant_groups_in_a_row == 20
    assert any("All rewards were equal" in alert for alert in frame(state, 0.0)["alerts"])
    state.see(GroupFinished(differing, 1), 0)
    assert state.constant_groups_in_a_row == 0


def test_frame_of_a_long_run_is_small() -> None:
    state = seen(RunStarted("train", "m", True, "e"))
    for step in range(1, 1001):
        state.see(StepFinished(step, {"env/all/correct": step / 10_000}), float(step))
        state.see(EvaluationFinished("held out", step, {"exact_match": 0.5}), float(step))
        state.see(Notice(f"warning {step}", is_warning=True), float(step))
    assert [len(each) for each in (state.steps, state.evaluations)] == [1000, 1000]
    assert len(json.dumps(frame(state, 1000.0))) < 5000


def test_non_finite_values_are_missing() -> None:
    state = seen(StepFinished(1, {REWARD: math.nan, CURVES[2].column: math.inf}))
    state.see(EvaluationFinished("nothing", 1, {"exact_match": math.nan}), 0)
    assert state.steps == [dict.fromkeys(curve.name for curve in CURVES) | {"step": 1.0}]
    assert state.evaluations == []


def test_hostile_text_is_visible_and_short() -> None:
    state = seen(
        RunStarted("train", HOSTILE, False, HOSTILE),
        PhaseStarted("train", 3, HOSTILE, HOSTILE),
        Notice(HOSTILE * 20_000, is_warning=True),
        EvaluationFinished(HOSTILE, 1, {"exact_match": 0.5, f"exact_match/{HOSTILE}": 0.5, "exact_match/b": 0.1}),
    )
    said = json.dumps(frame(state, 0.0), ensure_ascii=False) + summary(state, 0.0)
    assert len(said) < 8000
    for unseen in ("\x1b", "\u202e", "\x00", "\udcff"):
        assert unseen not in said
    assert "\\\\x1b" in said


_counts = st.integers(0, 10**6)
_metrics = st.dictionaries(
    st.sampled_from(
        [*(curve.column for curve in CURVES), "exact_match", "exact_match_low", "exact_match/a", "time/total"]
    ),
    st.floats(),
    max_size=4,
)
_phases = st.sampled_from(["train", "evaluate", "index"])
_small_floats = st.floats(0, 10)
_events: st.SearchStrategy[Event] = st.one_of(
    st.builds(RunStarted, st.just("train"), st.text(max_size=5), st.booleans(), st.text(max_size=5), step=_counts),
    st.builds(Notice, st.text(max_size=5), st.booleans()),
    st.builds(PhaseStarted, _phases, _counts, st.just("steps")),
    st.builds(PhaseAdvanced, _phases, _counts, _metrics),
    st.builds(PhaseEnded, _phases, _small_floats),
    st.builds(
        RolloutSampled,
        *[_counts] * 8,
        st.dictionaries(st.sampled_from(["search/queries", "search/failed", "search/p50"]), st.floats()),
        st.sampled_from(["work", "service", "client", "new"]),
        *[_small_floats] * 4,
        st.booleans(),
    ),
    st.builds(PipelineChanged, *[_counts] * 5, st.sampled_from(["idle", "learning", "stepping"])),
    st.sampled_from(
        [
            EpisodeFinished(episode(), 1),
            EpisodeFinished(episode(stop_reason=StopReason.FAILED, turns=()), 1),
            GroupFinished(group(), 1),
            GroupFinished(group(corrects=()), 1),
            GroupDropped(group(), 1, "constant_reward"),
            MinibatchSubmitted(1, 1, 1, 1),
            RunPaused(),
            RunResumed(),
            RunEnded("finished"),
        ]
    ),
    st.builds(MinibatchLearned, _counts, _counts, _counts),
    st.builds(BatchClosed, _counts, _counts),
    st.builds(WeightsPublished, _counts),
    st.builds(StepFinished, _counts, _metrics),
    st.builds(EvaluationFinished, st.text(max_size=5), st.none() | _counts, _metrics),
    st.builds(CheckpointSaved, _counts, st.text(max_size=5)),
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(_events, st.floats(0, 5)), max_size=40))
def test_any_order_of_events_is_handled(events: list[tuple[Event, float]]) -> None:
    state, now = RunState(), 0.0
    for event, wait in events:
        now += wait
        state.see(event, now)
        _is_sane(state, now)
    summary(state, now)


def _is_sane(state: RunState, now: float) -> None:
    json.dumps(frame(state, now), allow_nan=False)
    json.dumps([state.search, state.evaluations, running_row(state)], allow_nan=False)
    for value in (
        state.seconds(now),
        state.finished_episodes,
        *state.rates(now),
    ):
        assert value >= 0
    assert min(state.used.prompt, state.used.sampled, state.used.trained) >= 0
    assert state.batch.failed <= state.batch.episodes
    steps = [row["step"] or 0.0 for row in state.steps]
    assert steps == sorted(set(steps))


def test_folding_an_event_takes_microseconds() -> None:
    """Called up to a hundred times per second on the event loop; takes 3 us, the bound is generous."""
    state, event = RunState(), EpisodeFinished(episode(), 1)
    began = time.thread_time()
    for _ in range(5000):
        state.see(event, 0.0)
    assert (time.thread_time() - began) / 5000 < 100e-6
