"""How many lists are probed and how many candidates ranked again, for the recall that is asked."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.search.compact.assembly import (
    AFFORDABLE,
    CANDIDATES,
    calibrate,
    choose,
    cost,
    is_enough,
    probe_steps,
    recall,
)
from searchr1_async.search.compact.codes import Codes, Encoder, ListAssigner, Probing, learn_centres
from searchr1_async.search.compact.files import CurvePoint, RowWriter, VectorFile
from searchr1_async.search.compact.store import CompactIndex, exact_nearest
from tests.search.compact.arrays import clustered, passage_of

shares = st.integers(0, 100).map(lambda percent: percent / 100)


def error_of(share: float, queries: int) -> float:
    """The standard error of a share."""
    return (share * (1 - share) / queries) ** 0.5


points = st.builds(
    CurvePoint,
    st.integers(1, 64),
    st.just(256),
    st.none() | st.floats(0, 1),
    st.sampled_from(CANDIDATES),
    shares,
    st.floats(1, 1_000),
)


@given(lists=st.integers(1, 70_000))
def test_probes_grow_from_one_to_all_lists(lists: int) -> None:
    steps = probe_steps(lists)
    assert (steps[0], steps[-1]) == (1, lists)
    assert steps == sorted(set(steps))
    assert all(later <= max(one + 1, 1.5 * one) for one, later in itertools.pairwise(steps))
    assert len(steps) <= 2 * max(1, lists.bit_length()) + 2


def test_recall_is_the_share_of_the_nearest_that_are_found() -> None:
    exact = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert recall(exact[:, ::-1], exact) == 1.0
    assert recall(np.array([[1, 9, 2], [9, 9, 9]]), exact[:, :2]) == 0.5
    assert recall(np.array([[3, -1], [5, -1]]), exact[:, :3]) == pytest.approx(1 / 3)
    assert recall(np.array([[4], [8]]), exact[:, :3]) == 0.0
    assert recall(np.array([[4], [8]]), exact) == 0.25


@given(
    curve=st.lists(points, min_size=1, max_size=20),
    asked=shares,
    mean_list=st.floats(1, 1e5),
    queries=st.integers(1, 10_000),
)
def test_what_surely_reaches_what_is_asked_is_chosen_and_more_where_it_is_cheap(
    curve: list[CurvePoint], asked: float, mean_list: float, queries: int
) -> None:
    chosen = choose(curve, asked, mean_list, queries)
    assert chosen in curve
    able = [point for point in curve if point.recall_at_3 - error_of(point.recall_at_3, queries) >= asked]
    affordable = [point for point in able if cost(point, mean_list) <= AFFORDABLE]
    if affordable:
        assert chosen in affordable
        best = max(point.recall_at_3 for point in affordable)
        assert chosen.recall_at_3 >= best - 0.001
        assert all(
            cost(chosen, mean_list) <= cost(point, mean_list) for point in affordable if point.recall_at_3 == best
        )
    elif able:
        assert chosen in able
        assert all(cost(chosen, mean_list) <= cost(point, mean_list) for point in able)
    else:
        assert chosen.recall_at_3 == max(point.recall_at_3 for point in curve), "the most there is, if it is not enough"
    # Speeds differ from machine to machine and from run to run: they change nothing.
    again = choose([replace(point, queries_per_second=1.0) for point in curve], asked, mean_list, queries)
    assert replace(chosen, queries_per_second=1.0) == again


@given(reached=shares, asked=shares, queries=st.integers(1, 1_000), mean_list=st.floats(1, 1e5))
def test_a_curve_ends_where_what_is_asked_can_be_chosen(
    reached: float, asked: float, queries: int, mean_list: float
) -> None:
    def at(recall: float) -> CurvePoint:
        return CurvePoint(100, 400, 0.1, 50, recall, 1.0)

    point = at(reached)
    if is_enough(point, asked, mean_list, queries):
        assert reached == 1 or cost(point, mean_list) >= AFFORDABLE, "more is not to be had, or is too dear"
        assert choose([point], asked, 100, queries).recall_at_3 - error_of(reached, queries) >= asked
    assert is_enough(at(1.0), asked, mean_list, queries)
    assert not is_enough(at(0.996), 0.995, 1e9, 500), "so much may be chance"


def test_a_small_sample_wants_a_wider_margin() -> None:
    mean_list = 1e6  # so dear that no more is taken than is asked
    curve = [CurvePoint(probes, 4 * probes, 0.1, 50, share, 1.0) for probes, share in ((1, 0.952), (2, 0.97), (4, 1.0))]
    assert [choose(curve, 0.95, mean_list, queries).probes for queries in (100_000, 500, 20)] == [1, 2, 4]


def test_the_measured_recall_is_that_of_a_search(tmp_path: Path) -> None:
    vectors, lists = clustered(2_000), 20
    writer = RowWriter(tmp_path, 64, 0)
    writer.append([passage_of(row) for row in range(2_000)], vectors)
    writer.close()
    file = VectorFile(tmp_path, 2_000, 64)
    centres = learn_centres(vectors, lists)
    encoder, own_lists = Encoder(centres, "l2"), ListAssigner(centres, "l2").nearest(vectors)
    encoder.write(encoder.encode(vectors, own_lists), own_lists, tmp_path)
    index, mean_list = CompactIndex(Codes(tmp_path, 1, "l2"), file, "l2"), 100
    queries = file.gather(np.arange(0, 2_000, 10)) + np.float32(0.01)
    exact = exact_nearest(queries, file, "l2", 3)
    found = calibrate(index, queries, exact, 1.0, "queries")
    assert (found.queries, found.origin, found.asked, found.recall_at) == (200, "queries", 1.0, 3)
    curve = found.curve
    assert [(point.probes, point.candidates) for point in curve] == list(
        itertools.product(probe_steps(lists), CANDIDATES)
    )[: len(curve)]
    for point in curve[:: max(1, len(curve) // 5)]:
        candidates = index.candidates(queries, point.candidates, Probing(point.margin, point.most_probes))
        ranked = index.rank(queries, candidates, 3)[0]
        assert point.recall_at_3 == pytest.approx(recall(ranked, exact), abs=0.005)
    assert curve[-1].recall_at_3 == 1.0
    chosen = choose(curve, 1.0, mean_list, 200)
    assert (found.probes, found.candidates, found.margin) == (chosen.probes, chosen.candidates, chosen.margin)
    cheap = calibrate(index, queries, exact, 0.5, "queries")
    assert is_enough(cheap.curve[-1], 0.5, mean_list, 200)
    assert not any(is_enough(point, 0.5, mean_list, 200) for point in cheap.curve[3:-4:4])
