"""Builds a compact index in steps. Each step's output is kept, so a killed build repeats little work.

::

    rows        passages and vectors are appended to their files; ``building/progress.json`` counts the rows on disk
    lists       k-means centres from a sample: ``building/centres.npz``
    codes       vectors are assigned to lists and encoded: ``building/codes-<rows>.faiss`` every two million rows
    exact       brute-force neighbours of the sample queries: ``building/exact.npz``
    calibrate   measures and picks probes and candidates
    checksums   of all files; writing the manifest completes the index

Steps are deterministic, so repeated work gives the same bytes: rows keep the source's order, samples and clusters are seeded, code
blocks have a fixed size. Everything but the copying is synchronous.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import numpy as np

from searchr1_async.boundary.paths import write_arrays, write_atomically
from searchr1_async.boundary.waits import in_thread, prepared_ahead, usable_cores
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import StoreError
from searchr1_async.events import Emit, PhaseAdvanced, PhaseEnded, PhaseStarted
from searchr1_async.search.compact.calibration import EXACT_RESULTS, calibration_of, measure
from searchr1_async.search.compact.codes import Codes, add_codes, empty_codes, load_codes, save_codes, write_codes
from searchr1_async.search.compact.files import PassageWriter, Rows, VectorFile, VectorWriter
from searchr1_async.search.compact.inverted_lists import (
    ListAssigner,
    learn_centres,
    lists_for,
    sample_size,
)
from searchr1_async.search.compact.layout import (
    BUILDING_NAME,
    CODES_NAME,
    COMPACT_FORMAT,
    MANIFEST_NAME,
    Calibration,
    CompactManifest,
    CompactSettings,
    file_names,
)
from searchr1_async.search.compact.store import CompactIndex, are_usable, exact_nearest, ready_vectors
from searchr1_async.search.embedders import Vectors
from searchr1_async.search.stores.sources import SourceFacts, VectorSource
from searchr1_async.search.stores.vector_store import record_of

_SYNC_ROWS = 65_536
"""Rows between two syncs."""
_CODE_ROWS = 65_536
_CODE_BLOCKS_KEPT = 32
"""Blocks between two checkpoints of the codes: 2 million rows, about three minutes of work."""
SAMPLE_QUERIES = 500
"""Queries sampled from the index when none are given; enough for recall to the nearest hundredth."""


OnRows = Callable[[int, int], None]
"""``(rows done, total rows)``."""


class CompactBuilder:
    """Builds one index in a folder, or resumes an unfinished build there.

    Args:
        folder: index folder; must exist, with no concurrent build in it.
        source: an open source.
        facts: the source's facts.
        settings: build settings.
        emit: receives the phases ``rows``, ``lists``, ``codes``, ``exact``, ``calibrate`` and ``checksums``.
        on_progress: called with rows copied and total rows.
    """

    def __init__(
        self,
        folder: Path,
        source: VectorSource,
        facts: SourceFacts,
        settings: CompactSettings,
        emit: Emit,
        on_progress: OnRows | None = None,
    ) -> None:
        self._folder, self._source, self._facts = folder, source, facts
        self._settings, self._emit, self._on_progress = settings, emit, on_progress
        self._building = folder / BUILDING_NAME
        self._lists = min(settings.lists or lists_for(facts.count), facts.count)
        self._threads = settings.threads or usable_cores()

    async def build(self, queries: Vectors | None) -> CompactManifest:
        """Runs the remaining steps.

        Args:
            queries: real queries, ``[queries, dimension]``; None samples passages of the index.

        Raises:
            CorpusError, EmbeddingError, StoreError: a row cannot be read.
            OSError: the folder cannot be written; finished work is kept.
        """
        await in_thread(self._refuse_other_build)
        await in_thread(self._remove_leftovers)
        await self._copy_rows()
        return await in_thread(lambda: self._finish(queries))

    def _refuse_other_build(self) -> None:
        """Raises StoreError if the folder holds a build of another source or with other settings."""
        identity = {
            "format": COMPACT_FORMAT,
            "source": self._facts.fingerprint,
            "rows": self._facts.count,
            "dimension": self._facts.dimension,
            "metric": self._facts.metric,
            "vectors": self._settings.vectors,
            "lists": self._lists,
            "seed": self._settings.seed,
        }
        path = self._building / "identity.json"
        if not path.exists():
            self._building.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(identity, indent=1).encode())
            return
        try:
            begun = json.loads(path.read_bytes())
        except ValueError:
            begun = {}
        if differs := [name for name, value in identity.items() if begun.get(name) != value]:
            raise StoreError(
                f"{self._folder} holds an unfinished index with a different source or settings ({', '.join(differs)} "
                "differ): choose another folder, or delete this one"
            )

    def _remove_leftovers(self) -> None:
        """Deletes temporary files of killed processes; those of codes take gigabytes."""
        names = [*file_names(self._settings.vectors), MANIFEST_NAME]
        for folder, begins in ((self._folder, names), (self._building, [""])):
            beginnings = tuple(f".{begin}" for begin in begins)
            for path in (
                [path for path in folder.iterdir() if path.name.startswith(beginnings)] if folder.is_dir() else ()
            ):
                path.unlink(missing_ok=True)

    # Rows: the only asynchronous step.

    async def _copy_rows(self) -> None:
        facts, path = self._facts, self._building / "progress.json"
        done = int(json.loads(path.read_bytes())["rows"]) if path.exists() else 0
        if done == facts.count:
            return
        synced = done

        def keep() -> None:
            vectors.sync()
            passages.sync()
            write_atomically(path, json.dumps({"rows": done}).encode())

        with (
            closing(VectorWriter(self._folder, facts.dimension, self._settings.vectors, done)) as vectors,
            closing(PassageWriter(self._folder, done)) as passages,
            _Phase(self._emit, "rows", facts.count, "passages") as phase,
        ):
            phase.advance(done)
            async for block, numbers in self._source.blocks(done):
                ready = self._checked(len(block), numbers, done)
                await in_thread(partial(_append, vectors, passages, ready, block))
                done += len(block)
                phase.advance(done)
                if self._on_progress is not None:
                    self._on_progress(done, facts.count)
                if done - synced >= _SYNC_ROWS or done == facts.count:
                    await in_thread(keep)
                    await self._source.kept(done)
                    synced = done
        if done != facts.count:
            raise StoreError(
                f"{facts.name} returned {done:,} rows instead of {facts.count:,}: it changed during the build"
            )

    def _checked(self, passages: int, vectors: Vectors, start: int) -> Vectors:
        facts = self._facts
        if vectors.shape != (passages, facts.dimension):
            raise StoreError(
                f"{facts.name}, row {start:,}: vectors of shape {vectors.shape} for {passages} passages of dimension {facts.dimension}"
            )
        if start + passages > facts.count:
            raise StoreError(
                f"{facts.name} returned more than the {facts.count:,} rows it had reported: it changed during the build"
            )
        if not (usable := are_usable(vectors)).all():
            row = start + int(np.flatnonzero(~usable)[0])
            raise StoreError(f"{facts.name}: the vector of row {row:,} has non-finite or too large values")
        ready = ready_vectors(vectors, facts.metric)
        # Inner-product vectors may have any length, beyond what float16 holds.
        if self._settings.vectors == "float16" and np.abs(ready).max(initial=0) > np.finfo(np.float16).max:
            raise StoreError(f"{facts.name}: vector values exceed 65,504, the float16 maximum: use vectors='int8'")
        return ready

    # The remaining steps run in one thread.

    def _phase(self, name: str, total: int, unit: str) -> _Phase:
        return _Phase(partial(anyio.from_thread.run_sync, self._emit), name, total, unit)

    def _finish(self, queries: Vectors | None) -> CompactManifest:
        import faiss

        faiss.omp_set_num_threads(self._threads)
        facts = self._facts
        vectors = VectorFile(self._folder, facts.count, facts.dimension, self._settings.vectors)
        self._write_codes(vectors)
        return self._seal(self._calibrate(vectors, queries))

    def _write_codes(self, vectors: VectorFile) -> None:
        target = self._folder / CODES_NAME
        if target.exists():
            return
        metric = self._facts.metric
        centres = self._centres(vectors)
        assigner = ListAssigner(centres, metric, self._settings.seed, self._threads)
        index, done = self._begun_codes()
        if index is None:
            index = empty_codes(centres, metric)
        with self._phase("codes", len(vectors), "passages") as phase:
            phase.advance(done)
            since = 0
            for first, slab in prepared_ahead(vectors.slabs(done, size=_CODE_ROWS)):
                anyio.from_thread.check_cancelled()
                add_codes(index, slab, assigner.nearest(slab))
                phase.advance(first + len(slab))
                since += 1
                if since == _CODE_BLOCKS_KEPT and index.ntotal < len(vectors):
                    self._keep_codes(index)
                    since = 0
        write_codes(index, self._folder)
        for path in self._code_files():
            path.unlink()

    def _begun_codes(self) -> tuple[Any, int]:
        """Loads the last checkpoint of the codes, if any."""
        for path in reversed(self._code_files()):
            index = load_codes(path)
            return index, int(index.ntotal)
        return None, 0

    def _keep_codes(self, index: Any) -> None:
        older = self._code_files()
        save_codes(index, self._building / f"codes-{index.ntotal:012d}.faiss")
        for path in older:
            path.unlink()

    def _code_files(self) -> list[Path]:
        return sorted(self._building.glob("codes-*.faiss"))

    def _centres(self, vectors: VectorFile) -> Vectors:
        """List centres, cached on disk."""
        path = self._building / "centres.npz"
        if path.exists():
            with np.load(path) as kept:
                return kept["centres"]
        count, seed = len(vectors), self._settings.seed
        with self._phase("lists", self._lists, "lists") as phase:
            check = anyio.from_thread.check_cancelled
            sample = vectors.gather(np.sort(_chosen(count, sample_size(count, self._lists), seed)), check)
            # Shuffled, because neighbouring rows are alike.
            np.random.default_rng(seed).shuffle(sample)
            # Normalised like the vectors: longer centres (of tighter lists) would draw queries away from wide lists.
            centres = ready_vectors(learn_centres(sample, self._lists, seed, check), self._facts.metric)
            write_arrays(path, centres=centres)
            phase.advance(self._lists)
        return centres

    def _calibrate(self, vectors: VectorFile, queries: Vectors | None) -> Calibration:
        settings, facts = self._settings, self._facts
        origin, own_rows = "queries", None
        if queries is None:
            rows = np.sort(_chosen(len(vectors), SAMPLE_QUERIES, settings.seed + 1))
            origin, queries = "passages", vectors.gather(rows)
            own_rows = rows if len(vectors) > 1 else None  # a single passage has no other to find
        queries = ready_vectors(queries, facts.metric)
        results = min(max(EXACT_RESULTS, settings.recall_at), max(1, len(vectors) - 1))
        exact = self._exact(vectors, queries, results, own_rows)
        with self._phase("calibrate", 1, "curves") as phase:
            reader = CompactIndex(Codes(self._folder, self._threads, facts.metric), vectors, facts.metric)
            at = min(settings.recall_at, results)
            curve = measure(
                reader,
                queries,
                exact,
                at,
                own_rows=own_rows,
                asked=settings.recall,
                check=anyio.from_thread.check_cancelled,
            )
            phase.advance(1)
        return calibration_of(curve, settings.recall, settings.recall_at, reader.mean_list, len(queries), origin)

    def _exact(self, vectors: VectorFile, queries: Vectors, results: int, own_rows: Rows | None) -> Rows:
        """Brute-force neighbours, cached with their queries: a resumed build may be given others."""
        path = self._building / "exact.npz"
        if path.exists():
            with np.load(path) as kept:
                if np.array_equal(kept["queries"], queries) and kept["rows"].shape[1] == results:
                    return kept["rows"]
        with self._phase("exact", len(vectors), "passages") as phase:

            def advance(done: int) -> None:
                anyio.from_thread.check_cancelled()
                phase.advance(done)

            rows = exact_nearest(queries, vectors, self._facts.metric, results, own_rows, advance)
        write_arrays(path, queries=queries, rows=rows)
        return rows

    def _seal(self, calibration: Calibration) -> CompactManifest:
        import faiss

        facts, settings = self._facts, self._settings
        names = file_names(settings.vectors)
        with self._phase("checksums", len(names), "files") as phase:
            files = {}
            for number, name in enumerate(names, start=1):
                files[name] = record_of(self._folder / name, anyio.from_thread.check_cancelled)
                phase.advance(number)
        manifest = CompactManifest(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            passages=facts.count,
            dimension=facts.dimension,
            metric=facts.metric,
            vectors=settings.vectors,
            lists=self._lists,
            seed=settings.seed,
            source=facts.name,
            source_fingerprint=facts.fingerprint,
            embedder=facts.embedder,
            embedder_fingerprint=facts.embedder_fingerprint,
            files=files,
            calibration=calibration,
            versions={"faiss": faiss.__version__, "numpy": np.__version__},
        )
        manifest.save(self._folder)
        shutil.rmtree(self._building, ignore_errors=True)
        return manifest


class _Phase:
    """Emits the events of one build step."""

    def __init__(self, emit: Emit, name: str, total: int, unit: str) -> None:
        self._emit, self._name, self._total, self._unit = emit, name, total, unit

    def __enter__(self) -> _Phase:
        self._began = time.monotonic()
        self._emit(PhaseStarted(self._name, self._total, self._unit))
        return self

    def advance(self, done: int) -> None:
        self._emit(PhaseAdvanced(self._name, done))

    def __exit__(self, *_: object) -> None:
        self._emit(PhaseEnded(self._name, time.monotonic() - self._began))


def _append(vectors: VectorWriter, passages: PassageWriter, numbers: Vectors, block: list[Passage]) -> None:
    vectors.append(numbers)
    passages.append(block)


def _chosen(count: int, size: int, seed: int) -> Rows:
    return np.random.default_rng(seed).choice(count, min(size, count), replace=False)
