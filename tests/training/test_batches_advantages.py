from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.config import AdvantageName
from searchr1_async.training.batches import NOMINAL_TOKENS, advantages, token_weight

KINDS: tuple[AdvantageName, ...] = get_args(AdvantageName)
REWARDS = st.lists(st.floats(-1, 1), min_size=1, max_size=16)


@given(REWARDS, st.sampled_from(KINDS))
def test_advantages_sum_to_nothing_and_keep_the_order(rewards: list[float], kind: AdvantageName) -> None:
    given_ = advantages(rewards, kind)
    assert len(given_) == len(rewards)
    assert sum(given_) == pytest.approx(0, abs=1e-9)
    order = np.argsort(rewards, kind="stable")
    assert (np.diff(np.asarray(given_)[order]) >= -1e-12).all()


def test_centred_is_not_divided_by_the_deviation() -> None:
    assert advantages([1, 0, 0, 0]) == [0.75, -0.25, -0.25, -0.25]


def test_scaled_has_a_deviation_of_one_whatever_the_rewards_spread() -> None:
    for rewards in ([1.0, 0, 0, 0], [0.1, 0.0, 0.05, 0.1]):
        assert np.std(advantages(rewards, "scaled"), ddof=1) == pytest.approx(1, rel=1e-4)
    assert advantages([0.3, 0.3, 0.3], "scaled") == pytest.approx([0, 0, 0], abs=1e-9)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=16))
def test_leave_one_out_compares_with_the_others(rewards: list[float]) -> None:
    expected = [
        reward - sum(rewards[:place] + rewards[place + 1 :]) / (len(rewards) - 1)
        for place, reward in enumerate(rewards)
    ]
    assert advantages(rewards, "leave_one_out") == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_one_alone_has_nothing_to_be_compared_with(kind: AdvantageName) -> None:
    assert advantages([0.7], kind) == [0.0]
    assert advantages([], kind) == []


def test_every_episode_weighs_the_same_by_sequence_and_every_token_by_token() -> None:
    for tokens in (1, 40, NOMINAL_TOKENS, 3000):
        assert tokens * token_weight(tokens, "sequence") == pytest.approx(NOMINAL_TOKENS)
        assert token_weight(tokens, "token") == 1.0
