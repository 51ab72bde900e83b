"""Which lists a query looks through, by how much farther their centres are than the nearest one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from searchr1_async.search.compact.codes import (
    Probing,
    alike,
    centre_distances,
    chosen_lists,
    margin_of,
    squared_lengths,
)
from searchr1_async.search.compact.store import ready_vectors
from searchr1_async.search.embedders import Vectors
from searchr1_async.search.stores.vector_store import Metric
from tests.search.compact.arrays import clustered, scores_of

gap_tables = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 6), st.integers(1, 20)), elements=st.floats(0, 4, width=32)
)


def gaps_of(queries: Vectors, centres: Vectors, metric: Metric) -> Vectors:
    return centre_distances(queries, centres, squared_lengths(centres), metric)[1]


@pytest.mark.parametrize("metric", ["cosine", "l2", "ip"])
def test_gaps_are_in_the_order_of_the_metric_and_of_no_unit(metric: Metric) -> None:
    queries, centres = (ready_vectors(clustered(count, 16, seed=count), metric) for count in (9, 40))
    found = gaps_of(queries, centres, metric)
    assert found.shape == (9, 40)
    np.testing.assert_array_equal(found.min(axis=1), 0)
    best = np.argsort(-scores_of(queries, centres, metric), axis=1)
    assert (np.diff(np.take_along_axis(found, best, 1), axis=1) >= -1e-5).all()
    if metric == "ip":  # a query may be of any length, which says nothing about what is near
        longer = 7 * queries
        np.testing.assert_allclose(gaps_of(longer, centres, metric), found, atol=1e-4)


def test_a_query_of_zeros_has_gaps() -> None:
    queries, centres = np.zeros((1, 4), np.float32), clustered(5, 4)
    for metric in ("l2", "ip"):
        assert np.isfinite(gaps_of(queries, centres, metric)).all()


@given(gap=gap_tables, margin=st.floats(0, 5), most=st.integers(1, 30))
def test_lists_within_the_margin_are_looked_through_the_nearest_first(
    gap: NDArray[np.float32], margin: float, most: int
) -> None:
    gap = gap - gap.min(axis=1, keepdims=True)
    for row, own in zip(gap, chosen_lists(gap, Probing(margin, most)), strict=True):
        assert len(set(own.tolist())) == len(own) == min(most, int((row <= margin).sum()))
        assert len(own), "the nearest is always among them"
        left = np.delete(row, own)
        assert (row[own] <= margin).all()
        if len(own) < most:
            assert (left > margin).all()
        elif len(left):
            assert row[own].max() <= left.min()


@given(gap=gap_tables, most=st.integers(1, 30))
def test_without_a_margin_each_looks_through_as_many(gap: NDArray[np.float32], most: int) -> None:
    assert {len(own) for own in chosen_lists(gap, Probing(None, most))} == {min(most, gap.shape[1])}


@given(gap=gap_tables, mean=st.integers(1, 20), most=st.integers(1, 30))
def test_the_margin_is_that_of_the_mean(gap: NDArray[np.float32], mean: int, most: int) -> None:
    gap = np.sort(gap, axis=1)
    margin = margin_of(gap, mean, most)
    if most <= mean:
        assert margin is None
        return
    within = np.minimum((gap <= margin).sum(axis=1), min(most, gap.shape[1])).sum()
    fewer = np.minimum((gap < margin).sum(axis=1), min(most, gap.shape[1])).sum()
    wanted = min(mean * len(gap), gap[:, :most].size)
    assert fewer < wanted <= within, "equal gaps come together"


@given(st.lists(st.integers(0, 2_000), min_size=1, max_size=50))
def test_queries_alike_are_searched_together_and_little_is_padded(counts: list[int]) -> None:
    groups = alike(counts)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(counts)))
    for group in groups:
        own = [counts[place] for place in group]
        assert max(own) <= max(16, 1.42 * min(own))
    assert len(groups) <= 15, "few calls"
