"""Error bars for evaluations. Pure functions of numpy arrays; every resampling is seeded.

``benchmarks/intervals`` measures coverage and false-positive rates by simulation. Questions are the clusters, and comparisons are paired
(E. Miller 2024, "Adding error bars to evals", arXiv:2411.00640).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from searchr1_async.errors import ConfigurationError

Z_95 = 1.959963984540054
"""The 97.5 % quantile of the standard normal distribution."""

RESAMPLES = 10_000
_DRAWS = 1000
"""Sign patterns drawn at once, which bounds memory."""
_EXACT_FLIPS = 14
"""Enumerates all 2^n sign patterns up to this many changed questions; samples beyond."""
_FULL_CLUSTERING_QUESTIONS = 0.5
"""Prior weight, in questions, of samples always agreeing; see :func:`mean_intervals`."""
_ROUNDING = 1e-12

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A 95 % interval; NaN without data."""

    low: float
    high: float


class Estimate(NamedTuple):
    """A mean with its 95 % interval; NaN without data."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Difference between two evaluations of the same questions."""

    mean: float
    """Mean over questions of after - before."""
    interval: Interval
    """95 %, over questions."""
    p_value: float
    """Two-sided; null hypothesis: before and after are exchangeable."""
    questions: int
    improved: int
    """Questions whose mean is higher after than before."""
    worsened: int
    method: str
    """``mcnemar-midp``, ``sign-flip-exact`` or ``sign-flip``."""


# --- intervals of means -----------------------------------------------------------------------------------------------


def wilson_interval(successes: float, trials: int) -> Interval:
    """Wilson's score interval for a proportion (Wilson 1927, eq. 1).

    ``successes`` may be fractional. NaN for zero trials.

    Raises:
        ConfigurationError: ``trials`` is negative or ``successes`` is outside 0 to ``trials``.
    """
    if trials < 0 or not 0 <= successes <= trials:
        raise ConfigurationError(f"a proportion needs 0 <= successes <= trials, not {successes} of {trials}")
    if trials == 0:
        return Interval(math.nan, math.nan)
    return _interval(_wilson(np.array(successes / trials), np.array(float(trials)), np.array(Z_95)))


def mean_interval(*suites: ArrayLike) -> Interval:
    """95 % interval of the mean over questions, NaN without data: :func:`mean_intervals`.

    Of several suites, that of the unweighted mean over suites: :func:`macro_intervals`. Empty suites are excluded.
    """
    kept = [values for suite in suites if (values := np.asarray(suite, dtype=np.float64)).size]
    if not kept:
        return Interval(math.nan, math.nan)
    return _interval(mean_intervals(kept[0]) if len(kept) == 1 else macro_intervals(kept))


def _interval(ends: tuple[Floats, Floats]) -> Interval:
    return Interval(*map(float, ends))


def mean_intervals(values: Floats) -> tuple[Floats, Floats]:
    """95 % intervals of means over questions: Wilson's score interval with the effective number of questions.

    Args:
        values: shape ``[…, questions]``: each question's mean over its samples, so correlated samples form one cluster.

    Returns:
        Low and high ends, shape ``[…]``.

    Scores in [0, 1] with mean m have variance at most ``m (1 - m)``, reached by 0/1 scores. The effective number of
    questions is n times that bound over the observed variance (Korn & Graubard 1998), with Student's quantile in place of
    Wilson's z. One 0/1 sample per question gives Wilson's interval itself. The interval stays within [0, 1]; equal scores
    give the interval of n 0/1 questions, never a point.

    When few questions were ever right (or wrong), the observed variance is unreliable: it is mixed with its bound, weighted
    as half a question.

    Values outside [0, 1] (a reward, a number of turns) get Student's interval.
    """
    questions = values.shape[-1]
    is_score = questions and values.min() >= 0 and values.max() <= 1
    if not questions or (questions == 1 and not is_score):
        return np.full(values.shape[:-1], math.nan), np.full(values.shape[:-1], math.nan)
    mean = values.mean(axis=-1)
    if not is_score:
        half = _t_95(questions - 1) * values.std(axis=-1, ddof=1) / math.sqrt(questions)
        return mean - half, mean + half
    mean = mean.clip(0.0, 1.0)
    bound = mean * (1 - mean)
    binary = ((values == 0) | (values == 1)).all(axis=-1)
    variance = values.var(axis=-1, ddof=1) if questions > 1 else bound
    certain = binary | (variance <= _ROUNDING) | (bound <= _ROUNDING)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(certain, 1.0, variance / bound)
    telling = np.minimum((values > _ROUNDING).sum(axis=-1), (values < 1 - _ROUNDING).sum(axis=-1))
    weight = _FULL_CLUSTERING_QUESTIONS / (telling + _FULL_CLUSTERING_QUESTIONS)
    ratio = ratio + np.maximum(1 - ratio, 0.0) * weight
    z = np.where(certain, Z_95, _t_95(questions - 1) if questions > 1 else Z_95)
    return _wilson(mean, questions / ratio, z)


def macro_intervals(suites: Sequence[Floats]) -> tuple[Floats, Floats]:
    """95 % intervals of the unweighted mean over suites, each of shape ``[…, questions]``, none empty.

    Combines the suites' own intervals by adding the squared distances to their ends (Zou & Donner 2008).
    """
    means = np.array([suite.mean(axis=-1) for suite in suites])
    ends = [mean_intervals(suite) for suite in suites]
    below = means - np.array([low for low, _ in ends])
    above = np.array([high for _, high in ends]) - means
    mean = means.mean(axis=0)
    return mean - np.sqrt((below**2).sum(axis=0)) / len(suites), mean + np.sqrt((above**2).sum(axis=0)) / len(suites)


def pass_at_k(samples: ArrayLike, right: ArrayLike, k: int) -> Floats:
    """Unbiased pass@k of each question (Chen et al. 2021, eq. 1).

    Args:
        samples: number of samples, shape ``[questions]``; at least k.
        right: number of correct samples, shape ``[questions]``.

    Raises:
        ConfigurationError: k is below 1, or a question has fewer than k samples.
    """
    samples_q, right_q = np.asarray(samples, dtype=np.int64), np.asarray(right, dtype=np.int64)
    if k < 1 or (samples_q < k).any():
        raise ConfigurationError(f"pass@{k} needs k of at least 1 and at least k samples of every question")
    wrong_q = samples_q - right_q
    # C(n - c, k) / C(n, k) as a product of k factors: avoids overflow, and is 0 if fewer than k samples are wrong.
    factors = (wrong_q[:, None] - np.arange(k)).clip(0) / (samples_q[:, None] - np.arange(k))
    return 1.0 - factors.prod(axis=1)


# --- paired comparison ------------------------------------------------------------------------------------------------


def difference_of(*suites: Floats, is_single: bool, resamples: int = RESAMPLES, seed: int = 0) -> PairedDifference:
    """Compares two evaluations of the same questions (Miller 2024, §4: pairing removes between-question variance).

    Args:
        suites: per question, its mean score after less that before, shape ``[questions]``, at least one. Several suites have
            equal weights; to pool their questions, pass them as one.
        is_single: each side has one 0/1 sample per question, so differences are -1, 0 or 1.
        resamples: number of sampled sign flips.
        seed: seed of the sampled sign flips.

    The p-value is McNemar's mid-p (Fagerland et al. 2013) for one suite if ``is_single``, otherwise that of a sign-flip permutation
    test (Fisher 1935), exact up to 14 changed questions. The interval is :func:`difference_intervals`.
    """
    suites = tuple(np.where(np.abs(own) <= _ROUNDING, 0.0, own) for own in suites)
    difference_q = np.concatenate(suites)
    improved, worsened = int((difference_q > 0).sum()), int((difference_q < 0).sum())
    if is_single and len(suites) == 1:
        method, p_value = "mcnemar-midp", mcnemar_p_value(improved, worsened)
    else:
        method = "sign-flip-exact" if improved + worsened <= _EXACT_FLIPS else "sign-flip"
        weighted = np.concatenate([own * (len(difference_q) / (len(suites) * len(own))) for own in suites])
        p_value = sign_flip_p_value(weighted, resamples, np.random.default_rng(seed))
    mean, interval = float(np.mean([own.mean() for own in suites])), _interval(difference_intervals(*suites))
    return PairedDifference(mean, interval, p_value, len(difference_q), improved, worsened, method)


def difference_intervals(*suites: Floats) -> tuple[Floats, Floats]:
    """95 % intervals of mean differences, or of the unweighted mean over several suites, within [-1, 1] if all differences are.

    Args:
        suites: shape ``[…, questions]``, at least one question each.

    Student's interval with one pseudo-question added, changed by the typical amount (by 1 if nothing changed), half up and
    half down; after Bonett & Price (2012), who add two. An unchanged comparison therefore keeps a non-zero width.
    """
    parts = [_centre_and_half(own) for own in suites]
    centre = np.mean([centre for centre, _ in parts], axis=0)
    half = np.sqrt(np.sum([half**2 for _, half in parts], axis=0)) / len(suites)
    mean = np.mean([own.mean(axis=-1) for own in suites], axis=0)
    low, high = np.minimum(centre - half, mean), np.maximum(centre + half, mean)
    bounded = all(np.abs(own).max() <= 1 for own in suites)
    return (low.clip(-1, 1), high.clip(-1, 1)) if bounded else (low, high)


def _centre_and_half(difference: Floats) -> tuple[Floats, Floats]:
    questions = difference.shape[-1]
    squares, changed = (difference**2).sum(axis=-1), (np.abs(difference) > _ROUNDING).sum(axis=-1)
    usual = np.where(changed > 0, squares / np.maximum(changed, 1), 1.0)
    centre = difference.sum(axis=-1) / (questions + 1)
    variance = ((squares + usual) / (questions + 1) - centre**2).clip(0)
    # At least one degree of freedom: a single question plus the pseudo-question.
    return centre, _t_95(max(questions - 1, 1)) * np.sqrt(variance / (questions + 1))


def mcnemar_p_value(improved: int, worsened: int, *, mid_p: bool = True) -> float:
    """McNemar's two-sided p-value: under the null hypothesis, changed questions are a fair coin.

    ``mid_p`` counts the observed outcome by half (Fagerland et al. 2013); the exact test is too conservative.
    """
    from scipy.special import bdtr

    changed, fewer = improved + worsened, min(improved, worsened)
    if changed == 0:
        return 1.0
    at_most = bdtr(fewer, changed, 0.5)
    other_tail = bdtr(fewer - 1, changed, 0.5) if fewer else 0.0
    return min(1.0, float(at_most + (other_tail if mid_p else at_most)))


def sign_flip_p_value(
    difference_q: Floats, resamples: int = RESAMPLES, rng: np.random.Generator | None = None
) -> float:
    """Two-sided p-value of a mean difference when before and after are swapped at random per question.

    Args:
        difference_q: shape ``[questions]``; zeros are ignored.
        resamples: sign patterns to draw if there are too many to enumerate.
        rng: seeded with 0 if None.
    """
    changed_c = difference_q[difference_q != 0]
    if not len(changed_c):
        return 1.0
    # Float sums differ in their last bits with summation order: the tolerance makes equal sums count as equal.
    observed = abs(changed_c.sum()) - 1e-9 * np.abs(changed_c).sum()
    if len(changed_c) <= _EXACT_FLIPS:
        patterns = np.arange(2 ** len(changed_c))[:, None] >> np.arange(len(changed_c)) & 1
        return float((np.abs((2 * patterns - 1) @ changed_c) >= observed).mean())
    rng = rng if rng is not None else np.random.default_rng(0)
    # Differences of equal size flip together: the number of positive ones is binomial.
    sizes, counts = np.unique(np.abs(changed_c).round(12), return_counts=True)
    hits = 0
    for first in range(0, resamples, _DRAWS):
        draws = min(_DRAWS, resamples - first)
        sums = (2 * rng.binomial(counts, 0.5, size=(draws, len(sizes))) - counts) @ sizes
        hits += int((np.abs(sums) >= observed).sum())
    return (hits + 1) / (resamples + 1)  # includes the observed pattern, so p is never 0


def holm_adjusted(p_value: str) -> pl.Expr:
    """Holm-adjusted p-values of this column (family-wise error; Holm 1979)."""
    own = pl.col(p_value)
    largest = (own.sort() * pl.int_range(pl.len(), 0, -1)).cum_max().clip(upper_bound=1.0)
    return largest.gather(own.rank("ordinal") - 1)


def _wilson(share: Floats, trials: Floats, z: Floats) -> tuple[Floats, Floats]:
    spread = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / spread
    half = z / spread * np.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # The bounds are exactly 0 and 1 at the ends; floating point would be slightly off.
    low = np.where(share <= 0, 0.0, np.maximum(0.0, centre - half))
    high = np.where(share >= 1, 1.0, np.minimum(1.0, centre + half))
    return np.minimum(low, share), np.maximum(high, share)


def _t_95(degrees: int) -> float:
    """97.5 % quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.975))
