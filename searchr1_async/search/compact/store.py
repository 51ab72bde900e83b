"""A compact index as a read-only store: nearest by codes, re-ranked by full vectors. Everything but :class:`CompactStore` blocks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
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


def ready_vectors(vectors: Vectors, metric: Metric) -> Vectors:
    """Vectors as stored and searched: float32, normalised for ``"cosine"`` (zero vectors stay zero)."""
    vectors = np.ascontiguousarray(vectors, np.float32)
    if metric != "cosine":
        return vectors
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths == 0, 1, lengths)).astype(np.float32, copy=False)


def are_usable(vectors: Vectors) -> NDArray[np.bool_]:
    """Whether each vector's values and its squared float32 length are finite, ``[n]``."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.isfinite(squared_lengths(np.asarray(vectors, np.float32)))


@dataclass(frozen=True, slots=True)
class CompactIndex:
    """Codes and vectors of an index."""

    codes: Codes
    vectors: VectorFile
    metric: Metric

    def candidates(self, queries: Vectors, candidates: int, probing: Probing) -> Rows:
        """The nearest rows by their codes. Call from one thread only."""
        return self.codes.search(queries, min(candidates, self.codes.count), probing)

    def rank(self, queries: Vectors, candidates: Rows, n_results: int) -> tuple[Rows, Vectors]:
        """The best candidates by their full vectors, and their scores, both ``[n, results]``. Thread-safe.

        Scores are those of the Chroma stores: the inner product, or ``1 - d / 2`` of the squared distance d for ``"l2"``. Queries
        ``[n, dimension]`` are of :func:`ready_vectors`; rows, ``[n, candidates]``, are padded with -1.
        """
        scores, lengths = self.vectors.products(queries, np.maximum(candidates, 0))
        if self.metric == "l2":
            distances = squared_lengths(queries)[:, None] + lengths - 2 * scores
            scores = (1 - distances / 2).astype(np.float32, copy=False)
        scores[candidates < 0] = -np.inf
        # Ties are broken by row, so the order does not depend on how candidates were found.
        order = np.lexsort((candidates, -scores), axis=1)[:, :n_results]
        return np.take_along_axis(candidates, order, 1), np.take_along_axis(scores, order, 1)


def exact_nearest(
    queries: Vectors,
    vectors: VectorFile,
    metric: Metric,
    n_results: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Rows:
    """The exact nearest rows, ``[queries, n_results]``, by brute force; fewer if there are fewer. Queries are of :func:`ready_vectors`."""
    import faiss

    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    best = faiss.ResultHeap(len(queries), min(n_results, len(vectors)), keep_max=metric != "l2")
    for first, slab in prepared_ahead(vectors.slabs()):
        found, places = faiss.knn(queries, slab, min(n_results, len(slab)), metric=kind)
        best.add_result(found, places + first)
        advance(first + len(slab))
    best.finalize()
    return best.I


def refuse_changed(folder: Path, manifest: CompactManifest, advice: str = ADVICE) -> None:
    """Checks the files of an index against their checksums, large files in part. Blocking. Raises DamagedIndexError."""
    for name, record in manifest.files.items():
        refuse_other(folder / name, record, advice)


class CompactStore:
    """An index built by :func:`~searchr1_async.search.builders.build_compact_index`.

    Codes are compared in one dedicated thread (with faiss's threads beneath it) and candidates re-ranked in others, so one batch
    waits for the disk while the next compares codes.

    Args:
        folder: index folder.
        probes: inverted lists searched per query; None uses the calibrated, per-query choice.
        candidates: passages re-ranked by their full vectors; None uses the calibrated number.

    Raises:
        StoreError: there is no index, or it is unfinished.
        ConfigurationError: a number is below 1.
    """

    max_queries = 256
    max_requests = 2

    def __init__(self, folder: str | Path, *, probes: int | None = None, candidates: int | None = None) -> None:
        for name, value in (("probes", probes), ("candidates", candidates)):
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} is {value}: give at least 1, or None")
        self.folder = absolute_path(folder, "folder")
        self.name = f"compact index {self.folder}"
        self.manifest = CompactManifest.load(self.folder)
        chosen = self.manifest.calibration
        self.probing = Probing(chosen.margin, chosen.most_probes) if probes is None else Probing(None, probes)
        self.candidates = candidates or chosen.candidates
        self.dimension: int | None = self.manifest.dimension
        self.fingerprint = f"{self.manifest.fingerprint}-{self.probing.margin}-{self.probing.most}-{self.candidates}"
        self._thread = OwnThread("searchr1-codes")
        self._opened: tuple[CompactIndex, PassageFile] | None = None

    async def open(self) -> None:
        """Checks the files, reads the codes into the page cache, and searches for a sample of the index's own vectors.

        Raises DamagedIndexError if a file is missing, truncated or corrupt, or the sampled vectors are not found.
        """
        if self._opened is not None:
            return
        advice = (
            f"Copy the whole folder again from where it was built, or rebuild it from {self.manifest.source}: "
            f"await sr.search.build_compact_index(source, {str(self.folder)!r})"
        )
        await in_thread(lambda: self._check(advice))
        with anyio.CancelScope(shield=True):  # takes milliseconds; cancelling it would leak open files
            self._opened = await self._thread.run(self._open)
        try:
            if (opened := self._opened) is None:
                raise StoreError(f"{self.name} was closed while it was being opened")
            rows = np.unique(np.linspace(0, self.manifest.passages - 1, SAMPLE).astype(np.int64))
            sample = await in_thread(lambda: opened[0].vectors.gather(rows))
            await refuse_unproven(self, sample, self.manifest.metric, advice)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.aclose()
            raise

    def _check(self, advice: str) -> None:
        refuse_changed(self.folder, self.manifest, advice)
        with (self.folder / LISTS_NAME).open("rb", buffering=0) as file:
            while file.read(1 << 24):
                anyio.from_thread.check_cancelled()

    def _open(self) -> tuple[CompactIndex, PassageFile]:
        manifest = self.manifest
        try:
            codes = Codes(self.folder, usable_cores(), manifest.metric)
            if (codes.count, codes.dimension) != (manifest.passages, manifest.dimension):
                raise ValueError("the codes are of another index")
            vectors = VectorFile(self.folder, manifest.passages, manifest.dimension)
            return CompactIndex(codes, vectors, manifest.metric), PassageFile(self.folder, manifest.passages)
        except (OSError, ValueError) as error:
            raise StoreError(
                f"the files in {self.folder} do not match the manifest ({error}): copy the whole folder again",
                is_fatal=True,
            ) from error

    async def query(self, vectors: Vectors, n_results: int) -> Found:
        opened = self._opened
        if opened is None:
            raise StoreError(f"{self.name} is not open")
        if not len(vectors):
            return ()
        if vectors.shape[1] != self.dimension:
            raise StoreError(
                f"{self.name} was built with another embedder (dimension {self.dimension}, got {vectors.shape[1]}): search it "
                "with the embedder it was built with",
                is_fatal=True,
            )
        if not are_usable(vectors).all():
            raise RefusedInput(f"{self.name}: a query vector has non-finite or too large values")
        ready = ready_vectors(vectors, self.manifest.metric)
        (index, passages), candidates = opened, max(self.candidates, n_results)

        def ranked(rows: Rows) -> Found:
            return tuple(
                tuple(passages.read(int(row), float(score)) for row, score in zip(*best, strict=True) if row >= 0)
                for best in zip(*index.rank(ready, rows, n_results), strict=True)
            )

        try:
            rows = await self._thread.run(index.candidates, ready, candidates, self.probing)
            return await anyio.to_thread.run_sync(ranked, rows, abandon_on_cancel=True)
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

    async def aclose(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            self._thread.close()
            opened[1].close()
