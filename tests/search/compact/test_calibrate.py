"""How many lists are probed and how many candidates ranked again, for the recall that is asked."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.search.compact.calibration import (
    AFFORDABLE,
    CANDIDATES,
    _without,
    calibration_of,
    choose,
    cost,
    is_enough,
    measure,
    probe_steps,
    recall,
    standard_error,
)
from searchr1_async.search.compact.codes import Codes, add_codes, empty_codes, write_codes
from searchr1_async.search.compact.files import VectorFile, VectorWriter
from searchr1_async.search.compact.inverted_lists import ListAssigner, Probing, learn_centres
from searchr1_async.search.compact.layout import CurvePoint
from searchr1_async.search.compact.store import CompactIndex, exact_nearest
from tests.search.compact.arrays import clustered

shares = st.integers(0, 100).map(lambda percent: percent / 100)
points = st.builds(
    CurvePoint,
    st.integers(1, 64),
    st.just(256),
    st.none() | st.floats(0, 1),
    st.sampled_from(CANDIDATES),
    shares,
    shares,
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
    assert recall(exact[:, ::-1], exact, 4) == 1.0
    assert recall(np.array([[1, 9, 2], [9, 9, 9]]), exact, 2) == 0.5
    assert recall(np.array([[3, -1], [5, -1]]), exact, 3) == pytest.approx(1 / 3)
    assert recall(np.array([[4], [8]]), exact, 3) == 0.0
    assert recall(np.array([[4], [8]]), exact, 100) == 0.25, "there are no more than four"


@given(found=st.permutations(range(6)), own=st.integers(0, 9))
def test_a_querys_own_row_is_taken_out(found: list[int], own: int) -> None:
    kept = _without(np.array([found]), np.array([own]))[0].tolist()
    others = [row for row in found if row != own]
    assert kept == others + [-1] * (6 - len(others))


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
    able = [point for point in curve if point.recall - standard_error(point.recall, queries) >= asked]
    affordable = [point for point in able if cost(point, mean_list) <= AFFORDABLE]
    if affordable:
        assert chosen in affordable
        best = max(point.recall for point in affordable)
        assert chosen.recall >= best - 0.001
        assert all(cost(chosen, mean_list) <= cost(point, mean_list) for point in affordable if point.recall == best)
    elif able:
        assert chosen in able
        assert all(cost(chosen, mean_list) <= cost(point, mean_list) for point in able)
    else:
        assert chosen.recall == max(point.recall for point in curve), "the most there is, if it is not enough"
    # Speeds differ from machine to machine and from run to run: they change nothing.
    again = choose([replace(point, queries_per_second=1.0) for point in curve], asked, mean_list, queries)
    assert replace(chosen, queries_per_second=1.0) == again


@given(reached=shares, asked=shares, queries=st.integers(1, 1_000), mean_list=st.floats(1, 1e5))
def test_a_curve_ends_where_what_is_asked_can_be_chosen(
    reached: float, asked: float, queries: int, mean_list: float
) -> None:
    def at(recall: float) -> CurvePoint:
        return CurvePoint(100, 400, 0.1, 50, recall, recall, recall, 1.0)

    point = at(reached)
    if is_enough(point, asked, mean_list, queries):
        assert reached == 1 or cost(point, mean_list) >= AFFORDABLE, "more is not to be had, or is too dear"
        assert choose([point], asked, 100, queries).recall - standard_error(reached, queries) >= asked
        assert reached >= min(asked + 0.03, 0.995)
    assert is_enough(at(1.0), asked, mean_list, queries)
    assert not is_enough(at(0.996), 0.995, 1e9, 500), "so much may be chance"


def test_a_small_sample_wants_a_wider_margin() -> None:
    mean_list = 1e6  # so dear that no more is taken than is asked
    curve = [
        CurvePoint(probes, 4 * probes, 0.1, 50, share, share, share, 1.0)
        for probes, share in ((1, 0.952), (2, 0.97), (4, 1.0))
    ]
    assert [choose(curve, 0.95, mean_list, queries).probes for queries in (100_000, 500, 20)] == [1, 2, 4]
    found = calibration_of(curve, 0.95, 3, mean_list, 500, "queries")
    assert (found.most_probes, found.margin) == (8, 0.1)
    assert (found.probes, found.candidates, found.recall, found.asked) == (2, 50, 0.97, 0.95)
    assert (found.queries, found.origin, found.recall_at, found.curve) == (500, "queries", 3, tuple(curve))


def test_the_measured_recall_is_that_of_a_search(tmp_path: Path) -> None:
    vectors, lists = clustered(2_000), 20
    writer = VectorWriter(tmp_path, 64, "float16", 0)
    writer.append(vectors)
    writer.close()
    file = VectorFile(tmp_path, 2_000, 64, "float16")
    centres = learn_centres(vectors, lists, 1)
    codes = empty_codes(centres, "l2")
    add_codes(codes, vectors, ListAssigner(centres, "l2", 1).nearest(vectors))
    write_codes(codes, tmp_path)
    index = CompactIndex(Codes(tmp_path, 1, "l2"), file, "l2")
    own_rows = np.arange(0, 2_000, 10)
    queries = file.gather(own_rows)
    ticks = itertools.count()
    for own in (None, own_rows):
        exact = exact_nearest(queries, file, "l2", 10, own)
        curve = measure(index, queries, exact, 5, own_rows=own, asked=2.0, clock=lambda: float(next(ticks)))
        assert [(point.probes, point.candidates) for point in curve] == list(
            itertools.product(probe_steps(lists), CANDIDATES)
        )
        assert {point.queries_per_second for point in curve} == {100.0}, "a tick for the search, one for the ranking"
        for point in curve[:: len(curve) // 5]:
            beside = 0 if own is None else 1
            probing = Probing(point.margin, point.most_probes)
            rows = index.candidates(queries, point.candidates + beside, probing)
            ranked = index.rank(queries, rows, 10 + beside).rows
            found = ranked if own is None else _without(ranked, own)[:, :10]
            assert point.recall_at_10 == pytest.approx(recall(found, exact, 10), abs=0.005)
            assert point.recall_at_3 == pytest.approx(recall(found[:, :3], exact, 3), abs=0.005)
            assert point.recall == pytest.approx(recall(found[:, :5], exact, 5), abs=0.005)
        assert curve[-1].recall == 1.0
        by_candidates = [point.recall for point in curve if point.probes == lists]
        assert by_candidates == sorted(by_candidates)
    stopped = measure(index, queries, exact, 5, own_rows=own_rows, asked=0.9)
    assert stopped[-1].probes == lists or is_enough(stopped[-1], 0.9, 100, len(queries))
    assert not any(is_enough(point, 0.9, 100, len(queries)) for point in stopped[3:-4:4])
