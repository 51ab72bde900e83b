from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_async.errors import ConfigurationError
from searchr1_async.evaluation.statistics import (
    cluster_bootstrap,
    mcnemar_p_value,
    paired_difference,
    sign_flip_p_value,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (0, 10, 0.0, 0.27753),  # z^2 / (n + z^2)
        (10, 10, 0.72247, 1.0),
        (5, 10, 0.23659, 0.76341),  # 1/2 ± z / (2 sqrt(n + z^2))
        (81, 263, 0.2553, 0.3662),  # Newcombe (1998), Statistics in Medicine 17, table I
    ],
)
def test_wilson_agrees_with_published_values(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 100_000), st.floats(0, 1))
def test_wilson_stays_within_bounds_and_holds_the_proportion(trials: int, share: float) -> None:
    successes = round(share * trials)
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1
    assert low < high


def test_wilson_of_nothing_is_nan_and_nonsense_is_refused() -> None:
    assert all(map(math.isnan, wilson_interval(0, 0)))
    for successes, trials in ((1, 0), (-1, 5), (6, 5), (0, -1)):
        with pytest.raises(ConfigurationError):
            wilson_interval(successes, trials)


def test_wilson_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    for truth, trials in ((0.1, 50), (0.5, 200), (0.9, 30)):
        hits = 0
        for successes in rng.binomial(trials, truth, size=2000):
            low, high = wilson_interval(int(successes), trials)
            hits += low <= truth <= high
        assert 0.92 < hits / 2000 < 0.985


def test_the_bootstrap_widens_when_samples_of_a_question_agree() -> None:
    rng = np.random.default_rng(1)
    right = rng.integers(0, 2, size=100)
    values = np.repeat(right, 8)
    low, high = cluster_bootstrap(values, np.repeat(np.arange(100), 8).tolist())
    naive_low, naive_high = cluster_bootstrap(values, list(range(800)))
    assert high - low == pytest.approx(math.sqrt(8) * (naive_high - naive_low), rel=0.15)
    assert high - low == pytest.approx(2 * 1.96 * right.std() / 10, rel=0.1)


def test_the_bootstrap_is_seeded_and_takes_what_it_is_given() -> None:
    values, clusters = [0.0, 1.0, 1.0, 0.0, 1.0], ["a", "a", "b", "c", "c"]
    assert cluster_bootstrap(values, clusters, seed=3) == cluster_bootstrap(values, clusters, seed=3)
    assert cluster_bootstrap([0.1] * 3, ["a", "b", "c"]) == (pytest.approx(0.1), pytest.approx(0.1))
    assert all(map(math.isnan, cluster_bootstrap([], [])))
    with pytest.raises(ConfigurationError):
        cluster_bootstrap([1.0], [])


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4)), min_size=1, max_size=20))
@settings(deadline=None)
def test_the_bootstrap_stays_within_the_values(drawn: list[tuple[float, int]]) -> None:
    values = [value for value, _ in drawn]
    low, high = cluster_bootstrap(values, [cluster for _, cluster in drawn], resamples=200)
    assert min(values) - 1e-12 <= low <= np.mean(values) <= high <= max(values) + 1e-12


def test_mcnemar_is_the_exact_binomial_test() -> None:
    assert mcnemar_p_value(0, 0) == 1.0
    assert mcnemar_p_value(5, 0) == pytest.approx(2 / 32)
    assert mcnemar_p_value(3, 3) == 1.0
    assert mcnemar_p_value(15, 5) == pytest.approx(0.04138947)  # 2 * binom.cdf(5, 20, 0.5)
    assert mcnemar_p_value(7, 20) == mcnemar_p_value(20, 7)
    assert 0 < mcnemar_p_value(600, 400) < 1e-9
    assert mcnemar_p_value(30_000, 20_000) < 1e-100


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=14))
@settings(deadline=None)
def test_all_sign_flips_of_single_right_or_wrong_answers_are_mcnemars_test(pairs: list[tuple[float, float]]) -> None:
    difference = np.array([after - before for before, after in pairs])
    improved, worsened = int((difference > 0).sum()), int((difference < 0).sum())
    assert sign_flip_p_value(difference) == pytest.approx(mcnemar_p_value(improved, worsened))


def test_sampled_sign_flips_agree_with_the_exact_count() -> None:
    difference = np.array([1.0] * 15 + [-1.0] * 5)
    assert sign_flip_p_value(difference, 20_000) == pytest.approx(mcnemar_p_value(15, 5), abs=0.006)


def test_a_paired_difference_of_single_answers() -> None:
    before = [0.0] * 60 + [1.0] * 40
    after = [1.0] * 30 + [0.0] * 30 + [1.0] * 35 + [0.0] * 5
    found = paired_difference(before, after)
    assert found.mean == pytest.approx(0.25)
    assert (found.questions, found.improved, found.worsened) == (100, 30, 5)
    assert found.method == "mcnemar-exact"
    assert found.p_value == mcnemar_p_value(30, 5)
    assert found.interval.low < 0.25 < found.interval.high
    standard_error = np.std(np.array(after) - np.array(before)) / 10
    assert found.interval.high - found.interval.low == pytest.approx(2 * 1.96 * standard_error, rel=0.1)
    assert found == paired_difference(before, after)


def test_a_paired_difference_of_several_samples_compares_the_questions_means() -> None:
    before = [[0, 1, 0, 0], [0.5], [1, 1], *[[0, 1]] * 20]
    after = [[1, 1], [0.75], [1, 1, 1], *[[1, 1]] * 20]
    found = paired_difference(before, after)
    assert found.mean == pytest.approx((0.75 + 0.25 + 0 + 20 * 0.5) / 23)
    assert found.method == "sign-flip"
    assert 0 < found.p_value < 0.001
    assert paired_difference(before[:5], after[:5]).method == "sign-flip-exact"


def test_no_difference_is_no_evidence() -> None:
    same = paired_difference([0.0, 1.0, 1.0], [0.0, 1.0, 1.0])
    assert (same.mean, same.p_value, tuple(same.interval)) == (0.0, 1.0, (0.0, 0.0))


def test_under_chance_alone_small_p_values_are_as_rare_as_they_say() -> None:
    rng = np.random.default_rng(2)
    small = 0
    for _ in range(300):
        difference = rng.normal(size=10)
        small += sign_flip_p_value(difference) <= 0.05
    assert small / 300 < 0.09


@pytest.mark.parametrize(("before", "after"), [([], []), ([1.0], [1.0, 0.0]), ([[]], [[1.0]])])
def test_what_cannot_be_paired_is_refused(before: list, after: list) -> None:
    with pytest.raises(ConfigurationError):
        paired_difference(before, after)
