"""Builds a compact index in steps, whose outputs are kept in ``building/``, so that a killed build repeats minutes of work.

Rows are copied; k-means of a sample gives the lists; vectors are encoded by row, then written list by list; recall and cost are measured
against the exact neighbours of sample queries; the manifest, with checksums, completes the index. Repeated steps give the same bytes.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, aclosing, closing, suppress
from datetime import UTC, datetime
from functools import partial
from io import BytesIO
from pathlib import Path
from zipfile import BadZipFile

import anyio
import anyio.from_thread
import numpy as np
from numpy.typing import NDArray

from searchr1_async.boundary.paths import write_arrays, write_atomically
from searchr1_async.boundary.waits import in_thread, prepared_ahead, usable_cores
from searchr1_async.errors import StoreError
from searchr1_async.events import Event
from searchr1_async.search.compact.codes import (
    MOST_OF_MEAN,
    SEED,
    Codes,
    Encoder,
    ListAssigner,
    Probing,
    learn_centres,
    lists_for,
    margin_of,
    sample_size,
)
from searchr1_async.search.compact.files import (
    BUILDING_NAME,
    CODES_NAME,
    COMPACT_FORMAT,
    FILE_NAMES,
    AppendedFiles,
    Calibration,
    CompactManifest,
    CompactSettings,
    CurvePoint,
    Rows,
    RowWriter,
    VectorFile,
)
from searchr1_async.search.compact.store import CompactIndex, are_usable, exact_nearest, ready_vectors
from searchr1_async.search.embedders import Vectors
from searchr1_async.search.passage_embedding import BuildOptions, build_phase
from searchr1_async.search.stores.sources import SourceFacts, VectorSource
from searchr1_async.search.stores.vector_store import record_of

SAMPLE_QUERIES = 500
"""Queries sampled from the index when none are given; enough for recall to the nearest hundredth."""
_SYNC_SECONDS = 5.0
_CODE_ROWS = 65_536
"""Rows encoded at a time."""
_MOST_FLOAT16 = float(np.finfo(np.float16).max)
CANDIDATES = (20, 50, 100, 200)
"""Tried with every number of probes."""
RECALL_AT = 3
"""Exact nearest passages whose recall is asked for."""
BATCH = 128
AFFORDABLE = 300_000
"""Codes compared per query up to which recall above the target is worth its cost; about 4 ms on two cores."""
_NO_DIFFERENCE = 0.001
"""Recall difference of one or two sample queries."""


class CompactBuilder:
    """Builds one index in an existing folder, or resumes an unfinished build there. No other process may build in it.

    ``facts`` are of the open source; ``embedder`` is its name and fingerprint, for the manifest.
    """

    def __init__(
        self,
        folder: Path,
        source: VectorSource,
        facts: SourceFacts,
        settings: CompactSettings,
        options: BuildOptions,
        embedder: tuple[str | None, str | None] = (None, None),
    ) -> None:
        self._folder, self._source, self._facts = folder, source, facts
        self._settings, self._options, self._embedder = settings, options, embedder
        self._lists = min(settings.lists or lists_for(facts.count), facts.count)
        self._threads = usable_cores()
        self._building = folder / BUILDING_NAME
        self._kept: dict[str, int] = {}  # rows of each step that are on disk

    async def build(self, queries: Vectors | None) -> CompactManifest:
        """Runs the remaining steps. None samples passages as queries. Raises what the source raises, or OSError; finished work is kept."""
        await in_thread(self._resume)
        if self._kept.get("rows", 0) < self._facts.count:
            await self._copy_rows(self._kept.get("rows", 0))
        return await in_thread(lambda: self._finish(queries))

    def _resume(self) -> None:
        """Reads what is there; raises StoreError if it is a build of another source or with other settings."""
        facts, path, progress = self._facts, self._building / "identity.json", self._building / "progress.json"
        identity = {"format": COMPACT_FORMAT, "source": facts.fingerprint, "rows": facts.count, "lists": self._lists}
        identity |= {"dimension": facts.dimension, "metric": facts.metric, "vectors": "float16"}
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(identity, indent=1).encode())
        try:
            begun = json.loads(path.read_bytes())
            self._kept = json.loads(progress.read_bytes()) if progress.exists() else {}
        except ValueError as error:
            raise StoreError(f"{self._building} is corrupt ({error}): delete {self._folder} and start again") from error
        if differs := [name for name, value in identity.items() if begun.get(name) != value]:
            raise StoreError(
                f"{self._folder} holds an unfinished index with a different source or settings ({', '.join(differs)} "
                "differ): choose another folder, or delete this one"
            )
        for leftover in self._folder.rglob(".*.[0-9]*"):  # temporary files of killed processes, which take gigabytes
            leftover.unlink(missing_ok=True)

    def _keep(self, step: str, rows: int, files: AppendedFiles) -> None:
        files.sync()
        self._kept[step] = rows
        write_atomically(self._building / "progress.json", json.dumps(self._kept).encode())

    async def _copy_rows(self, done: int) -> None:
        facts, synced = self._facts, time.monotonic()
        with (
            closing(RowWriter(self._folder, facts.dimension, done)) as writer,
            build_phase(self._options.emit, "rows", facts.count, "passages") as advance,
        ):
            advance(done)
            try:
                async with aclosing(self._source.blocks(done)) as blocks:
                    async for passages, vectors in blocks:
                        ready = self._checked(len(passages), vectors, done)
                        await in_thread(partial(writer.append, passages, ready))
                        done += len(passages)
                        advance(done)
                        self._options.progress(done, facts.count)
                        if time.monotonic() - synced >= _SYNC_SECONDS:
                            await in_thread(partial(self._keep, "rows", done, writer))
                            synced = time.monotonic()
            finally:
                with anyio.CancelScope(shield=True):
                    await in_thread(partial(self._keep, "rows", done, writer))
        if done != facts.count:
            raise StoreError(
                f"{facts.name} returned {done:,} rows instead of {facts.count:,}: it changed during the build"
            )

    def _checked(self, passages: int, vectors: Vectors, start: int) -> Vectors:
        facts = self._facts
        if vectors.shape != (passages, facts.dimension) or start + passages > facts.count:
            raise StoreError(
                f"{facts.name} returned {passages:,} passages with vectors {vectors.shape} at row {start:,}, instead of {facts.count:,} "
                f"rows of dimension {facts.dimension}: it changed during the build"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            ready = ready_vectors(vectors, facts.metric)
        # Inner-product vectors may have any length, beyond what float16 holds.
        usable = are_usable(vectors) & (np.abs(ready).max(axis=1, initial=0) <= _MOST_FLOAT16)
        if not usable.all():
            row = start + int(np.flatnonzero(~usable)[0])
            raise StoreError(f"{facts.name}: the vector of row {row:,} has non-finite values, or some above 65,504")
        return ready

    def _phase(self, name: str, total: int, unit: str) -> AbstractContextManager[Callable[[int], None]]:
        def emit(event: Event) -> None:
            anyio.from_thread.check_cancelled()
            anyio.from_thread.run_sync(self._options.emit, event)

        return build_phase(emit, name, total, unit)

    def _finish(self, queries: Vectors | None) -> CompactManifest:
        """The steps after copying, in one thread."""
        import faiss

        faiss.omp_set_num_threads(self._threads)
        vectors = VectorFile(self._folder, self._facts.count, self._facts.dimension)
        if not (self._folder / CODES_NAME).exists():
            self._write_codes(vectors)
        return self._seal(self._calibrate(vectors, queries))

    def _write_codes(self, vectors: VectorFile) -> None:
        metric, done, building = self._facts.metric, self._kept.get("codes", 0), self._building
        centres = self._centres(vectors)
        assigner, encoder = ListAssigner(centres, metric, self._threads), Encoder(centres, metric)
        sizes = {building / "codes.bin": done * encoder.code_size, building / "lists.bin": 4 * done}
        with closing(AppendedFiles(sizes)) as files, self._phase("codes", len(vectors), "passages") as advance:
            advance(done)
            for first, slab in prepared_ahead(vectors.slabs(done, size=_CODE_ROWS)):
                lists = assigner.nearest(slab)
                files.write(encoder.encode(slab, lists).tobytes(), lists.astype("<i4").tobytes())
                advance(first + len(slab))
                self._keep("codes", first + len(slab), files)
        codes = np.memmap(building / "codes.bin", np.uint8, "r", shape=(len(vectors), encoder.code_size))
        encoder.write(codes, np.fromfile(building / "lists.bin", "<i4"), self._folder)

    def _centres(self, vectors: VectorFile) -> Vectors:
        path, count, check = self._building / "centres.npz", len(vectors), anyio.from_thread.check_cancelled
        # A missing or damaged file is made again.
        with suppress(OSError, ValueError, KeyError, BadZipFile):
            return np.load(BytesIO(path.read_bytes()))["made"]
        with self._phase("lists", self._lists, "lists") as advance:
            sample = vectors.gather(chosen_rows(count, sample_size(count, self._lists), SEED), check)
            # Shuffled, because neighbouring rows are alike.
            np.random.default_rng(SEED).shuffle(sample)
            # Normalised like the vectors: longer centres (of tighter lists) would draw queries away from wide lists.
            centres = ready_vectors(learn_centres(sample, self._lists, check), self._facts.metric)
            write_arrays(path, made=centres)
            advance(self._lists)
        return centres

    def _calibrate(self, vectors: VectorFile, queries: Vectors | None) -> Calibration:
        metric, count, rows, origin = self._facts.metric, len(vectors), None, "queries"
        if queries is None:
            origin, rows = "passages", chosen_rows(count, SAMPLE_QUERIES, SEED + 1)
            queries = vectors.gather(rows)
        queries = ready_vectors(queries, metric)
        with self._phase("exact", count, "passages") as advance:
            exact = exact_nearest(queries, vectors, metric, RECALL_AT + 1, advance)
        if rows is not None and count > 1:  # each but itself; a single passage has no other to find
            order = np.argsort(exact == rows[:, None], axis=1, kind="stable")
            exact = np.take_along_axis(exact, order, 1)[:, :-1]
        index = CompactIndex(Codes(self._folder, self._threads, metric), vectors, metric)
        with self._phase("calibrate", self._lists, "lists") as advance:
            return calibrate(index, queries, exact[:, :RECALL_AT], self._settings.recall, origin, advance)

    def _seal(self, calibration: Calibration) -> CompactManifest:
        import faiss

        facts, files = self._facts, {}
        with self._phase("checksums", len(FILE_NAMES), "files") as advance:
            for number, name in enumerate(FILE_NAMES, start=1):
                files[name] = record_of(self._folder / name, anyio.from_thread.check_cancelled)
                advance(number)
        manifest = CompactManifest(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            passages=facts.count,
            dimension=facts.dimension,
            metric=facts.metric,
            lists=self._lists,
            source=facts.name,
            source_fingerprint=facts.fingerprint,
            embedder=self._embedder[0],
            embedder_fingerprint=self._embedder[1],
            files=files,
            calibration=calibration,
            versions={"faiss": faiss.__version__, "numpy": np.__version__},
        )
        manifest.save(self._folder)
        shutil.rmtree(self._building, ignore_errors=True)
        return manifest


def chosen_rows(count: int, size: int, seed: int) -> Rows:
    """Up to ``size`` rows drawn at random, ascending."""
    return np.sort(np.random.default_rng(seed).choice(count, min(size, count), replace=False))


def calibrate(
    index: CompactIndex,
    queries: Vectors,
    exact: Rows,
    asked: float,
    origin: str,
    advance: Callable[[int], None] = lambda _: None,
) -> Calibration:
    """Measures each choice for queries ``[n, dimension]``, until more probes would not be chosen, and chooses one for the recall ``asked``.

    ``exact`` are the exact nearest rows, ``[n, results]``, nearest first; ``advance`` is called with the lists probed so far. Re-ranking
    is exact, so recall is that of the candidates, and one search serves all smaller candidate counts.
    """
    count, lists = len(queries), len(index.codes.list_sizes)
    mean_list, curve = index.codes.count / lists, list[CurvePoint]()
    gap = np.sort(np.concatenate([index.codes.distances(part)[1] for part in _batches(queries)]), axis=1)
    for probes in probe_steps(lists):
        most = min(MOST_OF_MEAN * probes, lists)
        probing = Probing(None if probes == lists else margin_of(gap, probes, most), most)
        parts, searching = list[Rows](), 0.0
        for part in _batches(queries):
            advance(probes)
            began = time.perf_counter()
            parts.append(index.candidates(part, CANDIDATES[-1], probing))
            searching += time.perf_counter() - began
            index.rank(part, parts[-1], RECALL_AT)  # untimed: it reads the candidates from disk
        found = np.concatenate(parts)
        for candidates in CANDIDATES:
            began = time.perf_counter()
            for part, rows in zip(_batches(queries), parts, strict=True):
                index.rank(part, np.ascontiguousarray(rows[:, :candidates]), RECALL_AT)
            speed = round(count / max(searching + time.perf_counter() - began, 1e-9), 1)
            share = round(recall(found[:, :candidates], exact), 4)
            curve.append(CurvePoint(probes, most, probing.margin, candidates, share, speed))
        if is_enough(curve[-1], asked, mean_list, count):
            break
    advance(lists)
    chosen = choose(curve, asked, mean_list, count)
    probed = (chosen.probes, chosen.most_probes, chosen.margin)
    return Calibration(count, origin, *probed, chosen.candidates, chosen.recall_at_3, asked, RECALL_AT, tuple(curve))


def _batches(rows: NDArray) -> list[NDArray]:
    return [rows[first : first + BATCH] for first in range(0, len(rows), BATCH)]


def probe_steps(lists: int) -> list[int]:
    """Mean numbers of probes to try: powers of sqrt(2), up to all lists."""
    steps = {min(lists, round(2 ** (half / 2))) for half in range(2 * math.ceil(math.log2(max(lists, 1))) + 1)}
    return sorted({*steps, lists})


def recall(found: Rows, exact: Rows) -> float:
    """The share of the exact rows that are found; both arrays are ``[queries, n]``."""
    return float((exact[:, :, None] == found[:, None, :]).any(axis=2).mean())


def choose(curve: Sequence[CurvePoint], asked: float, mean_list: float, queries: int) -> CurvePoint:
    """The best affordable choice whose recall is a standard error above the target; else the cheapest such one, else the best recall.

    Recall above the target is taken when cheap, since other questions may be harder than the sample. ``mean_list``: codes per list.
    """
    able = [point for point in curve if _surely_reaches(point, asked, queries)]
    affordable = [point for point in able if cost(point, mean_list) <= AFFORDABLE]
    if affordable or not able:
        pool = affordable or curve
        best = max(point.recall_at_3 for point in pool) - _NO_DIFFERENCE
        able = [point for point in pool if point.recall_at_3 >= best]
    return min(able, key=lambda point: (cost(point, mean_list), point.probes))


def is_enough(point: CurvePoint, asked: float, mean_list: float, queries: int) -> bool:
    """Whether to stop trying more probes: the target is reached, and more is not possible or not affordable."""
    is_last = point.recall_at_3 >= 1 - _NO_DIFFERENCE or cost(point, mean_list) >= AFFORDABLE
    return is_last and _surely_reaches(point, asked, queries)


def _surely_reaches(point: CurvePoint, asked: float, queries: int) -> bool:
    share = point.recall_at_3
    return share - math.sqrt(share * (1 - share) / queries) >= asked


def cost(point: CurvePoint, mean_list: float) -> float:
    """Cost per query, in codes compared, so that a choice is the same on every machine: a list costs 450 beside its own, a candidate 60."""
    return point.probes * (mean_list + 450) + point.candidates * 60
