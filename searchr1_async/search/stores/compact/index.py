"""A compact index, searched: the nearest by their codes, ranked again by their vectors. Synchronous: call it in worker threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from searchr1_async.search.embedders.base import Vectors
from searchr1_async.search.stores.base import Metric
from searchr1_async.search.stores.compact.codes import Codes
from searchr1_async.search.stores.compact.probing import Probing, squared_lengths
from searchr1_async.search.stores.compact.vector_file import Rows, VectorFile
from searchr1_async.threads import prepared_ahead


@dataclass(frozen=True, slots=True)
class Ranked:
    """The nearest rows of some queries, nearest first."""

    rows: Rows
    """``[queries, results]``; -1 behind the last where there are fewer."""
    scores: NDArray[np.float32]
    """``[queries, results]``, as :func:`similarities` has them."""


def ready_vectors(vectors: Vectors, metric: Metric) -> Vectors:
    """Vectors as they are kept and sought: float32, for ``"cosine"`` of length 1 (a vector of zeros stays one)."""
    vectors = np.ascontiguousarray(vectors, np.float32)
    if metric != "cosine":
        return vectors
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    lengths[lengths == 0] = 1
    return (vectors / lengths).astype(np.float32, copy=False)


def are_usable(vectors: Vectors) -> NDArray[np.bool_]:
    """Whether each vector's numbers, and its squared length as float32, are finite; ``[vectors]``."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.isfinite(squared_lengths(np.asarray(vectors, np.float32)))


def similarities(products: Vectors, lengths: Vectors, own_lengths: Vectors, metric: Metric) -> Vectors:
    """What passages are ranked by, as the Chroma stores say it: the product, or for ``"l2"`` ``1 - d / 2`` of the squared distance d.

    Args:
        products: ``[queries, candidates]``, inner products.
        lengths: ``[queries, candidates]``, squared, of the candidates.
        own_lengths: ``[queries, 1]``, squared, of the queries.
        metric: of the index.
    """
    if metric != "l2":
        return products
    return (1 - (own_lengths + lengths - 2 * products) / 2).astype(np.float32, copy=False)


def rank(queries: Vectors, candidates: Rows, vectors: VectorFile, metric: Metric, n_results: int) -> Ranked:
    """Ranks candidates by their vectors.

    Args:
        queries: ``[queries, dimension]``, by :func:`ready_vectors`.
        candidates: ``[queries, candidates]``; -1 is none.
        vectors: of the index.
        metric: of the index.
        n_results: how many of the best.
    """
    products, lengths = vectors.products(queries, np.maximum(candidates, 0))
    scores = similarities(products, lengths, squared_lengths(queries)[:, None], metric)
    scores[candidates < 0] = -np.inf
    # Equal ones by their row, so that the order does not hang on how they were found.
    order = np.lexsort((candidates, -scores), axis=1)[:, :n_results]
    return Ranked(np.take_along_axis(candidates, order, 1), np.take_along_axis(scores, order, 1))


class CompactIndex:
    """Codes and vectors of one index."""

    def __init__(self, codes: Codes, vectors: VectorFile, metric: Metric) -> None:
        self._codes, self._vectors = codes, vectors
        self._metric: Metric = metric

    @property
    def mean_list(self) -> float:
        """Codes in a list, on average."""
        return self._codes.count / len(self._codes.list_sizes())

    def gaps(self, queries: Vectors) -> Vectors:
        """How much farther each list is than the nearest one, ``[queries, lists]``."""
        return self._codes.gaps(queries)

    def candidates(self, queries: Vectors, candidates: int, probing: Probing) -> Rows:
        """The rows nearest by their codes; all calls from one thread."""
        return self._codes.search(queries, min(candidates, self._codes.count), probing)

    def rank(self, queries: Vectors, candidates: Rows, n_results: int) -> Ranked:
        """See :func:`rank`; from any thread."""
        return rank(queries, candidates, self._vectors, self._metric, n_results)


def exact_nearest(
    queries: Vectors,
    vectors: VectorFile,
    metric: Metric,
    n_results: int,
    own_rows: Rows | None = None,
    advance: Callable[[int], None] | None = None,
) -> Rows:
    """The rows that are nearest of all, ``[queries, n_results]``, by comparing each query with every vector.

    Args:
        queries: ``[queries, dimension]``, by :func:`ready_vectors`.
        vectors: of the index.
        metric: of the index.
        n_results: how many.
        own_rows: ``[queries]``, a row that does not count for each query; None: all count.
        advance: called with the rows compared so far.
    """
    import faiss

    rows = np.empty((len(queries), 0), np.int64)
    scores = np.empty((len(queries), 0), np.float32)
    kind, sign = (faiss.METRIC_L2, -1) if metric == "l2" else (faiss.METRIC_INNER_PRODUCT, 1)
    beside = 0 if own_rows is None else 1
    for first, slab in prepared_ahead(vectors.slabs()):
        found, places = faiss.knn(queries, slab, min(n_results + beside, len(slab)), metric=kind)
        found, places = sign * found, places + first
        if own_rows is not None:
            found[places == own_rows[:, None]] = -np.inf
        rows, scores = np.concatenate([rows, places], axis=1), np.concatenate([scores, found], axis=1)
        order = np.lexsort((rows, -scores), axis=1)[:, :n_results]
        rows, scores = np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
        if advance is not None:
            advance(first + len(slab))
    return rows
