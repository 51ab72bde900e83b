"""Vectors on disk, compared with candidates and with all, held against plain NumPy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from searchr1_async.errors import StoreError
from searchr1_async.search.compact import files as vector_file
from searchr1_async.search.compact.files import (
    VECTORS_NAME,
    AppendedFiles,
    Rows,
    RowWriter,
    VectorFile,
)
from searchr1_async.search.compact.store import CompactIndex, exact_nearest, ready_vectors
from searchr1_async.search.embedders import Vectors
from searchr1_async.search.stores.vector_store import Metric
from tests.search.compact.arrays import clustered, passage_of, scores_of

COUNT, DIMENSION = 700, 24
METRICS: tuple[Metric, ...] = ("cosine", "l2", "ip")


def write(folder: Path, vectors: Vectors, rows: int = 0) -> None:
    writer = RowWriter(folder, vectors.shape[1], rows)
    for place in np.array_split(np.arange(len(vectors)), 3):
        writer.append([passage_of(rows + int(row)) for row in place], vectors[place])
    writer.sync()
    writer.close()


def rank(queries: Vectors, candidates: Rows, file: VectorFile, metric: Metric, n_results: int) -> tuple[Rows, Vectors]:
    no_codes: Any = None  # ranking needs none
    return CompactIndex(no_codes, file, metric).rank(queries, candidates, n_results)


def kept(folder: Path, vectors: Vectors) -> VectorFile:
    write(folder, vectors)
    return VectorFile(folder, len(vectors), vectors.shape[1])


def test_rows_come_back_from_anywhere(tmp_path: Path) -> None:
    vectors = clustered(COUNT, DIMENSION)
    file = kept(tmp_path, vectors)
    assert len(file) == COUNT
    step = np.abs(vectors).max(axis=1, keepdims=True) * 2**-11
    chosen = np.random.default_rng(1).integers(COUNT, size=300)
    for rows in (chosen, chosen[:1], chosen[:0], np.arange(COUNT)):
        assert (np.abs(file.gather(rows) - vectors[rows]) <= step[rows]).all()
    slabs = list(file.slabs(start=3, size=64))
    assert [first for first, _ in slabs] == list(range(3, COUNT, 64))
    np.testing.assert_array_equal(np.concatenate([slab for _, slab in slabs]), file.gather(np.arange(3, COUNT)))


def test_a_resumed_file_is_that_of_one_writing(tmp_path: Path) -> None:
    vectors = clustered(90, DIMENSION)
    write(tmp_path, vectors)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for rows in (0, 1, 30, 89):
        write(tmp_path, vectors[rows:], rows)  # what stands behind goes, whole rows and halves
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole
    for name in whole:
        content = whole[name]
        (tmp_path / name).write_bytes(content[:-1])
        with pytest.raises(
            StoreError, match="is shorter than the recorded progress: delete the folder and start again"
        ):
            RowWriter(tmp_path, DIMENSION, 90)
        (tmp_path / name).write_bytes(content)


@settings(max_examples=50, deadline=None)
@given(parts=st.lists(st.tuples(st.binary(max_size=9), st.booleans()), max_size=8))
def test_an_appended_file_goes_on_from_what_was_noted(
    parts: list[tuple[bytes, bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Some notes are made, then the process is gone and begins again at the last one."""
    path = tmp_path_factory.mktemp("appended") / "file"
    noted, file = b"", AppendedFiles({path: 0})
    written = noted
    for content, is_kill in parts:
        file.write(content)
        written += content
        assert path.read_bytes() == written, "a kill of the process loses nothing"
        if is_kill:
            file.close()
            file = AppendedFiles({path: len(noted)})
            written = noted
        else:
            noted = written
    file.close()
    assert path.read_bytes() == written


@pytest.mark.parametrize("together", [16_384, 1])
def test_products_are_those_of_the_kept_rows(
    tmp_path: Path,
    together: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vector_file, "_ASKED_TOGETHER", together)
    file = kept(tmp_path, clustered(COUNT, DIMENSION))
    queries = clustered(7, DIMENSION, seed=1)
    rows: Rows = np.random.default_rng(2).integers(COUNT, size=(7, 50))
    products, lengths = file.products(queries, rows)
    own = file.gather(rows.ravel()).reshape(7, 50, DIMENSION).astype(np.float64)
    np.testing.assert_allclose(products, np.einsum("qd,qcd->qc", queries.astype(np.float64), own), atol=1e-5)
    np.testing.assert_allclose(lengths, (own**2).sum(axis=2), rtol=1e-5)


def test_the_file_is_closed_with_the_last_that_reads_it_and_no_sooner(tmp_path: Path) -> None:
    def opened() -> int:
        return sum(tmp_path in each.resolve().parents for each in Path("/proc/self/fd").iterdir())

    vectors = clustered(COUNT, DIMENSION)
    file = kept(tmp_path, vectors)
    read = file.gather
    del file
    assert opened() == 1
    np.testing.assert_allclose(read(np.array([3])), vectors[3:4], atol=1e-2)
    del read
    assert opened() == 0


def test_a_file_that_is_cut_off_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    file = kept(tmp_path, clustered(COUNT, DIMENSION))
    os.truncate(tmp_path / VECTORS_NAME, 10 * DIMENSION * 2 + 5)
    assert file.gather(np.array([9])).shape == (1, DIMENSION)
    for row in (10, COUNT - 1):
        with pytest.raises(OSError, match="was truncated during a read"):
            file.gather(np.array([row]))


@pytest.mark.parametrize("metric", METRICS)
def test_the_nearest_of_all_are_those_of_a_plain_sort(
    tmp_path: Path,
    metric: Metric,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(VectorFile.slabs, "__defaults__", (0, 128))
    file = kept(tmp_path, ready_vectors(clustered(COUNT, DIMENSION), metric))
    queries = ready_vectors(clustered(40, DIMENSION, seed=1), metric)
    own_rows = np.arange(0, COUNT, COUNT // 40)[:40]
    queries[::2] = file.gather(own_rows[::2])  # half of them are rows, which would find themselves
    own = file.gather(np.arange(COUNT))
    if metric == "cosine":
        scores = queries.astype(np.float64) @ own.T.astype(np.float64)  # rows as kept, whose lengths are nearly 1
    else:
        scores = scores_of(queries, own, metric)
    advanced: list[int] = []
    found = exact_nearest(queries, file, metric, 10, advanced.append)
    assert advanced == [*range(128, COUNT, 128), COUNT]
    assert_nearest(found, scores)
    # Ranked again, all of them give the same.
    everything = np.tile(np.random.default_rng(3).permutation(COUNT), (40, 1))
    rows, found_scores = rank(queries, everything, file, metric, 10)
    assert_nearest(rows, scores)
    assert (np.diff(found_scores, axis=1) <= 0).all()


def assert_nearest(found: Rows, scores: NDArray[np.floating]) -> None:
    """The scores of what was found are the best ones, in their order, but for rounding."""
    best = np.sort(scores, axis=1)[:, ::-1][:, : found.shape[1]]
    np.testing.assert_allclose(np.take_along_axis(scores, found, 1), best, atol=1e-5)
    assert all(len(set(row)) == len(row) for row in found.tolist())


def test_fewer_rows_than_wanted_and_missing_candidates(tmp_path: Path) -> None:
    vectors = clustered(3, DIMENSION)
    write(tmp_path, vectors)
    file = VectorFile(tmp_path, 3, DIMENSION)
    assert sorted(exact_nearest(vectors[:1], file, "ip", 10)[0].tolist()) == [0, 1, 2]
    rows, scores = rank(vectors[:2], np.array([[-1, 2, -1], [0, -1, 1]]), file, "ip", 3)
    assert rows[0].tolist() == [2, -1, -1]
    assert sorted(rows[1].tolist()) == [-1, 0, 1]
    assert rows[1, 2] == -1
    assert np.isneginf(scores[rows < 0]).all()


@pytest.mark.parametrize("metric", METRICS)
def test_equal_vectors_come_in_the_order_of_their_rows(tmp_path: Path, metric: Metric) -> None:
    vectors = np.repeat(ready_vectors(clustered(4, DIMENSION), metric), 5, axis=0)
    write(tmp_path, vectors)
    file = VectorFile(tmp_path, 20, DIMENSION)
    shuffled = np.tile(np.random.default_rng(1).permutation(20), (4, 1))
    rows, _ = rank(vectors[::5], shuffled, file, metric, 5)
    assert (np.diff(rows, axis=1) == 1).all()


def test_a_file_that_is_too_short_is_not_opened(tmp_path: Path) -> None:
    write(tmp_path, clustered(9, DIMENSION))
    with pytest.raises(StoreError, match="has fewer than 10 rows: delete the folder and start again"):
        VectorFile(tmp_path, 10, DIMENSION)
    (tmp_path / VECTORS_NAME).unlink()
    with pytest.raises(OSError, match=VECTORS_NAME):
        VectorFile(tmp_path, 9, DIMENSION)
