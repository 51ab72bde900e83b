from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.learn.advantages import centred_advantages


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=16))
def test_advantages_sum_to_nothing_and_keep_the_order(rewards: list[float]) -> None:
    advantages = centred_advantages(rewards)
    assert sum(advantages) == pytest.approx(0, abs=1e-9)
    for advantage, reward in zip(advantages, rewards, strict=True):
        assert advantage - advantages[0] == pytest.approx(reward - rewards[0])


def test_is_not_divided_by_the_deviation() -> None:
    assert centred_advantages([1, 0, 0, 0]) == [0.75, -0.25, -0.25, -0.25]
