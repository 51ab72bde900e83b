from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.config import LearningSettings, ScheduleName
from searchr1_async.training.learner import learning_rate_at

SCHEDULES: tuple[ScheduleName, ...] = get_args(ScheduleName)


def rates(schedule: ScheduleName, total: int, warmup: int = 0) -> list[float]:
    settings = LearningSettings(learning_rate=1.0, schedule=schedule, schedule_warmup=warmup)
    return [learning_rate_at(settings, step, total) for step in range(1, total + 1)]


def test_each_schedule_is_its_curve() -> None:
    assert rates("constant", 4) == [1.0] * 4
    assert rates("linear", 4) == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert rates("cosine", 4) == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466])


def test_a_warm_up_rises_in_a_line_to_the_peak() -> None:
    assert rates("constant", 6, warmup=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates("linear", 7, warmup=4) == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25])


@given(st.sampled_from(SCHEDULES), st.integers(1, 60), st.integers(0, 80))
def test_it_rises_to_one_peak_then_never_rises_and_is_never_nothing(
    schedule: ScheduleName, total: int, warmup: int
) -> None:
    all_rates = rates(schedule, total, warmup)
    assert all(0 < rate <= 1 for rate in all_rates)
    top = all_rates.index(max(all_rates))
    assert top == min(max(1, warmup), total) - 1
    assert all_rates[: top + 1] == sorted(all_rates[: top + 1])
    assert all_rates[top:] == sorted(all_rates[top:], reverse=True)


def test_a_step_past_the_end_has_the_last_rate() -> None:
    settings = LearningSettings(schedule="linear")
    assert learning_rate_at(settings, 12, 10) == learning_rate_at(settings, 10, 10)
