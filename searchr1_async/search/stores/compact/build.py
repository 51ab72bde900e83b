"""Making a compact index: rows copied, lists learnt, codes written, probes chosen; each step kept, so that a kill repeats little.

::

    rows        passages and vectors go to their files, block by block; ``building/progress.json`` says how many are on the disk
    lists       centres are learnt from a sample: ``building/centres.npz``
    codes       vectors are put into lists, two million rows after another: ``building/codes-<rows>.faiss``
    exact       the nearest of the sample's queries by comparing with all: ``building/exact.npz``
    calibrate   probes and candidates are tried and chosen
    checksums   of all files; then the manifest, with which the index is whole

Whatever is repeated after a kill gives the same bytes: rows come in the source's order, samples and clusters from a seed, codes in
blocks of a fixed size. Each step is a pure function of the files before it. Everything but the copying is synchronous.
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

from searchr1_async.episodes.types import Passage
from searchr1_async.errors import StoreError
from searchr1_async.events import Emit, PhaseAdvanced, PhaseEnded, PhaseStarted
from searchr1_async.files import write_arrays, write_atomically
from searchr1_async.search.embedders.base import Vectors
from searchr1_async.search.sources.base import SourceFacts, VectorSource
from searchr1_async.search.stores.checksums import record_of
from searchr1_async.search.stores.compact.calibrate import EXACT_RESULTS, calibration_of, measure
from searchr1_async.search.stores.compact.codes import (
    Codes,
    add_codes,
    empty_codes,
    load_codes,
    save_codes,
    write_codes,
)
from searchr1_async.search.stores.compact.index import CompactIndex, are_usable, exact_nearest, ready_vectors
from searchr1_async.search.stores.compact.layout import (
    BUILDING_NAME,
    CODES_NAME,
    COMPACT_FORMAT,
    MANIFEST_NAME,
    Calibration,
    CompactManifest,
    CompactSettings,
    file_names,
)
from searchr1_async.search.stores.compact.lists import ListAssigner, learn_centres, lists_for, sample_size
from searchr1_async.search.stores.compact.passage_file import PassageWriter
from searchr1_async.search.stores.compact.vector_file import Rows, VectorFile, VectorWriter
from searchr1_async.threads import in_thread, prepared_ahead, usable_cores

_SYNC_ROWS = 65_536
"""Rows between two notes of what is on the disk."""
_CODE_ROWS = 65_536
"""Put into lists together."""
_CODE_BLOCKS_KEPT = 32
"""Blocks of codes between two files that a kill may go on from: 2 million rows, some three minutes' work, for 0.2 to 2.6 GB written."""
SAMPLE_QUERIES = 500
"""As many show what a recall is to a hundredth: passages of the index, where no queries are given."""


OnRows = Callable[[int, int], None]
"""Rows done, rows in all."""


class CompactBuilder:
    """Makes one index in a folder, or goes on with what was begun there.

    Args:
        folder: of the index; exists, and nobody else builds in it.
        source: open.
        facts: of the source.
        settings: how it is made.
        emit: told of the phases ``rows``, ``lists``, ``codes``, ``exact``, ``calibrate`` and ``checksums``.
        on_progress: called with rows copied and in all.
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
        """Does what is not done yet.

        Args:
            queries: ``[queries, dimension]``, of real queries; None takes passages of the index for queries.

        Raises:
            CorpusError, EmbeddingError, StoreError: a row cannot be had.
            OSError: the folder cannot be written; what is done is kept.
        """
        await in_thread(self._refuse_other_build)
        await in_thread(self._remove_leftovers)
        await self._copy_rows()
        return await in_thread(lambda: self._finish(queries))

    def _refuse_other_build(self) -> None:
        """Raises StoreError where the folder holds a build from something else, or with other settings."""
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
                f"{self._folder} holds an unfinished index from another source or with other settings ({', '.join(differs)} "
                "differ): give another folder, or delete that one"
            )

    def _remove_leftovers(self) -> None:
        """What processes that were killed while they wrote a file left beside it: of codes, gigabytes."""
        names = [*file_names(self._settings.vectors), MANIFEST_NAME]
        for folder, begins in ((self._folder, names), (self._building, [""])):
            beginnings = tuple(f".{begin}" for begin in begins)
            for path in (
                [path for path in folder.iterdir() if path.name.startswith(beginnings)] if folder.is_dir() else ()
            ):
                path.unlink(missing_ok=True)

    # Rows: the only step that waits for others.

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
            raise StoreError(f"{facts.name} gave {done:,} rows where it had said {facts.count:,}: it changed meanwhile")

    def _checked(self, passages: int, vectors: Vectors, start: int) -> Vectors:
        facts = self._facts
        if vectors.shape != (passages, facts.dimension):
            raise StoreError(
                f"{facts.name}, row {start:,}: vectors of shape {vectors.shape} for {passages} passages of dimension {facts.dimension}"
            )
        if start + passages > facts.count:
            raise StoreError(
                f"{facts.name} gave a row {facts.count:,} where it had said {facts.count:,} rows, counted from 0: it changed meanwhile"
            )
        if not (usable := are_usable(vectors)).all():
            row = start + int(np.flatnonzero(~usable)[0])
            raise StoreError(f"{facts.name}: the vector of row {row:,} holds numbers that are not finite, or too large")
        ready = ready_vectors(vectors, facts.metric)
        # What float16 cannot hold: an inner product's vectors may have any length.
        if self._settings.vectors == "float16" and np.abs(ready).max(initial=0) > np.finfo(np.float16).max:
            raise StoreError(f"{facts.name}: vectors hold numbers over 65,504: keep them as 'int8'")
        return ready

    # The rest, in one thread.

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
        """The codes that an earlier session kept."""
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
        """Of the lists; kept."""
        path = self._building / "centres.npz"
        if path.exists():
            with np.load(path) as kept:
                return kept["centres"]
        count, seed = len(vectors), self._settings.seed
        with self._phase("lists", self._lists, "lists") as phase:
            check = anyio.from_thread.check_cancelled
            sample = vectors.gather(np.sort(_chosen(count, sample_size(count, self._lists), seed)), check)
            # In no order: neighbouring rows are alike.
            np.random.default_rng(seed).shuffle(sample)
            # Of length 1 too where vectors are: longer centres, which are of narrower lists, would draw queries away from wide
            # ones. The nearest of 95 % of questions stood in 0.58 times the codes so.
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
            own_rows = rows if len(vectors) > 1 else None  # a passage alone has no other one to find
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
        """Kept, with the queries that it is of: others may be given when the build goes on."""
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
    """A step, and whom to tell how far it is."""

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
