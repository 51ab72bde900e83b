"""Error bars for evaluations. Pure functions of numpy arrays; every resampling is seeded.

Sources:
    E. B. Wilson (1927), "Probable inference, the law of succession, and statistical inference", JASA 22.
    Q. McNemar (1947), "Note on the sampling error of the difference between correlated proportions", Psychometrika 12.
    B. Efron (1979), "Bootstrap methods: another look at the jackknife", Annals of Statistics 7.
    R. A. Fisher (1935), "The Design of Experiments", for the sign-flip permutation test.
    E. Miller (2024), "Adding error bars to evals", arXiv:2411.00640: cluster by question, compare pairwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from searchr1_async.errors import ConfigurationError

Z_95 = 1.959963984540054
"""The 97.5 % quantile of the standard normal distribution."""

RESAMPLES = 10_000
_EXACT_FLIPS = 14
"""Up to this many differing questions all 2^n sign patterns are counted; beyond it they are sampled."""
_CHUNK_CELLS = 2_000_000
"""Random cells drawn at a time: 16 MB, whatever the number of questions."""


class Interval(NamedTuple):
    """A 95 % interval; both ends NaN when there was nothing to measure."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """How ``after`` differs from ``before`` over the same questions."""

    mean: float
    """Mean over questions of after - before."""
    interval: Interval
    """95 %, by bootstrap over questions."""
    p_value: float
    """Two-sided: how probable so large a difference is if the order of before and after were chance."""
    questions: int
    improved: int
    """Questions with a better mean after than before."""
    worsened: int
    method: str
    """``mcnemar-exact``, ``sign-flip-exact`` or ``sign-flip``."""


def wilson_interval(successes: float, trials: int, z: float = Z_95) -> Interval:
    """Wilson's score interval for a proportion (Wilson 1927, eq. 1); honest at 0 and 1 and for few trials.

    ``successes`` may be fractional (a mean of graded scores). No trials give NaN.

    Raises:
        ConfigurationError: ``trials`` is negative or ``successes`` not within 0 to ``trials``.
    """
    if trials < 0 or not 0 <= successes <= trials:
        raise ConfigurationError(f"a proportion needs 0 <= successes <= trials, not {successes} of {trials}")
    if trials == 0:
        return Interval(math.nan, math.nan)
    share = successes / trials
    spread = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / spread
    half = z / spread * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # The bounds are analytically 0 and 1 at the ends; floating point would put them a hair off.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return Interval(min(low, share), max(high, share))


def cluster_bootstrap(
    values: ArrayLike, clusters: Sequence[object], *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """95 % percentile interval of the mean of ``values``, resampling whole clusters (Efron 1979; Miller 2024, §2.2).

    Samples of one question resemble each other; treating them as independent makes the interval too narrow.

    Args:
        values: shape ``[n]``.
        clusters: length ``n``, the question of each value.
        resamples: bootstrap samples.
        seed: of the resampling.

    Raises:
        ConfigurationError: lengths differ.
    """
    values_n = np.asarray(values, dtype=np.float64)
    if values_n.ndim != 1 or len(values_n) != len(clusters):
        raise ConfigurationError(f"{values_n.shape} values need as many clusters, not {len(clusters)}")
    if not len(values_n):
        return Interval(math.nan, math.nan)
    places: dict[object, int] = {}
    index_n = np.array([places.setdefault(cluster, len(places)) for cluster in clusters])
    sums_k = np.bincount(index_n, weights=values_n).astype(np.float64)
    sizes_k = np.bincount(index_n).astype(np.float64)
    means_r = _resampled_means(sums_k, sizes_k, resamples, np.random.default_rng(seed))
    return _percentiles(means_r, float(values_n.mean()))


def paired_difference(
    before: Sequence[ArrayLike], after: Sequence[ArrayLike], *, resamples: int = RESAMPLES, seed: int = 0
) -> PairedDifference:
    """Compare two evaluations of the same questions (Miller 2024, §4: pairing removes the questions' own variance).

    Args:
        before: for each question its samples' scores, shape ``[samples]`` each; a plain number is one sample.
        after: the same questions in the same order; the numbers of samples may differ.
        resamples: of the bootstrap over questions, and of the sign flips when they are sampled.
        seed: of both.

    The p-value is McNemar's exact one (1947; binomial over the questions that changed) when every question has one
    0/1 sample on both sides; otherwise that of a sign-flip permutation test (Fisher 1935) on the questions' mean
    differences, exact up to 14 questions that differ.

    Raises:
        ConfigurationError: there is no question, one without a sample, or the numbers of questions differ.
    """
    befores = [np.atleast_1d(np.asarray(scores, dtype=np.float64)) for scores in before]
    afters = [np.atleast_1d(np.asarray(scores, dtype=np.float64)) for scores in after]
    if len(befores) != len(afters) or not befores:
        raise ConfigurationError(f"cannot pair {len(befores)} questions before with {len(afters)} after")
    if any(scores.size == 0 for scores in (*befores, *afters)):
        raise ConfigurationError("every question needs at least one score before and after")
    difference_q = np.array([b.mean() for b in afters]) - np.array([a.mean() for a in befores])
    rng = np.random.default_rng(seed)
    means_r = _resampled_means(difference_q, np.ones_like(difference_q), resamples, rng)
    improved, worsened = int((difference_q > 0).sum()), int((difference_q < 0).sum())
    if all(scores.size == 1 and scores[0] in (0.0, 1.0) for scores in (*befores, *afters)):
        method, p_value = "mcnemar-exact", mcnemar_p_value(improved, worsened)
    else:
        exact = improved + worsened <= _EXACT_FLIPS
        method, p_value = "sign-flip-exact" if exact else "sign-flip", sign_flip_p_value(difference_q, resamples, rng)
    mean = float(difference_q.mean())
    return PairedDifference(mean, _percentiles(means_r, mean), p_value, len(difference_q), improved, worsened, method)


def mcnemar_p_value(improved: int, worsened: int) -> float:
    """McNemar's exact two-sided p-value: the changed questions are a fair coin under the null hypothesis."""
    changed = improved + worsened
    if changed == 0:
        return 1.0
    # Summed as integers and divided once: exact for any number of questions. Each term comes from the one before it.
    tail = term = 1
    for count in range(min(improved, worsened)):
        term = term * (changed - count) // (count + 1)
        tail += term
    return min(1.0, (2 * tail) / 2**changed)


def sign_flip_p_value(
    difference_q: NDArray[np.float64], resamples: int = RESAMPLES, rng: np.random.Generator | None = None
) -> float:
    """Two-sided p-value of a mean difference under random exchange of before and after, question by question.

    Args:
        difference_q: shape ``[questions]``; zeros carry no information and are left out.
        resamples: sign patterns drawn when there are too many to count all.
        rng: source of the patterns; seeded with 0 when None.
    """
    changed_c = difference_q[difference_q != 0]
    if not len(changed_c):
        return 1.0
    # Sums of floats differ in their last bits with the order of summing: equal ones must count as equal.
    observed = abs(changed_c.sum()) - 1e-9 * np.abs(changed_c).sum()
    if len(changed_c) <= _EXACT_FLIPS:
        patterns = np.arange(2 ** len(changed_c))[:, None] >> np.arange(len(changed_c)) & 1
        return float((np.abs((2 * patterns - 1) @ changed_c) >= observed).mean())
    rng = rng if rng is not None else np.random.default_rng(0)
    hits = 0
    for count in _chunks(resamples, len(changed_c)):
        signs = rng.integers(0, 2, size=(count, len(changed_c)), dtype=np.int8) * 2 - 1
        hits += int((np.abs(signs @ changed_c) >= observed).sum())
    return (hits + 1) / (resamples + 1)  # the observed pattern is one of them: never an impossible p of 0


def _resampled_means(
    sums_k: NDArray[np.float64], sizes_k: NDArray[np.float64], resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Means over ``resamples`` draws with replacement of ``k`` clusters, given each cluster's sum and size."""
    clusters = len(sums_k)
    means: list[NDArray[np.float64]] = []
    for count in _chunks(resamples, clusters):
        drawn = rng.integers(0, clusters, size=(count, clusters))
        means.append(sums_k[drawn].sum(axis=1) / sizes_k[drawn].sum(axis=1))
    return np.concatenate(means)


def _chunks(total: int, width: int) -> list[int]:
    size = max(1, _CHUNK_CELLS // max(width, 1))
    return [min(size, total - start) for start in range(0, total, size)]


def _percentiles(means_r: NDArray[np.float64], mean: float) -> Interval:
    low, high = np.percentile(means_r, [2.5, 97.5])
    # Rounding alone can put the mean of equal values outside by 1e-17.
    return Interval(min(float(low), mean), max(float(high), mean))
