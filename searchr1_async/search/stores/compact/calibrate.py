"""How many lists to probe and how many candidates to rank again, for the recall that is asked: measured, then chosen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from searchr1_async.search.embedders.base import Vectors
from searchr1_async.search.stores.compact.index import CompactIndex
from searchr1_async.search.stores.compact.layout import Calibration, CurvePoint
from searchr1_async.search.stores.compact.probing import MOST_OF_MEAN, Probing, margin_of
from searchr1_async.search.stores.compact.vector_file import Rows

Number = TypeVar("Number", np.float32, np.int64)

CANDIDATES = (20, 50, 100, 200)
"""Tried with every number of probes."""
EXACT_RESULTS = 10
"""Of the nearest passages, found by comparing with all, that recall is measured against at least."""
BATCH = 128
AFFORDABLE = 300_000
"""Codes that are compared in the time that a query may take before recall above what is asked is too dear: 3.5 to 4.5 ms on two cores,
hundreds of queries a second."""
_NO_DIFFERENCE = 0.001
"""Of recall: that of one or two queries of the sample."""
_BEYOND = 0.03
"""Recall above what is asked up to which the curve is measured: the last hundredths take as long as all before."""
_RANKING_COST = 60
"""Codes that are compared in the time in which a candidate is ranked again: 60 million codes a second, a microsecond a candidate."""
_LIST_COST = 450
"""Codes that are compared in the time which a list takes beside those that are in it."""


def probe_steps(lists: int) -> list[int]:
    """Mean numbers of probes to try: each some 1.4 times the one before, up to all lists."""
    steps = {min(lists, round(2 ** (half / 2))) for half in range(2 * math.ceil(math.log2(max(lists, 1))) + 1)}
    return sorted({*steps, lists})


def recall(found: Rows, exact: Rows, results: int) -> float:
    """The share of the ``results`` nearest that are among the found; both ``[queries, …]``."""
    exact = exact[:, :results]
    return float((exact[:, :, None] == found[:, None, :]).any(axis=2).mean())


def measure(
    index: CompactIndex,
    queries: Vectors,
    exact: Rows,
    recall_at: int,
    *,
    own_rows: Rows | None = None,
    asked: float = 0.95,
    check: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[CurvePoint]:
    """The recall and the speed of every choice, up to the probes with which recall :func:`is_enough`.

    What is ranked again is ranked exactly, so recall is that of the candidates: one search tells it for fewer candidates too.

    Args:
        index: to be searched.
        queries: ``[queries, dimension]``.
        exact: ``[queries, results]``, the nearest of all.
        recall_at: results that recall is asked for.
        own_rows: ``[queries]``, a row that does not count for each query.
        asked: recall of ``recall_at``.
        check: called between batches; ends the measurement by raising.
        clock: seconds.
    """
    curve: list[CurvePoint] = []
    gap = np.sort(np.concatenate([index.gaps(part) for part in _batches(queries)]), axis=1)
    for probes in probe_steps(gap.shape[1]):
        probing = probing_of(gap, probes)
        began = clock()
        parts: list[Rows] = []
        for part in _batches(queries):
            check()
            parts.append(index.candidates(part, CANDIDATES[-1] + 1, probing))
        found = np.concatenate(parts)
        searching = clock() - began
        if own_rows is not None:
            found = _without(found, own_rows)
        # Once before it is timed: else the first choices, whose candidates the disk had to give, looked slower than later ones with
        # a hundred times their lists (377 queries/s with 1 list, 355 with 256).
        _rank(index, queries, found[:, : CANDIDATES[-1]], recall_at, check)
        for candidates in CANDIDATES:
            best = found[:, :candidates]
            began = clock()
            _rank(index, queries, best, recall_at, check)
            seconds = max(searching + clock() - began, 1e-9)
            curve.append(
                CurvePoint(
                    probes,
                    probing.most,
                    probing.margin,
                    candidates,
                    round(recall(best, exact, 3), 4),
                    round(recall(best, exact, 10), 4),
                    round(recall(best, exact, recall_at), 4),
                    round(len(queries) / seconds, 1),
                )
            )
        if is_enough(curve[-1], asked, index.mean_list, len(queries)):
            break
    return curve


def probing_of(gap: Vectors, probes: int) -> Probing:
    """How far to look for so many lists on average; ``gap`` is ``[queries, lists]``, each row in ascending order."""
    most = min(MOST_OF_MEAN * probes, gap.shape[1])
    if probes == gap.shape[1]:
        return Probing.fixed(most)
    return Probing(margin_of(gap, probes, most), most)


def choose(curve: Sequence[CurvePoint], asked: float, mean_list: float, queries: int) -> CurvePoint:
    """The best of the affordable choices whose recall is a standard error above what is asked; else the cheapest of those with such a
    recall, else the one with the most.

    More than what is asked is taken where it costs little, because questions are not alike: among 56,769 passages 0.959 of the
    nearest were found for the sample, and 0.923 for one suite of five, which cost it 4.3 points of its answers.

    The error is that of a sample: without it, half of all samples choose too little for other queries (at 54,909 passages 0.943
    was found where 0.95 was asked and 500 queries had given 0.952).

    Costs are counted, not timed, so that the same index chooses the same anywhere.

    Args:
        curve: measured.
        asked: recall.
        mean_list: codes in a list, on average.
        queries: of the sample.
    """

    def cheapest(points: list[CurvePoint]) -> CurvePoint:
        return min(points, key=lambda point: (cost(point, mean_list), point.probes))

    able = [point for point in curve if surely_reaches(point.recall, asked, queries)]
    if not able:
        most = max(point.recall for point in curve)
        return cheapest([point for point in curve if point.recall == most])
    if affordable := [point for point in able if cost(point, mean_list) <= AFFORDABLE]:
        most = max(point.recall for point in affordable)
        return cheapest([point for point in affordable if point.recall >= most - _NO_DIFFERENCE])
    return cheapest(able)


def is_enough(point: CurvePoint, asked: float, mean_list: float, queries: int) -> bool:
    """Whether more probes need not be tried: what is asked is surely reached, the curve shows a little more than that, and more is
    not to be had or not affordable."""
    shows = point.recall >= min(asked + _BEYOND, 0.995) and surely_reaches(point.recall, asked, queries)
    return shows and (point.recall >= 1 - _NO_DIFFERENCE or cost(point, mean_list) >= AFFORDABLE)


def surely_reaches(reached: float, asked: float, queries: int) -> bool:
    """Whether a recall over so many queries is a standard error above what is asked."""
    return reached - standard_error(reached, queries) >= asked


def standard_error(share: float, queries: int) -> float:
    """Of a share over so many queries."""
    return math.sqrt(share * (1 - share) / queries)


def cost(point: CurvePoint, mean_list: float) -> float:
    """Of a query, in codes compared."""
    return point.probes * (mean_list + _LIST_COST) + point.candidates * _RANKING_COST


def calibration_of(
    curve: Sequence[CurvePoint], asked: float, recall_at: int, mean_list: float, queries: int, origin: str
) -> Calibration:
    """What the manifest says of the choice."""
    chosen = choose(curve, asked, mean_list, queries)
    probing = (chosen.probes, chosen.most_probes, chosen.margin)
    return Calibration(queries, origin, *probing, chosen.candidates, chosen.recall, asked, recall_at, tuple(curve))


def _rank(index: CompactIndex, queries: Vectors, found: Rows, results: int, check: Callable[[], object]) -> None:
    for part, rows in zip(_batches(queries), _batches(np.ascontiguousarray(found)), strict=True):
        check()
        index.rank(part, rows, results)


def _batches(rows: NDArray[Number]) -> list[NDArray[Number]]:
    return [rows[first : first + BATCH] for first in range(0, len(rows), BATCH)]


def _without(found: Rows, own_rows: Rows) -> Rows:
    """The found without each query's own row, which moves to the end as -1."""
    own = found == own_rows[:, None]
    order = np.argsort(own, axis=1, kind="stable")
    return np.take_along_axis(np.where(own, -1, found), order, 1)
