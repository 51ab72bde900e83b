from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.intervals import run as intervals
from searchr1_async.errors import ConfigurationError
from searchr1_async.records.statistics import (
    difference_intervals,
    difference_of,
    holm_adjusted,
    mcnemar_p_value,
    mean_interval,
    mean_intervals,
    pass_at_k,
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


def test_mcnemar_is_the_binomial_test_exact_or_by_mid_p() -> None:
    for mid_p in (False, True):
        assert mcnemar_p_value(0, 0, mid_p=mid_p) == 1.0
        assert mcnemar_p_value(3, 3, mid_p=mid_p) == 1.0
        assert mcnemar_p_value(7, 20, mid_p=mid_p) == mcnemar_p_value(20, 7, mid_p=mid_p)
        assert 0 < mcnemar_p_value(600, 400, mid_p=mid_p) < 1e-9
        assert mcnemar_p_value(30_000, 20_000, mid_p=mid_p) < 1e-100
    assert mcnemar_p_value(5, 0, mid_p=False) == pytest.approx(2 / 32)
    assert mcnemar_p_value(5, 0) == pytest.approx(1 / 32)
    assert mcnemar_p_value(15, 5, mid_p=False) == pytest.approx(0.04138947)  # 2 * binom.cdf(5, 20, 0.5)
    assert mcnemar_p_value(15, 5) == pytest.approx(0.04138947 - math.comb(20, 5) / 2**20)  # less binom.pmf(5, 20, 0.5)
    assert mcnemar_p_value(1, 7) == pytest.approx((2 * (1 + 8) - 8) / 256)


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=14))
@settings(deadline=None)
def test_all_sign_flips_of_single_right_or_wrong_answers_are_mcnemars_test(pairs: list[tuple[float, float]]) -> None:
    difference = np.array([after - before for before, after in pairs])
    improved, worsened = int((difference > 0).sum()), int((difference < 0).sum())
    assert sign_flip_p_value(difference) == pytest.approx(mcnemar_p_value(improved, worsened, mid_p=False))


def test_sampled_sign_flips_agree_with_the_exact_count() -> None:
    difference = np.array([1.0] * 15 + [-1.0] * 5)
    assert sign_flip_p_value(difference, 20_000) == pytest.approx(mcnemar_p_value(15, 5, mid_p=False), abs=0.006)


def test_a_paired_difference_of_single_answers() -> None:
    before = [0.0] * 60 + [1.0] * 40
    after = [1.0] * 30 + [0.0] * 30 + [1.0] * 35 + [0.0] * 5
    difference = np.array(after) - np.array(before)
    found = difference_of(difference, is_single=True)
    assert found.mean == pytest.approx(0.25)
    assert (found.questions, found.improved, found.worsened) == (100, 30, 5)
    assert found.method == "mcnemar-midp"
    assert found.p_value == mcnemar_p_value(30, 5)
    assert found.interval.low < 0.25 < found.interval.high
    standard_error = np.std(difference) / 10
    assert found.interval.high - found.interval.low == pytest.approx(2 * 1.96 * standard_error, rel=0.1)
    assert found == difference_of(difference, is_single=True)


def test_a_paired_difference_of_several_samples_compares_the_questions_means() -> None:
    before = [[0, 1, 0, 0], [0.5], [1, 1], *[[0, 1]] * 20]
    after = [[1, 1], [0.75], [1, 1, 1], *[[1, 1]] * 20]
    difference = np.array([np.mean(own) for own in after]) - np.array([np.mean(own) for own in before])
    found = difference_of(difference, is_single=False)
    assert found.mean == pytest.approx((0.75 + 0.25 + 0 + 20 * 0.5) / 23)
    assert found.method == "sign-flip"
    assert 0 < found.p_value < 0.001
    assert difference_of(difference[:5], is_single=False).method == "sign-flip-exact"


def test_no_difference_is_no_evidence() -> None:
    same = difference_of(np.zeros(3), is_single=True)
    assert (same.mean, same.p_value) == (0.0, 1.0)
    assert same.interval.low == -same.interval.high < -0.5, "three questions prove no equality"
    assert difference_of(np.zeros(5000), is_single=False).interval.high < 0.001


def test_under_chance_alone_small_p_values_are_as_rare_as_they_say() -> None:
    rng = np.random.default_rng(2)
    small = 0
    for _ in range(300):
        difference = rng.normal(size=10)
        small += sign_flip_p_value(difference) <= 0.05
    assert small / 300 < 0.09


# --- intervals of means -----------------------------------------------------------------------------------------------

# Excludes scores within rounding of 0 or 1: 1 - 1e-146 is 1, and 0/1 scores get Wilson's interval.
scores = st.lists(
    st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 1.0]) | st.floats(0, 1).map(lambda value: round(value, 9)),
    min_size=1,
    max_size=60,
)


@given(scores)
@settings(deadline=None)
def test_an_interval_of_scores_holds_their_mean_stays_within_bounds_and_is_never_a_point(values: list[float]) -> None:
    low, high = mean_interval(values)
    assert 0 <= low <= np.mean(values) + 1e-12
    assert np.mean(values) - 1e-12 <= high <= 1
    assert high - low > 1e-3
    assert mean_interval([1 - value for value in values]) == pytest.approx((1 - high, 1 - low), abs=1e-6)


@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_of_right_and_wrong_answers_it_is_wilsons(right: list[bool]) -> None:
    assert mean_interval(right) == pytest.approx(wilson_interval(sum(right), len(right)))


def test_what_is_measured_at_once_is_what_is_measured_alone() -> None:
    values = np.random.default_rng(0).integers(0, 5, (6, 40)) / 4
    lows, highs = mean_intervals(values)
    for own, low, high in zip(values, lows, highs, strict=True):
        assert mean_interval(own) == pytest.approx((low, high))


def test_samples_that_agree_are_worth_one_and_samples_that_differ_more() -> None:
    agreeing = mean_interval([1.0] * 50 + [0.0] * 50)
    differing = mean_interval([0.5, 0.25, 0.75, 0.5] * 25)
    assert agreeing == pytest.approx(wilson_interval(50, 100))
    assert differing.high - differing.low < 0.4 * (agreeing.high - agreeing.low)


def test_the_same_score_of_every_question_is_no_certainty() -> None:
    assert mean_interval([0.0] * 50) == wilson_interval(0, 50)
    assert mean_interval([0.5] * 50) == pytest.approx(wilson_interval(25, 50))
    assert all(map(math.isnan, mean_interval([])))
    assert mean_interval([1.0]) == wilson_interval(1, 1)


def test_other_figures_than_scores_have_students_interval() -> None:
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), abs=1e-3)
    assert all(map(math.isnan, mean_interval([2.0])))


def test_a_macro_average_weighs_suites_alike_and_each_brings_its_own_width() -> None:
    large, small = [1.0, 0.0] * 5000, [0.0] * 50
    low, high = mean_interval(large, small)
    assert low < 0.25 < high
    assert high - 0.25 == pytest.approx(wilson_interval(0, 50).high / 2, rel=0.05)
    assert mean_interval(large, [], small) == (low, high)
    assert mean_interval(small) == pytest.approx(wilson_interval(0, 50))
    assert all(map(math.isnan, mean_interval([], [])))


def test_pass_at_k_is_chens_estimator() -> None:
    for samples, right, k in ((10, 3, 4), (8, 0, 8), (8, 8, 1), (5, 2, 5), (200, 1, 100)):
        expected = 1 - math.comb(samples - right, k) / math.comb(samples, k)
        assert pass_at_k([samples], [right], k)[0] == pytest.approx(expected)
    assert pass_at_k([], [], 3).shape == (0,)
    for samples, k in ((3, 4), (3, 0)):
        with pytest.raises(ConfigurationError, match="pass@"):
            pass_at_k([samples], [1], k)


# --- differences ------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.125, 1.0]) | st.floats(0.05, 1), min_size=1, max_size=60))
@settings(deadline=None)
def test_an_interval_of_differences_holds_their_mean_and_turns_with_their_sign(values: list[float]) -> None:
    difference = np.array(values)
    low, high = difference_intervals(difference)
    assert -1 <= low <= difference.mean() + 1e-9
    assert difference.mean() - 1e-9 <= high <= 1
    assert high - low > 1e-3
    assert difference_intervals(-difference) == pytest.approx((-high, -low), abs=1e-9)


def test_the_interval_of_a_difference_is_students_where_questions_are_many() -> None:
    difference = np.random.default_rng(3).integers(-4, 6, 4000) / 5
    low, high = difference_intervals(difference)
    half = 1.96 * difference.std() / math.sqrt(4000)
    assert (low, high) == pytest.approx((difference.mean() - half, difference.mean() + half), abs=1e-3)
    assert difference_intervals(difference) == pytest.approx((low, high))
    both_low, both_high = difference_intervals(difference, difference)
    assert both_high - both_low == pytest.approx((high - low) / math.sqrt(2))


def test_where_nothing_changed_more_questions_prove_more() -> None:
    assert difference_intervals(np.zeros(100)) == pytest.approx((-0.0196, 0.0196), abs=5e-4)
    assert difference_intervals(np.zeros(1)) == (-1, 1)


def test_differences_of_many_questions_are_as_cheap_as_of_few() -> None:
    difference = np.random.default_rng(0).integers(-8, 9, 50_000) / 8
    found = difference_of(difference, is_single=False)
    assert found.questions == 50_000
    assert 0.001 < found.p_value <= 1
    assert found.improved + found.worsened == int((difference != 0).sum())


def test_holms_correction_of_several_comparisons() -> None:
    def adjusted(*p_values: float) -> list[float]:
        return pl.DataFrame({"p": p_values}, schema={"p": pl.Float64}).select(holm_adjusted("p"))["p"].to_list()

    assert adjusted(0.01, 0.04, 0.03, 0.005) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjusted(0.9, 0.8) == [1.0, 1.0]
    assert adjusted(0.02, 0.02) == [0.04, 0.04]
    assert adjusted() == []


# --- simulation -------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # 8 s; benchmarks/intervals is the whole of it
def test_intervals_hold_the_truth_and_tests_are_wrong_as_often_as_they_say() -> None:
    """The cells of `benchmarks/intervals` where a plain bootstrap or an unclustered interval fails."""
    simulation = intervals.Simulation(4000, bootstrap=False)
    intervals.simulate_exact_match(simulation, (125, 500), (0.3, 0.5))
    intervals.simulate_samples(simulation, (50,), (0.1, 0.5), ("medium", "strong"))
    intervals.simulate_f1(simulation, (125,))
    intervals.simulate_macro(simulation, ["5 suites of 50 to 500"])
    intervals.simulate_differences(simulation, (500,), (0.5,), ("same",))
    table = simulation.table()
    found = table.filter(kind="coverage", method="ours")
    assert found.height > 12
    assert intervals.outside(found).rows() == []
    assert (table.filter(method="unclustered", k=8, clustering="strong")["rate"] < 0.65).all()
    wrong = table.filter(kind="false positives")
    assert wrong["method"].n_unique() == 3
    assert (wrong["rate"] <= 0.065).all()
