"""Error bars for evaluations. Pure functions of numpy arrays; every resampling is seeded.

How often the intervals hold the truth, and how often the tests are wrong, is measured by simulation: see
``benchmarks/intervals`` and ``benchmarks/results/intervals.md``.

Sources:
    E. B. Wilson (1927), "Probable inference, the law of succession, and statistical inference", JASA 22.
    Q. McNemar (1947), "Note on the sampling error of the difference between correlated proportions", Psychometrika 12.
    M. W. Fagerland, S. Lydersen, P. Laake (2013), "The McNemar test for binary matched-pairs data: mid-p and asymptotic are
    better than exact conditional", BMC Medical Research Methodology 13.
    D. G. Bonett, R. M. Price (2012), "Adjusted Wald confidence interval for a difference of binomial proportions based on
    paired data", Journal of Educational and Behavioral Statistics 37.
    G. Y. Zou, A. Donner (2008), Statistics in Medicine 27: intervals of sums from intervals of their parts.
    E. L. Korn, B. I. Graubard (1998), Survey Methodology 24: the effective number of trials of clustered proportions.
    B. Efron (1979), "Bootstrap methods: another look at the jackknife", Annals of Statistics 7.
    R. A. Fisher (1935), "The Design of Experiments", for the sign-flip permutation test.
    S. Holm (1979), "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6.
    M. Chen et al. (2021), "Evaluating large language models trained on code", arXiv:2107.03374, eq. 1: pass@k.
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
_T_95 = np.array([math.inf, 12.7062, 4.3027, 3.1824, 2.7764])
"""97.5 % quantiles of Student's distribution for 0 to 4 degrees of freedom, where the expansion is not exact enough."""
_FULL_CLUSTERING_QUESTIONS = 0.5
"""Weight, in questions, of the belief that samples of a question always agree; see :func:`mean_intervals`."""
_ROUNDING = 1e-12

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A 95 % interval; both ends NaN when there was nothing to measure."""

    low: float
    high: float


class Estimate(NamedTuple):
    """A mean with its 95 % interval; all NaN when there was nothing to measure."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """How ``after`` differs from ``before`` over the same questions."""

    mean: float
    """Mean over questions of after - before."""
    interval: Interval
    """95 %, over questions."""
    p_value: float
    """Two-sided: how probable so large a difference is if the order of before and after were chance."""
    questions: int
    improved: int
    """Questions with a better mean after than before."""
    worsened: int
    method: str
    """``mcnemar-midp``, ``sign-flip-exact`` or ``sign-flip``."""


# --- intervals of means -----------------------------------------------------------------------------------------------


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
    low, high = _wilson(np.array(successes / trials), np.array(float(trials)), np.array(z))
    return Interval(float(low), float(high))


def mean_interval(values: ArrayLike) -> Interval:
    """95 % interval of the mean over questions; of nothing NaN. See :func:`mean_intervals`."""
    low, high = mean_intervals(np.asarray(values, dtype=np.float64))
    return Interval(float(low), float(high))


def mean_intervals(values: Floats) -> tuple[Floats, Floats]:
    """95 % intervals of means over questions: Wilson's score interval with the effective number of questions.

    Args:
        values: shape ``[…, questions]``, each question's score, or the mean over its samples: so the samples of a question,
            which resemble each other, count as one cluster.

    Returns:
        The low and the high ends, shape ``[…]``.

    Scores from 0 to 1 vary at most by ``m (1 - m)`` about their mean m, and do when they are all 0 or 1. The effective
    number of questions is n times that bound over the variance seen (Korn & Graubard 1998), with Student's quantile for
    Wilson's z. For one right-or-wrong sample a question it is Wilson's interval itself. The interval never leaves [0, 1],
    and equal scores give no point but the interval of n right-or-wrong questions.

    Where few questions were ever right (or ever wrong), the variance seen says little: it is mixed with its bound, which
    weighs half a question. Without that, 8 samples of 50 questions at 2 % covered 88 to 95 %; with it 97 to 98.

    Measured coverage is 93.1 to 96.9 % where at least 10 % is right or wrong and from 50 questions on, and 91.8 to 98.1 at 2 %;
    the percentile bootstrap's falls to 93 % and, at 2 %, to 63 (``benchmarks/intervals``).

    Values outside 0 to 1 (a reward, a number of turns) get Student's interval.
    """
    questions = values.shape[-1]
    if not questions:
        empty = np.full(values.shape[:-1], math.nan)
        return empty, empty.copy()
    mean = values.mean(axis=-1)
    if values.min() < 0 or values.max() > 1:
        if questions == 1:
            return np.full_like(mean, math.nan), np.full_like(mean, math.nan)
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


def macro_interval(suites: Sequence[ArrayLike]) -> Interval:
    """95 % interval of the unweighted mean over suites; of nothing NaN. Suites without a score are left out.

    Each suite is a sample by itself: their own intervals are joined, the distances to their ends added as squares (Zou &
    Donner 2008), so that a suite of 125 questions counts with its width and one with none right is not taken for certain.

    Args:
        suites: for each suite its questions' scores.
    """
    kept = [values for suite in suites if (values := np.asarray(suite, dtype=np.float64)).size]
    if not kept:
        return Interval(math.nan, math.nan)
    low, high = macro_intervals(kept)
    return Interval(float(low), float(high))


def macro_intervals(suites: Sequence[Floats]) -> tuple[Floats, Floats]:
    """:func:`macro_interval` of many at once: each suite of shape ``[…, questions]``, none empty."""
    means = np.array([suite.mean(axis=-1) for suite in suites])
    ends = [mean_intervals(suite) for suite in suites]
    below = means - np.array([low for low, _ in ends])
    above = np.array([high for _, high in ends]) - means
    mean = means.mean(axis=0)
    return mean - np.sqrt((below**2).sum(axis=0)) / len(suites), mean + np.sqrt((above**2).sum(axis=0)) / len(suites)


def cluster_bootstrap(
    values: ArrayLike, clusters: Sequence[object], *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """95 % percentile interval of the mean of ``values``, resampling whole clusters (Efron 1979; Miller 2024, §2.2).

    Samples of one question resemble each other; treating them as independent makes the interval too narrow. For means of
    scores within 0 to 1, :func:`mean_interval` covers better where questions are few or scores extreme.

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
    sums_r, sizes_r = resampled_sums(np.column_stack([sums_k, sizes_k]), resamples, np.random.default_rng(seed)).T
    low, high = np.percentile(sums_r / sizes_r, [2.5, 97.5])
    mean = float(values_n.mean())  # rounding alone can put the mean of equal values outside by 1e-17
    return Interval(min(float(low), mean), max(float(high), mean))


def resampled_sums(rows: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Sums over draws with replacement of as many rows as there are: shape ``[resamples, columns]``.

    Equal rows are drawn together: how often each different one comes is multinomial. Scores take few values, so that 50,000
    questions cost no more than 500.
    """
    distinct, counts = np.unique(rows, axis=0, return_counts=True)
    shares = counts / counts.sum()
    sums = [rng.multinomial(len(rows), shares, size=size) @ distinct for size in _chunks(resamples, len(distinct))]
    return np.concatenate(sums)


def pass_at_k(samples: ArrayLike, right: ArrayLike, k: int) -> Floats:
    """For each question the chance that one of k samples is right, unbiased (Chen et al. 2021, eq. 1).

    Args:
        samples: drawn, shape ``[questions]``; at least k.
        right: of these, shape ``[questions]``.
        k: samples allowed.

    Raises:
        ConfigurationError: k is below 1, or a question has fewer samples.
    """
    samples_q, right_q = np.asarray(samples, dtype=np.int64), np.asarray(right, dtype=np.int64)
    if k < 1 or (samples_q < k).any():
        raise ConfigurationError(f"pass@{k} needs k of at least 1 and at least k samples of every question")
    wrong_q = samples_q - right_q
    # C(n - c, k) / C(n, k) as a product of k factors: no factorial overflows, and it is 0 where fewer than k are wrong.
    factors = (wrong_q[:, None] - np.arange(k)).clip(0) / (samples_q[:, None] - np.arange(k))
    return 1.0 - factors.prod(axis=1)


# --- paired comparison ------------------------------------------------------------------------------------------------


def paired_difference(
    before: Sequence[ArrayLike], after: Sequence[ArrayLike], *, resamples: int = RESAMPLES, seed: int = 0
) -> PairedDifference:
    """Compare two evaluations of the same questions (Miller 2024, §4: pairing removes the questions' own variance).

    Args:
        before: for each question its samples' scores, shape ``[samples]`` each; a plain number is one sample.
        after: the same questions in the same order; the numbers of samples may differ.
        resamples: sign flips, when they are sampled.
        seed: of these.

    The p-value is McNemar's mid-p (binomial over the questions that changed; Fagerland et al. 2013) when every question has
    one 0/1 sample on both sides; otherwise that of a sign-flip permutation test (Fisher 1935) on the questions' mean
    differences, exact up to 14 questions that differ. The interval is that of :func:`difference_intervals`.

    Raises:
        ConfigurationError: there is no question, one without a sample, or the numbers of questions differ.
    """
    befores = [np.atleast_1d(np.asarray(scores, dtype=np.float64)) for scores in before]
    afters = [np.atleast_1d(np.asarray(scores, dtype=np.float64)) for scores in after]
    if len(befores) != len(afters) or not befores:
        raise ConfigurationError(f"cannot pair {len(befores)} questions before with {len(afters)} after")
    if any(scores.size == 0 for scores in (*befores, *afters)):
        raise ConfigurationError("every question needs at least one score before and after")
    is_single = all(scores.size == 1 and scores[0] in (0.0, 1.0) for scores in (*befores, *afters))
    difference_q = np.array([b.mean() for b in afters]) - np.array([a.mean() for a in befores])
    return difference_of(difference_q, is_single=is_single, resamples=resamples, seed=seed)


def difference_of(
    difference_q: Floats, *, is_single: bool, resamples: int = RESAMPLES, seed: int = 0
) -> PairedDifference:
    """:func:`paired_difference` of the questions' differences, shape ``[questions]``, at least one.

    Args:
        difference_q: of each question's mean, after - before.
        is_single: they come from one 0/1 sample on both sides: -1, 0 or 1.
        resamples: sign flips, when they are sampled.
        seed: of these.
    """
    difference_q = np.where(np.abs(difference_q) <= _ROUNDING, 0.0, difference_q)
    improved, worsened = int((difference_q > 0).sum()), int((difference_q < 0).sum())
    if is_single:
        method, p_value = "mcnemar-midp", mcnemar_p_value(improved, worsened)
    else:
        method = "sign-flip-exact" if improved + worsened <= _EXACT_FLIPS else "sign-flip"
        p_value = sign_flip_p_value(difference_q, resamples, np.random.default_rng(seed))
    low, high = difference_intervals(difference_q)
    interval = Interval(float(low), float(high))
    return PairedDifference(
        float(difference_q.mean()), interval, p_value, len(difference_q), improved, worsened, method
    )


def difference_intervals(difference: Floats) -> tuple[Floats, Floats]:
    """95 % intervals of mean differences, within [-1, 1] for differences that are.

    Args:
        difference: shape ``[…, questions]``, at least one question.

    Student's interval with one question more, which is changed by as much as those that changed (by 1 where none did), half up
    and half down; after Bonett & Price (2012), who add two. So a comparison in which nothing changed is no proof of equality: of
    100 questions its interval is ±2 points. Measured coverage is 93 to 97 %, and 99 where four of 50 questions change; the
    percentile bootstrap's is 93 to 96.
    """
    return _within(difference, *_centre_and_half(difference), difference.mean(axis=-1))


def macro_difference_intervals(suites: Sequence[Floats]) -> tuple[Floats, Floats]:
    """95 % intervals of the unweighted mean over suites: their own (:func:`difference_intervals`), joined.

    Args:
        suites: for each suite its questions' differences, shape ``[…, questions]``; none empty.
    """
    parts = [_centre_and_half(own) for own in suites]
    centre = np.mean([centre for centre, _ in parts], axis=0)
    half = np.sqrt(np.sum([half**2 for _, half in parts], axis=0)) / len(suites)
    mean = np.mean([own.mean(axis=-1) for own in suites], axis=0)
    return _within(np.concatenate([own.ravel() for own in suites]), centre, half, mean)


def _centre_and_half(difference: Floats) -> tuple[Floats, Floats]:
    questions = difference.shape[-1]
    squares, changed = (difference**2).sum(axis=-1), (np.abs(difference) > _ROUNDING).sum(axis=-1)
    usual = np.where(changed > 0, squares / np.maximum(changed, 1), 1.0)
    centre = difference.sum(axis=-1) / (questions + 1)
    variance = ((squares + usual) / (questions + 1) - centre**2).clip(0)
    # At least one degree of freedom: a single question, with the one that is added.
    return centre, _t_95(max(questions - 1, 1)) * np.sqrt(variance / (questions + 1))


def _within(differences: Floats, centre: Floats, half: Floats, mean: Floats) -> tuple[Floats, Floats]:
    low, high = np.minimum(centre - half, mean), np.maximum(centre + half, mean)
    bounded = np.abs(differences).max() <= 1
    return (low.clip(-1, 1), high.clip(-1, 1)) if bounded else (low, high)


def mcnemar_p_value(improved: int, worsened: int, *, mid_p: bool = True) -> float:
    """McNemar's two-sided p-value: the changed questions are a fair coin under the null hypothesis.

    Args:
        improved: questions that were wrong before and right after.
        worsened: the other way round.
        mid_p: counts what was observed by half (Fagerland et al. 2013). The exact test is never wrong too often but far too
            seldom: at 5 % its measured false-positive rate is 0.2 to 3.9 %, the mid-p's 1.0 to 4.9.
    """
    changed = improved + worsened
    if changed == 0:
        return 1.0
    # Summed as integers and divided once: exact for any number of questions. Each term comes from the one before it.
    tail = term = 1
    for count in range(min(improved, worsened)):
        term = term * (changed - count) // (count + 1)
        tail += term
    doubled = 2 * tail - term if mid_p else 2 * tail
    return min(1.0, doubled / 2**changed)


def sign_flip_p_value(
    difference_q: Floats, resamples: int = RESAMPLES, rng: np.random.Generator | None = None
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
    # Differences of one size are flipped together: how many of them turn out positive is binomial.
    sizes, counts = np.unique(np.abs(changed_c).round(12), return_counts=True)
    hits = 0
    for draws in _chunks(resamples, len(sizes)):
        sums = (2 * rng.binomial(counts, 0.5, size=(draws, len(sizes))) - counts) @ sizes
        hits += int((np.abs(sums) >= observed).sum())
    return (hits + 1) / (resamples + 1)  # the observed pattern is one of them: never an impossible p of 0


def holm_correction(p_values: Sequence[float]) -> list[float]:
    """P-values of several comparisons, adjusted so that any false positive among them stays as rare as one alone (Holm 1979).

    In the order given. A NaN stays one and counts as no comparison.
    """
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    adjusted = list(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _wilson(share: Floats, trials: Floats, z: Floats) -> tuple[Floats, Floats]:
    spread = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / spread
    half = z / spread * np.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # The bounds are analytically 0 and 1 at the ends; floating point would put them a hair off.
    low = np.where(share <= 0, 0.0, np.maximum(0.0, centre - half))
    high = np.where(share >= 1, 1.0, np.minimum(1.0, centre + half))
    return np.minimum(low, share), np.maximum(high, share)


def _t_95(degrees: int) -> float:
    """97.5 % quantile of Student's distribution; Cornish-Fisher's expansion, exact to 0.001."""
    if degrees < len(_T_95):
        return float(_T_95[degrees])
    z, n = Z_95, degrees
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )


def _chunks(total: int, width: int) -> list[int]:
    size = max(1, _CHUNK_CELLS // max(width, 1))
    return [min(size, total - start) for start in range(0, total, size)]
