"""Inverted lists: how many, where their centres lie, and codes that are put into them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1_async.errors import StoreError
from searchr1_async.search.compact.codes import (
    MOST_LISTS,
    MOST_SAMPLED,
    Codes,
    Encoder,
    ListAssigner,
    Probing,
    faiss_metric,
    learn_centres,
    lists_for,
    sample_size,
)
from searchr1_async.search.compact.store import ready_vectors
from searchr1_async.search.embedders import Vectors
from searchr1_async.search.stores.vector_store import Metric
from tests.search.compact.arrays import clustered, scores_of

MANY = 1_100
"""Lists, so many that a vector is compared with those of some groups."""


@given(count=st.integers(1, 10**9))
def test_lists_and_samples_fit_any_count(count: int) -> None:
    lists = lists_for(count)
    assert 1 <= lists <= min(MOST_LISTS, count)
    assert lists <= lists_for(count + 1)
    size = sample_size(count, lists)
    assert min(lists, MOST_SAMPLED) <= size <= min(count, MOST_SAMPLED)


def test_lists_of_all_of_wikipedia() -> None:
    count = 21_015_324
    lists = lists_for(count)
    assert math.sqrt(count) < lists <= MOST_LISTS
    assert sample_size(count, lists) == MOST_SAMPLED


@pytest.mark.parametrize("lists", [1, 7, 300, MANY])
def test_centres_are_those_of_the_sample_and_come_out_equal(lists: int) -> None:
    sample = clustered(5_000, 16)
    centres = learn_centres(sample, lists)
    assert centres.shape == (lists, 16)
    assert centres.dtype == np.float32
    assert np.isfinite(centres).all()
    np.testing.assert_array_equal(centres, learn_centres(sample, lists))
    if lists == 1:
        np.testing.assert_allclose(centres[0], sample[:512].mean(axis=0), atol=0.1)
    # Clusters, and not any rows: they lie nearer to the vectors than as many rows drawn by chance.
    else:
        drawn = sample[np.random.default_rng(0).choice(5_000, lists, replace=False)]
        assert errors(sample, centres) < 0.95 * errors(sample, drawn)


def errors(vectors: Vectors, centres: Vectors) -> float:
    """Mean squared distance to the nearest centre."""
    lengths = (centres.astype(np.float64) ** 2).sum(axis=1)
    distances = (vectors.astype(np.float64) ** 2).sum(axis=1)[:, None] + lengths - 2 * vectors @ centres.T
    return float(distances.min(axis=1).mean())


@pytest.mark.parametrize("sample", [np.zeros((40, 16), np.float32), np.ones((40, 16), np.float32), clustered(5, 16)])
def test_a_sample_of_one_point_or_of_few_has_centres(sample: Vectors) -> None:
    centres = learn_centres(sample, 5)
    assert centres.shape == (5, 16)
    assert np.isfinite(centres).all()


@pytest.mark.parametrize("metric", ["cosine", "l2", "ip"])
@pytest.mark.parametrize("lists", [1, 50, MANY])
def test_the_nearest_list_is_found(lists: int, metric: Metric) -> None:
    centres, vectors = (
        ready_vectors(clustered(count, 16, seed=seed), metric) for count, seed in ((lists, 0), (900, 1))
    )
    assigner = ListAssigner(centres, metric)
    found, scores = assigner.nearest(vectors), scores_of(vectors, centres, metric)
    nearest = scores.argmax(axis=1)
    assert (found == nearest).mean() > (0.999 if lists < MANY else 0.9)
    # Whoever is lost comes into one that is nearly as near.
    lost = scores.max(axis=1) - np.take_along_axis(scores, found[:, None], 1)[:, 0]
    assert (lost > scores.std()).mean() < 0.01
    np.testing.assert_array_equal(found, ListAssigner(centres, metric).nearest(vectors))
    assert ListAssigner(centres, metric).nearest(vectors[:0]).shape == (0,)


def test_learning_ends_where_its_check_raises() -> None:
    class Cancelled(Exception):
        pass

    left = [3]

    def check() -> None:
        left[0] -= 1
        if not left[0]:
            raise Cancelled

    with pytest.raises(Cancelled):
        learn_centres(clustered(3_000, 16), 300, check)


def test_centres_that_are_all_alike_have_a_list_for_everything() -> None:
    found = ListAssigner(np.ones((MANY, 8), np.float32), "l2").nearest(clustered(50, 8))
    assert ((found >= 0) & (found < MANY)).all()


def write(folder: Path, vectors: Vectors, lists: int, metric: Metric) -> None:
    vectors = ready_vectors(vectors, metric)
    centres = learn_centres(vectors, lists)
    assigner = ListAssigner(centres, metric)
    encoder, parts = Encoder(centres, metric), np.array_split(vectors, 4)
    own = [assigner.nearest(part) for part in parts]
    codes = [encoder.encode(part, lists_) for part, lists_ in zip(parts, own, strict=True)]
    folder.mkdir(exist_ok=True)
    encoder.write(np.concatenate(codes), np.concatenate(own), folder)


@pytest.mark.parametrize("metric", ["cosine", "l2", "ip"])
@pytest.mark.parametrize("lists", [20, MANY])
def test_codes_find_most_of_the_nearest(tmp_path: Path, metric: Metric, lists: int) -> None:
    vectors = clustered(6_000)
    write(tmp_path, vectors, lists, metric)
    codes = Codes(tmp_path, 1, metric)
    assert codes.count == codes.list_sizes.sum() == len(vectors)
    assert len(codes.list_sizes) == lists
    queries = vectors[::200] + np.random.default_rng(2).normal(0, 0.02, (30, 64)).astype(np.float32)
    exact = np.argsort(-scores_of(queries, vectors, metric), axis=1)[:, :3]
    found = codes.search(ready_vectors(queries, metric), 100, Probing(None, lists))
    assert found.shape == (30, 100)
    assert (exact[:, :, None] == found[:, None]).any(axis=2).mean() > 0.95
    for row in codes.search(ready_vectors(queries, metric), 400, Probing(None, 1)):
        real = row[row >= 0]
        assert len(set(real.tolist())) == len(real)
        assert (row[len(real) :] == -1).all(), "a list holds fewer than were asked for: the rest is none"


def test_a_search_is_the_same_in_any_number_of_threads(tmp_path: Path) -> None:
    vectors = clustered(3_000)
    write(tmp_path, vectors, 30, "l2")
    one, two = (Codes(tmp_path, threads, "l2").search(vectors[:64], 50, Probing(None, 5)) for threads in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_codes_made_in_parts_are_those_made_at_once(tmp_path: Path) -> None:
    vectors = clustered(3_000)
    centres = learn_centres(vectors, MANY)
    lists = ListAssigner(centres, "l2").nearest(vectors)
    whole = Encoder(centres, "l2").encode(vectors, lists)
    resumed = Encoder(centres, "l2")
    parts = [resumed.encode(vectors[part], lists[part]) for part in (slice(0, 1_000), slice(1_000, None))]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    resumed.write(whole, lists, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"codes.faiss", "lists.bin", "lists.sizes"}


@pytest.mark.parametrize("dimension", [1, 7, 64, 100])
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_mapped_codes_are_searched_as_faiss_searches_its_own(tmp_path: Path, dimension: int, metric: Metric) -> None:
    vectors = clustered(2_000, dimension)
    centres = learn_centres(vectors, 40)
    centres[7] = 1e6  # of a list in which nothing is
    lists = ListAssigner(centres, metric).nearest(vectors)
    lists[lists == 7] = 8
    encoder = Encoder(centres, metric)
    encoder.write(encoder.encode(vectors, lists), lists, tmp_path)
    codes = Codes(tmp_path, 1, metric)
    assert (codes.count, codes.dimension) == (2_000, dimension)
    np.testing.assert_array_equal(codes.list_sizes, np.bincount(lists, minlength=40))
    own: Any = faiss
    quantiser = own.IndexFlat(dimension, faiss_metric(metric))
    quantiser.add(centres)
    index = own.IndexIVFRaBitQ(quantiser, dimension, 40, faiss_metric(metric))
    index.train(centres)
    index.add_core(len(vectors), own.swig_ptr(vectors), None, own.swig_ptr(lists))
    theirs = own.IndexIVFRaBitQFastScan(index)
    theirs.qb, theirs.nprobe = 8, 40
    expected = theirs.search(vectors[:50], 20)[1]
    np.testing.assert_array_equal(codes.search(vectors[:50], 20, Probing(None, 40)), expected)


def test_lists_of_another_index_are_refused(tmp_path: Path) -> None:
    for name, count in (("one", 500), ("two", 600)):
        write(tmp_path / name, clustered(count), 3, "l2")
    for name in ("lists.bin", "lists.sizes"):
        (tmp_path / "mixed").mkdir(exist_ok=True)
        for path in (tmp_path / "one").iterdir():
            (tmp_path / "mixed" / path.name).write_bytes(path.read_bytes())
        (tmp_path / "mixed" / name).write_bytes((tmp_path / "two" / name).read_bytes())
        with pytest.raises(StoreError, match=r"lists\.bin does not belong to this index: copy the whole folder again"):
            Codes(tmp_path / "mixed", 1, "l2")


def test_what_is_no_file_of_faiss_is_refused(tmp_path: Path) -> None:
    write(tmp_path, clustered(500), 3, "l2")
    path = tmp_path / "codes.faiss"
    content = path.read_bytes()
    for broken in (b"", b"no index at all", content[:100], content[: len(content) // 2]):
        path.write_bytes(broken)
        with pytest.raises(StoreError, match=r"codes\.faiss is not a faiss index"):
            Codes(tmp_path, 1, "l2")


def test_codes_that_cannot_be_written_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "codes.faiss").mkdir()
    with pytest.raises(OSError, match=r"codes\.faiss"):
        write(tmp_path, clustered(500), 3, "l2")
    assert not list(tmp_path.glob(".*"))
