"""Explicit builds with a report: of an index in a folder or a Chroma server, and of a compact index."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import anyio
import anyio.from_thread
import anyio.to_thread
import numpy as np
from numpy.typing import NDArray

from searchr1_async.boundary.paths import absolute_path, folder_bytes, free_bytes, only_one
from searchr1_async.boundary.waits import in_thread
from searchr1_async.data.corpus import CorpusSource, load_corpus
from searchr1_async.data.questions import Questions, load_questions
from searchr1_async.episodes.prompts import clean_query
from searchr1_async.episodes.types import Question
from searchr1_async.errors import ConfigurationError, EmbeddingError, StoreError
from searchr1_async.events import Emit, Notice, emit_nothing
from searchr1_async.search.compact.assembly import CompactBuilder, chosen_rows
from searchr1_async.search.compact.files import (
    BUILDING_NAME,
    FILE_NAMES,
    MANIFEST_NAME,
    CompactManifest,
    CompactSettings,
)
from searchr1_async.search.compact.store import refuse_changed
from searchr1_async.search.dispatch import with_retries
from searchr1_async.search.embedders import DEFAULT_MODEL, Embedder, Vectors, checked_vectors
from searchr1_async.search.gemini import make_embedder
from searchr1_async.search.index import IndexReport, LocalIndex, add_missing, disk_errors
from searchr1_async.search.pacing import PacingSettings
from searchr1_async.search.passage_embedding import PACING, BuildOptions, OnProgress
from searchr1_async.search.stores.sources import EmbeddedCorpus, SourceFacts, VectorSource
from searchr1_async.search.stores.vector_store import (
    DamagedIndexError,
    WritableStore,
    is_writable,
    lasting_name,
    open_embedder,
    open_store,
)

Queries: TypeAlias = Sequence[str] | NDArray[np.floating] | Questions
"""Texts, vectors ``[queries, dimension]``, or questions as for :func:`~searchr1_async.load_questions`."""
PASSAGE_BYTES = 750
"""A JSON line with a passage of 100 words, its title and id."""
MOST_QUERIES = 2_000
"""More are subsampled: at 2,000 the standard error of a recall of 0.95 is 0.005. Bounds calibration memory."""


async def build_index(
    corpus: CorpusSource,
    target: WritableStore | str | Path | None = None,
    *,
    embedder: str | Path | Embedder | None = None,
    pacing: PacingSettings = PACING,
    on_progress: OnProgress | None = None,
    on_event: Emit = emit_nothing,
) -> IndexReport:
    """Embeds a corpus into an index. Continues an interrupted build, and does nothing if the index is complete.

    ::

        report = await build_index("wiki18.parquet", RemoteChroma(create=True), embedder="gemini-embedding-001")

    Reads the corpus in bounded memory, and embeds and stores concurrently. Passages whose ids are already in the index are
    skipped, so a call after a kill repeats only the few thousand that were in flight.

    Args:
        corpus: ``"atlas"`` (built in), a file of any size, passages, a frame or a list of dicts; see :func:`load_corpus`.
        target: a store, which is opened and closed; a folder; or None for the folder in the user's cache that ``Search.local``
            uses. To build the index of a search, call its ``build``.
        embedder: a sentence-transformers model by name or folder, ``"gemini-embedding-001"``, or an :class:`Embedder`.
            None for ``"all-MiniLM-L6-v2"``.
        pacing: of requests to the embedder and the store.
        on_progress: called with passages done and total.
        on_event: called with the phase ``index`` and the cost estimate.

    Raises:
        ConfigurationError: the store is read-only.
        CorpusError: the corpus is unusable.
        EmbeddingError: the embedder failed permanently; finished work is kept.
        StoreError: the store failed permanently, holds something else, or the disk is full; finished work is kept.
    """
    corpus, options = load_corpus(corpus), BuildOptions(pacing, on_progress, on_event)
    chosen = make_embedder(DEFAULT_MODEL if embedder is None else embedder)
    try:
        if target is None or isinstance(target, str | Path):
            folder = None if target is None else absolute_path(target, "target")
            return await LocalIndex(corpus, folder).build(chosen, options)
        store = target
        if not is_writable(store):
            raise ConfigurationError(
                f"{store} is not a store that can be written: build into a folder or a Chroma server"
            )
        try:
            await open_embedder(chosen, pacing)
            await open_store(store, pacing)
            return await add_missing(corpus, chosen, store, options)
        finally:
            with anyio.CancelScope(shield=True):
                await store.aclose()
    finally:
        with anyio.CancelScope(shield=True):
            await chosen.aclose()


@dataclass(frozen=True, slots=True)
class CompactReport:
    """Outcome of :func:`build_compact_index`."""

    folder: Path
    manifest: CompactManifest
    seconds: float = 0.0
    """Of this call; 0 if the index already existed."""

    def __str__(self) -> str:
        manifest, chosen = self.manifest, self.manifest.calibration
        return (
            f"{manifest.passages:,} passages, {manifest.dimension} dimensions in {self.folder}, {manifest.bytes / 1e9:,.2f} GB; "
            f"recall@{chosen.recall_at} {chosen.recall:.1%} on {chosen.queries} {chosen.origin}, probing {chosen.probes} of "
            f"{manifest.lists:,} lists on average with {chosen.candidates} candidates"
        )


async def build_compact_index(
    source: CorpusSource | VectorSource,
    folder: str | Path,
    *,
    embedder: str | Path | Embedder | None = None,
    queries: Queries | None = None,
    settings: CompactSettings | None = None,
    pacing: PacingSettings = PACING,
    on_progress: OnProgress | None = None,
    on_event: Emit = emit_nothing,
) -> CompactReport:
    """Builds a compact index. Continues an interrupted build, and does nothing if the index is complete.

    ::

        report = await sr.search.build_compact_index("wiki18.jsonl", "wiki18.index", embedder="intfloat/e5-base-v2", queries=questions)
        search = await sr.Search.open("wiki18.index")

    Memory is bounded: about 220 bytes per passage at 768 dimensions, and 1.5 GB while training the lists. After a kill, a
    call repeats at most a few minutes, and produces identical files.

    Args:
        source: a corpus as for :func:`~searchr1_async.search.builders.build_index`, which is embedded; or passages with their
            vectors: :class:`ChromaServer`, :class:`VectorFiles`.
        folder: of the index: new, empty, or of an interrupted build.
        embedder: embeds a corpus (None: ``"all-MiniLM-L6-v2"``); for other sources, the one that made their vectors, which embeds
            ``queries`` and is recorded in the index (None: unknown).
        queries: a few hundred realistic ones, as texts, vectors or questions (or a suite's name or a file), that calibrate
            the number of probed lists. Above :data:`MOST_QUERIES` they are subsampled. None uses passages of the index, which
            are easier to find than answers to real queries.
        settings: target recall and number of lists.
        pacing: of requests to the embedder.
        on_progress: called with passages done and total.
        on_event: called with phases, the disk space needed, and a warning if the target recall is missed.

    Raises:
        ConfigurationError: text queries without an embedder or without searchable text.
        QuestionsError: queries are questions that cannot be read.
        CorpusError: the corpus is unusable.
        EmbeddingError: the embedder failed permanently; finished work is kept.
        StoreError: the source is unreadable, the folder holds something else, or the disk is full; finished work is kept.
    """
    settings, options = settings or CompactSettings(), BuildOptions(pacing, on_progress, on_event)
    place, began = absolute_path(folder, "folder"), time.monotonic()
    asked = await anyio.to_thread.run_sync(_sampled, queries)
    if isinstance(source, VectorSource):
        own, chosen = source, None if embedder is None else make_embedder(embedder)
    else:
        embedder = DEFAULT_MODEL if embedder is None else embedder
        chosen = make_embedder(embedder)
        own = EmbeddedCorpus(await anyio.to_thread.run_sync(load_corpus, source), chosen, options)
    try:
        facts = await own.open()
        with disk_errors(place):
            await anyio.to_thread.run_sync(lambda: place.parent.mkdir(parents=True, exist_ok=True))
            async with only_one(place, f"builds the index in {place}"):
                if (found := await in_thread(lambda: _complete_index(place, facts, on_event))) is not None:
                    return CompactReport(place, found)
                on_event(Notice(await anyio.to_thread.run_sync(_check_room, place, facts)))
                vectors = await _query_vectors(asked, chosen, facts, options)
                names = (lasting_name(embedder) or chosen.name, chosen.fingerprint) if chosen else (None, None)
                manifest = await CompactBuilder(place, own, facts, settings, options, names).build(vectors)
    finally:
        with anyio.CancelScope(shield=True):
            await own.aclose()
            if chosen is not None:
                await chosen.aclose()
    if manifest.calibration.recall < settings.recall:
        options.tell(f"{place} misses the target recall of {settings.recall:.1%} even when probing all lists: lower it")
    return CompactReport(place, manifest, time.monotonic() - began)


def _complete_index(place: Path, facts: SourceFacts, emit: Emit) -> CompactManifest | None:
    """The existing complete index; deletes a damaged one. Raises StoreError if the folder holds something else."""
    building = place / BUILDING_NAME
    if not (place / MANIFEST_NAME).exists():
        if place.is_dir() and any(place.iterdir()) and not building.is_dir():
            raise StoreError(f"{place} holds files that are not a compact index: use an empty or new folder")
        place.mkdir(parents=True, exist_ok=True)
        return None
    found = CompactManifest.load(place)
    if found.source_fingerprint != facts.fingerprint:
        raise StoreError(
            f"{place} holds the compact index of {found.source}, not of {facts.name}: use another folder, or delete this one"
        )
    shutil.rmtree(building, ignore_errors=True)  # left by a process that was killed right after it wrote the manifest
    try:
        refuse_changed(place, found)
    except DamagedIndexError as damaged:
        anyio.from_thread.run_sync(emit, Notice(f"{damaged.fault}: rebuilding the index", is_warning=True))
        building.mkdir()  # marks an unfinished build
        for name in (MANIFEST_NAME, *FILE_NAMES):
            (place / name).unlink(missing_ok=True)
        return None
    return found


def needed_bytes(count: int, dimension: int, passage_bytes: int = PASSAGE_BYTES) -> int:
    """Peak disk usage of a build: float16 vectors, passages and two copies of the codes, of which the index keeps one."""
    return count * (2 * dimension + passage_bytes + 8 + 2 * (dimension // 8 + 20))


def _check_room(place: Path, facts: SourceFacts) -> str:
    """Describes the needed and free disk space. Raises StoreError if there is too little."""
    needed, free = max(0, needed_bytes(facts.count, facts.dimension) - folder_bytes(place)), free_bytes(place)
    words = (
        f"the index of {facts.name} needs about {needed / 1e9:,.1f} GB more in {place}; {free / 1e9:,.1f} GB are free"
    )
    if needed > free:
        raise StoreError(f"{words}: free some space, or use a folder on another disk")
    return words


def _sampled(queries: Any) -> list[str] | NDArray[np.floating] | None:
    """Up to :data:`MOST_QUERIES` of them, as texts or vectors; None if there are none. Reads files. Raises QuestionsError."""
    found = queries
    if not (queries is None or isinstance(queries, np.ndarray)):
        is_plain = isinstance(queries, Sequence) and not isinstance(queries, str)
        if not is_plain or not all(isinstance(each, str | Question) for each in queries):
            queries = load_questions(queries)
        texts = [each.question if isinstance(each, Question) else each for each in queries]
        found = [text for text in map(clean_query, texts) if text is not None]
        if texts and not found:
            raise ConfigurationError("none of the queries is searchable: pass texts with letters or digits")
    if found is None or not len(found):
        return None
    rows = chosen_rows(len(found), MOST_QUERIES, 1)
    return found[rows] if isinstance(found, np.ndarray) else [found[row] for row in rows]


async def _query_vectors(
    queries: list[str] | NDArray[np.floating] | None,
    embedder: Embedder | None,
    facts: SourceFacts,
    options: BuildOptions,
) -> Vectors | None:
    if queries is None:
        return None
    if isinstance(queries, np.ndarray):
        if queries.ndim != 2 or queries.shape[1] != facts.dimension or not np.isfinite(queries).all():
            raise ConfigurationError(f"queries are {queries.shape}: pass finite vectors [queries, {facts.dimension}]")
        return np.ascontiguousarray(queries, np.float32)
    if embedder is None:
        raise ConfigurationError(f"queries are texts: pass the embedder that made the vectors of {facts.name}")
    await open_embedder(embedder, options.pacing)
    if embedder.dimension != facts.dimension:
        raise StoreError(
            f"{facts.name} holds vectors of dimension {facts.dimension}, but {embedder.name} produces dimension "
            f"{embedder.dimension}: pass the embedder that made them"
        )

    async def embed(part: Sequence[str]) -> Vectors:
        return checked_vectors(await embedder.embed_queries(part), len(part), embedder)

    ask = partial(with_retries, name=embedder.name, pacing=options.pacing, failure=EmbeddingError, tell=options.tell)
    parts = [queries[first : first + embedder.max_texts] for first in range(0, len(queries), embedder.max_texts)]
    return np.concatenate([await ask(partial(embed, part)) for part in parts])
