"""A compact index as a read-only store. Processes share its files through the page cache.

Search in a compact index: nearest by codes, re-ranked by full vectors. Blocking; call it in worker threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
import anyio.from_thread
import anyio.to_thread
import numpy as np
from numpy.typing import NDArray

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.boundary.waits import OwnThread, in_thread, prepared_ahead, usable_cores
from searchr1_async.errors import ConfigurationError, StoreError
from searchr1_async.search.compact.codes import Codes, Probing, squared_lengths
from searchr1_async.search.compact.files import LISTS_NAME, CompactManifest, PassageFile, Rows, VectorFile
from searchr1_async.search.embedders import Vectors
from searchr1_async.search.faults import RefusedInput
from searchr1_async.search.stores.vector_store import ADVICE, SAMPLE, Found, Metric, refuse_other, refuse_unproven


@dataclass(frozen=True, slots=True)
class Ranked:
    """The nearest rows of some queries, nearest first."""

    rows: Rows
    """``[queries, results]``, padded with -1."""
    scores: NDArray[np.float32]
    """``[queries, results]``, from :func:`similarities`."""


def ready_vectors(vectors: Vectors, metric: Metric) -> Vectors:
    """Vectors as stored and searched: float32, normalised for ``"cosine"`` (zero vectors stay zero)."""
    vectors = np.ascontiguousarray(vectors, np.float32)
    if metric != "cosine":
        return vectors
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    lengths[lengths == 0] = 1
    return (vectors / lengths).astype(np.float32, copy=False)


def are_usable(vectors: Vectors) -> NDArray[np.bool_]:
    """Whether each vector's values and its squared float32 length are finite, ``[n]``."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.isfinite(squared_lengths(np.asarray(vectors, np.float32)))


def similarities(products: Vectors, lengths: Vectors, own_lengths: Vectors, metric: Metric) -> Vectors:
    """Ranking scores, as the Chroma stores define them: the inner product, or ``1 - d / 2`` of the squared distance d for ``"l2"``.

    Args:
        products: inner products, ``[queries, candidates]``.
        lengths: squared lengths of the candidates, ``[queries, candidates]``.
        own_lengths: squared lengths of the queries, ``[queries, 1]``.
        metric: the index's metric.
    """
    if metric != "l2":
        return products
    return (1 - (own_lengths + lengths - 2 * products) / 2).astype(np.float32, copy=False)


def rank(queries: Vectors, candidates: Rows, vectors: VectorFile, metric: Metric, n_results: int) -> Ranked:
    """Ranks candidates by their full vectors.

    Args:
        queries: ``[queries, dimension]``, from :func:`ready_vectors`.
        candidates: rows, ``[queries, candidates]``, padded with -1.
        vectors: the index's vectors.
        metric: the index's metric.
        n_results: results to return.
    """
    products, lengths = vectors.products(queries, np.maximum(candidates, 0))
    scores = similarities(products, lengths, squared_lengths(queries)[:, None], metric)
    scores[candidates < 0] = -np.inf
    # Ties are broken by row, so the order does not depend on how candidates were found.
    order = np.lexsort((candidates, -scores), axis=1)[:, :n_results]
    return Ranked(np.take_along_axis(candidates, order, 1), np.take_along_axis(scores, order, 1))


class CompactIndex:
    """Codes and vectors of an index."""

    def __init__(self, codes: Codes, vectors: VectorFile, metric: Metric) -> None:
        self._codes, self._vectors = codes, vectors
        self._metric: Metric = metric

    @property
    def mean_list(self) -> float:
        """Mean codes per list."""
        return self._codes.count / len(self._codes.list_sizes())

    def gaps(self, queries: Vectors) -> Vectors:
        """How much farther each list is than the nearest, ``[queries, lists]``."""
        return self._codes.gaps(queries)

    def candidates(self, queries: Vectors, candidates: int, probing: Probing) -> Rows:
        """The nearest rows by their codes. Call from one thread only."""
        return self._codes.search(queries, min(candidates, self._codes.count), probing)

    def rank(self, queries: Vectors, candidates: Rows, n_results: int) -> Ranked:
        """See :func:`rank`. Thread-safe."""
        return rank(queries, candidates, self._vectors, self._metric, n_results)


def exact_nearest(
    queries: Vectors,
    vectors: VectorFile,
    metric: Metric,
    n_results: int,
    own_rows: Rows | None = None,
    advance: Callable[[int], None] | None = None,
) -> Rows:
    """The exact nearest rows, ``[queries, n_results]``, by brute force.

    Args:
        queries: ``[queries, dimension]``, from :func:`ready_vectors`.
        vectors: the index's vectors.
        metric: the index's metric.
        n_results: results per query.
        own_rows: ``[queries]``, a row to exclude per query, if any.
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


def refuse_changed(folder: Path, manifest: CompactManifest, advice: str = ADVICE) -> None:
    """Checks the files of an index against their checksums, large files in part. Blocking.

    Raises:
        DamagedIndexError: a file is missing, truncated or corrupt.
    """
    for name, record in manifest.files.items():
        refuse_other(folder / name, record, check=anyio.from_thread.check_cancelled, advice=advice)


@dataclass(frozen=True, slots=True)
class _Opened:
    index: CompactIndex
    vectors: VectorFile
    passages: PassageFile


class CompactStore:
    """An index built by :func:`~searchr1_async.search.builders.build_compact_index`.

    Codes are compared in one dedicated thread (with faiss's threads beneath it) and candidates re-ranked in others, so one batch
    waits for the disk while the next compares codes.

    Args:
        folder: index folder.
        probes: inverted lists searched per query; None uses the calibrated, per-query choice.
        candidates: passages re-ranked by their full vectors; None uses the calibrated number.
        threads: faiss threads for comparing codes; None uses one per core. NumPy compares centres in its own threads.

    Raises:
        StoreError: there is no index, or it is unfinished.
        ConfigurationError: a number is below 1.
    """

    max_queries = 256
    max_requests = 2

    def __init__(
        self,
        folder: str | Path,
        *,
        probes: int | None = None,
        candidates: int | None = None,
        threads: int | None = None,
    ) -> None:
        for name, value in (("probes", probes), ("candidates", candidates), ("threads", threads)):
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} is {value}: give at least 1, or None")
        self.folder = absolute_path(folder, "folder")
        self.manifest = CompactManifest.load(self.folder)
        chosen = self.manifest.calibration
        self.probing = Probing(chosen.margin, chosen.most_probes) if probes is None else Probing.fixed(probes)
        self.candidates = candidates or chosen.candidates
        self._threads = threads or usable_cores()
        self._thread = OwnThread("searchr1-codes")
        self._opened: _Opened | None = None

    @property
    def name(self) -> str:
        return f"compact index {self.folder}"

    @property
    def fingerprint(self) -> str:
        return f"{self.manifest.fingerprint}-{self.probing.margin}-{self.probing.most}-{self.candidates}"

    @property
    def dimension(self) -> int | None:
        return self.manifest.dimension

    async def open(self) -> None:
        """Checks the files, reads the codes into the page cache, and searches for a sample of the index's own vectors.

        Raises:
            DamagedIndexError: a file is missing, truncated or corrupt, or the sampled vectors are not found.
        """
        if self._opened is not None:
            return
        await in_thread(self._refuse_others)
        with anyio.CancelScope(shield=True):  # takes milliseconds; cancelling it would leak open files
            self._opened = await self._thread.run(self._open)
        try:
            await refuse_unproven(self, await in_thread(self._sample), self.manifest.metric, self._advice)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.aclose()
            raise

    @property
    def _advice(self) -> str:
        return (
            f"Copy the whole folder again from where it was built, or rebuild it from {self.manifest.source}: "
            f"await sr.search.build_compact_index(source, {str(self.folder)!r})"
        )

    def _sample(self) -> Vectors:
        """Stored vectors that a search must find."""
        if (opened := self._opened) is None:
            raise StoreError(f"{self.name} was closed while it was being opened")
        rows = np.unique(np.linspace(0, self.manifest.passages - 1, SAMPLE).astype(np.int64))
        vectors = opened.vectors.gather(rows)
        return ready_vectors(vectors[vectors.any(axis=1)], self.manifest.metric)

    def _refuse_others(self) -> None:
        refuse_changed(self.folder, self.manifest, self._advice)
        with (self.folder / LISTS_NAME).open("rb", buffering=0) as file:
            while file.read(1 << 24):
                anyio.from_thread.check_cancelled()

    def _open(self) -> _Opened:
        manifest = self.manifest
        try:
            codes = Codes(self.folder, self._threads, manifest.metric)
            vectors = VectorFile(self.folder, manifest.passages, manifest.dimension, manifest.vectors)
            passages = PassageFile(self.folder, manifest.passages)
        except (OSError, ValueError) as error:
            raise StoreError(
                f"the files in {self.folder} do not match the manifest ({error}): copy the whole folder again",
                is_fatal=True,
            ) from error
        if (codes.count, codes.dimension, len(codes.list_sizes())) != (
            manifest.passages,
            manifest.dimension,
            manifest.lists,
        ):
            raise StoreError(
                f"the codes in {self.folder} do not match the manifest: copy the whole folder again", is_fatal=True
            )
        return _Opened(CompactIndex(codes, vectors, manifest.metric), vectors, passages)

    async def query(self, vectors: Vectors, n_results: int) -> Found:
        opened = self._opened
        if opened is None:
            raise StoreError(f"{self.name} is not open")
        if not len(vectors):
            return ()
        if vectors.shape[1] != self.manifest.dimension:
            raise StoreError(
                f"{self.name} was built with another embedder (dimension {self.manifest.dimension}, got "
                f"{vectors.shape[1]}): search it with the embedder it was built with",
                is_fatal=True,
            )
        if not are_usable(vectors).all():
            raise RefusedInput(f"{self.name}: a query vector has non-finite or too large values")
        ready = ready_vectors(vectors, self.manifest.metric)
        candidates = max(self.candidates, n_results)
        try:
            rows = await self._thread.run(opened.index.candidates, ready, candidates, self.probing)
            return await anyio.to_thread.run_sync(
                lambda: _passages(opened.index.rank(ready, rows, n_results), opened.passages), abandon_on_cancel=True
            )
        except OSError as error:
            raise StoreError(
                f"{self.name} cannot be read ({error}): copy the whole folder again", is_fatal=True
            ) from error
        except (Exception, asyncio.CancelledError) as error:
            # Closing drops work queued for the thread, which surfaces as a cancellation of this task.
            task = asyncio.current_task()
            if self._opened is opened or (task is not None and task.cancelling()):
                raise
            raise StoreError(f"{self.name} was closed during a query") from error

    async def count(self) -> int:
        return self.manifest.passages

    async def verify(self) -> None:
        """Compares every byte of the files with the manifest's checksums; about 1 s per GB.

        Raises:
            StoreError: a file is missing, replaced or corrupt.
        """
        for name, record in self.manifest.files.items():
            check = anyio.from_thread.check_cancelled
            await in_thread(partial(refuse_other, self.folder / name, record, whole=True, check=check))

    async def aclose(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            self._thread.close()
            opened.passages.close()


def _passages(ranked: Ranked, passages: PassageFile) -> Found:
    return tuple(
        tuple(passages.read(int(row), float(score)) for row, score in zip(rows, scores, strict=True) if row >= 0)
        for rows, scores in zip(ranked.rows, ranked.scores, strict=True)
    )
