"""Builds a compact index from a corpus, a Chroma collection or vectors.

Explicit index builds, into a folder or a Chroma server, with a report.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import anyio
import anyio.from_thread
import anyio.to_thread
import numpy as np
from numpy.typing import NDArray

from searchr1_async.boundary.paths import absolute_path, cache_folder, folder_bytes, only_one, write_arrays
from searchr1_async.boundary.waits import in_thread
from searchr1_async.data.corpus import Corpus, CorpusSource, load_corpus
from searchr1_async.data.hub import free_bytes
from searchr1_async.data.questions import Questions, load_questions
from searchr1_async.episodes.prompts import clean_query
from searchr1_async.episodes.types import Question
from searchr1_async.errors import ConfigurationError, EmbeddingError, StoreError
from searchr1_async.events import Emit, Notice, emit_nothing
from searchr1_async.search.compact.assembly import CompactBuilder
from searchr1_async.search.compact.files import (
    BUILDING_NAME,
    MANIFEST_NAME,
    CompactManifest,
    CompactSettings,
    row_bytes,
)
from searchr1_async.search.compact.store import refuse_changed
from searchr1_async.search.dispatch import Capacity, Dispatcher
from searchr1_async.search.embedders import DEFAULT_MODEL, Embedder, Vectors, checked_vectors
from searchr1_async.search.gemini import make_embedder
from searchr1_async.search.index import IndexBuilder, IndexReport, LocalIndex
from searchr1_async.search.pacing import PacingSettings
from searchr1_async.search.passage_embedding import PACING, BuildOptions, Journal, OnProgress
from searchr1_async.search.search import Search
from searchr1_async.search.stores.sources import EmbeddedCorpus, SourceFacts, VectorSource, lasting_name
from searchr1_async.search.stores.vector_store import (
    DamagedIndexError,
    WritableStore,
    is_writable,
    open_embedder,
    open_store,
)


async def build_index(
    corpus: CorpusSource,
    target: Search | WritableStore | str | Path | None = None,
    *,
    embedder: str | Path | Embedder | None = None,
    pacing: PacingSettings = PACING,
    on_progress: OnProgress | None = None,
    emit: Emit = emit_nothing,
) -> IndexReport:
    """Embeds a corpus into an index. Continues an interrupted build, and does nothing if the index is complete.

    ::

        report = await build_index("wiki18.parquet", RemoteChroma(create=True), embedder="gemini-embedding-001")

    Reads the corpus in bounded memory, and embeds and stores concurrently. Vectors are on disk as soon as they are answered,
    so a call after a kill repeats only requests in flight. Passages whose ids are already in the index are skipped.

    Args:
        corpus: ``"atlas"`` (built in), a file of any size, passages, a frame or a list of dicts; see :func:`load_corpus`.
        target: a search that is not open (its folder or store, and its embedder); a store, which is opened and closed;
            a folder; or None for the folder in the user's cache that ``Search.local`` uses.
        embedder: a sentence-transformers model by name or folder, ``"gemini-embedding-001"``, or an :class:`Embedder`.
            None for the search's embedder, or else ``"all-MiniLM-L6-v2"``.
        pacing: of requests to the embedder and the store.
        on_progress: called with passages done and total.
        emit: receives the phase ``index``, the cost estimate, and a warning if the index loses passages.

    Raises:
        ConfigurationError: the search is open, or has another embedder or corpus.
        CorpusError: the corpus is unusable.
        EmbeddingError: the embedder failed permanently; finished work is kept.
        StoreError: the store failed permanently, holds something else, or the disk is full; finished work is kept.
    """
    corpus = load_corpus(corpus)
    options = BuildOptions(pacing, on_progress, emit)
    if isinstance(target, Search):
        if embedder is not None:
            raise ConfigurationError("a search already has an embedder: pass only one of the two")
        if target.is_open:
            raise ConfigurationError("the search is open: build its index before opening or after closing it")
        place, chosen = target.source, target.embedder
        if isinstance(place, LocalIndex) and not await anyio.to_thread.run_sync(_are_equal, place.corpus, corpus):
            raise ConfigurationError(
                f"the search is over {place.corpus.source}, not over {corpus.source}: pass the search's corpus"
            )
    else:
        chosen = make_embedder(DEFAULT_MODEL if embedder is None else embedder)
        place = LocalIndex(corpus, _folder(target)) if target is None or isinstance(target, str | Path) else target
    try:
        if isinstance(place, LocalIndex):
            return await place.build(chosen, options)
        if not is_writable(place):
            raise ConfigurationError(f"{place.name} is read-only: build into a folder or a Chroma collection")
        return await _build_into(place, corpus, chosen, options)
    finally:
        with anyio.CancelScope(shield=True):
            await chosen.aclose()


async def _build_into(store: WritableStore, corpus: Corpus, embedder: Embedder, options: BuildOptions) -> IndexReport:
    """Builds into a store that may be shared and hold more than this corpus."""
    folder = await anyio.to_thread.run_sync(journal_folder, store.name, corpus, embedder)
    try:
        await anyio.to_thread.run_sync(lambda: folder.parent.mkdir(parents=True, exist_ok=True))
        async with only_one(folder, f"builds {store.name}"):
            await open_embedder(embedder, options.pacing)
            await open_store(store, options.pacing)
            journal = Journal(folder, embedder.fingerprint, embedder.dimension)
            return await IndexBuilder(corpus, embedder, store, journal, options).build()
    except OSError as error:
        raise StoreError(f"the journal folder {folder} cannot be written: {error}") from error
    finally:
        with anyio.CancelScope(shield=True):
            await store.aclose()


def _are_equal(one: Corpus, other: Corpus) -> bool:
    return one is other or one.fingerprint == other.fingerprint


def _folder(target: str | Path | None) -> Path | None:
    return None if target is None else absolute_path(target, "target")


def journal_folder(target: str, corpus: Corpus, embedder: Embedder) -> Path:
    """Journal of vectors not yet in ``target``. Reads the whole corpus the first time: call it in a worker thread."""
    key = hashlib.sha256("\0".join((target, corpus.fingerprint, embedder.fingerprint)).encode()).hexdigest()
    return cache_folder() / "journals" / key[:24]


Queries: TypeAlias = Sequence[str] | NDArray[np.floating] | Questions
"""Texts, vectors ``[queries, dimension]``, or questions as for :func:`~searchr1_async.load_questions`."""

PASSAGE_BYTES = 750
"""A JSON line with a passage of 100 words, its title and id."""
_SPARE = 1 << 30
QUERIES_PER_REQUEST = 100
MOST_QUERIES = 2_000
"""More are subsampled: at 2,000 the standard error of a recall of 0.95 is 0.005. Bounds calibration memory."""
_QUERIES_NAME = "queries.npz"
"""Embedded queries, kept in the build folder."""


@dataclass(frozen=True, slots=True)
class CompactReport:
    """Outcome of :func:`build_compact_index`."""

    folder: Path
    manifest: CompactManifest
    seconds: float
    """Of this call; 0 if the index already existed."""

    @property
    def bytes(self) -> int:
        """On disk."""
        return sum(record.bytes for record in self.manifest.files.values())

    @property
    def warning(self) -> str | None:
        """What is wrong with the index, or None."""
        chosen = self.manifest.calibration
        if chosen.recall >= chosen.asked:
            return None
        return (
            f"the index finds {chosen.recall:.1%} of the {chosen.recall_at} nearest passages even when probing all lists, below "
            f"the target of {chosen.asked:.1%}: lower the target recall"
        )

    def __str__(self) -> str:
        manifest, chosen = self.manifest, self.manifest.calibration
        return (
            f"{manifest.passages:,} passages in {self.folder}, {self.bytes / 1e9:,.2f} GB, built in {self.seconds:,.0f} s; "
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
    emit: Emit = emit_nothing,
) -> CompactReport:
    """Builds a compact index. Continues an interrupted build, and does nothing if the index is complete.

    ::

        report = await sr.search.build_compact_index("wiki18.jsonl", "wiki18.index", embedder="intfloat/e5-base-v2", queries=questions)
        search = await sr.Search.open("wiki18.index")

    Memory is bounded: about 220 bytes per passage at 768 dimensions, and 1.5 GB while training the lists. After a kill, a
    call repeats at most a few minutes, embeds only what was in flight again, and produces identical files.

    Args:
        source: a corpus as for :func:`~searchr1_async.search.builders.build_index`, which is embedded; or passages with their
            vectors: :class:`ChromaFolder`, :class:`ChromaServer`, :class:`VectorFiles`.
        folder: of the index: new, empty, or of an interrupted build.
        embedder: embeds a corpus; for other sources, the one that made their vectors (used for ``queries`` given as texts,
            and to open the index). None means ``"all-MiniLM-L6-v2"`` for a corpus, and for other sources the one they name.
        queries: a few hundred realistic ones, as texts, vectors or questions (or a suite's name or a file), that calibrate
            the number of probed lists. Above :data:`MOST_QUERIES` they are subsampled. None uses passages of the index, which
            are easier to find than answers to real queries.
        settings: index parameters and target recall.
        pacing: of requests to the embedder.
        on_progress: called with passages done and total.
        emit: receives phases, the disk space needed, and a warning if the target recall is missed.

    Raises:
        ConfigurationError: text queries without an embedder or without searchable text, or not the source's embedder.
        QuestionsError: queries are questions that cannot be read.
        CorpusError: the corpus is unusable.
        EmbeddingError: the embedder failed permanently; finished work is kept.
        StoreError: the source is unreadable, the folder holds something else, or the disk is full; finished work is kept.
    """
    settings = settings or CompactSettings()
    asked = await anyio.to_thread.run_sync(_texts_or_vectors, queries)
    place = absolute_path(folder, "folder")
    options = BuildOptions(pacing, on_progress, emit)
    own, chosen = await _source_of(source, embedder, options)
    began = time.monotonic()
    try:
        facts = await own.open()
        try:
            await anyio.to_thread.run_sync(lambda: place.parent.mkdir(parents=True, exist_ok=True))
            async with only_one(place, f"builds the index in {place}"):
                if (found := await in_thread(lambda: _complete_index(place, facts, settings, emit))) is not None:
                    if differs := differing(found, settings, has_queries=asked is not None):
                        emit(
                            Notice(
                                f"{place} is complete but was built with {differs}: delete it to rebuild it",
                                is_warning=True,
                            )
                        )
                    return CompactReport(place, found, 0.0)
                emit(Notice(await anyio.to_thread.run_sync(_check_room, place, facts, settings)))
                if chosen is None and facts.embedder is not None and _are_texts(asked):
                    chosen = make_embedder(facts.embedder)
                facts = _with_embedder(facts, embedder, chosen)
                vectors = await _query_vectors(asked, chosen, facts, options, place / BUILDING_NAME / _QUERIES_NAME)
                builder = CompactBuilder(place, own, facts, settings, emit, on_progress)
                manifest = await builder.build(vectors)
        except OSError as error:
            raise StoreError(
                f"the index {place} cannot be written: {error.strerror or error} ({free_bytes(place.parent):,} bytes are free); "
                "finished work is kept: fix the cause and run the same command again"
            ) from error
    finally:
        with anyio.CancelScope(shield=True):
            await own.aclose()
            if chosen is not None:
                await chosen.aclose()
    report = CompactReport(place, manifest, time.monotonic() - began)
    if report.warning is not None:
        emit(Notice(report.warning, is_warning=True))
    return report


async def _source_of(
    source: CorpusSource | VectorSource,
    embedder: str | Path | Embedder | None,
    options: BuildOptions,
) -> tuple[VectorSource, Embedder | None]:
    if isinstance(source, VectorSource):
        return source, None if embedder is None else make_embedder(embedder)
    corpus = await anyio.to_thread.run_sync(load_corpus, source)
    chosen = make_embedder(DEFAULT_MODEL if embedder is None else embedder)
    journal = await anyio.to_thread.run_sync(journal_folder, "compact", corpus, chosen)
    return EmbeddedCorpus(corpus, chosen, journal, options), chosen


def _with_embedder(facts: SourceFacts, embedder: str | Path | Embedder | None, chosen: Embedder | None) -> SourceFacts:
    """Adds the user's embedder if the source names none. Raises ConfigurationError if it is not the source's."""
    if chosen is None:
        return facts
    if facts.embedder_fingerprint not in (None, chosen.fingerprint):
        raise ConfigurationError(
            f"the vectors of {facts.name} were made with {facts.embedder or 'another embedder'}, not with {chosen.name}: pass that one"
        )
    if facts.embedder is not None:
        return facts
    return replace(facts, embedder=lasting_name(embedder) or chosen.name, embedder_fingerprint=chosen.fingerprint)


def differing(found: CompactManifest, settings: CompactSettings, *, has_queries: bool) -> str:
    """How an index differs from the requested settings, for messages; empty if it does not."""
    chosen = found.calibration
    kept = {
        "vectors": (found.vectors, settings.vectors),
        "recall": (chosen.asked, settings.recall),
        "recall_at": (chosen.recall_at, settings.recall_at),
        "lists": (found.lists, min(settings.lists or found.lists, found.passages)),
        "seed": (found.seed, settings.seed),
        "a sample of": (chosen.origin, "queries" if has_queries else chosen.origin),
    }
    return ", ".join(f"{name} {own}, not {asked}" for name, (own, asked) in kept.items() if own != asked)


def _complete_index(place: Path, facts: SourceFacts, settings: CompactSettings, emit: Emit) -> CompactManifest | None:
    """The existing complete index; deletes a damaged one. Raises StoreError if the folder holds something else."""
    if (place / MANIFEST_NAME).exists():
        found = CompactManifest.load(place)
        if (found.source_fingerprint, found.vectors) != (facts.fingerprint, settings.vectors):
            raise StoreError(
                f"{place} holds the compact index of {found.source} ({found.vectors}), not of {facts.name} ({settings.vectors}): "
                "use another folder, or delete this one"
            )
        # Left by a process that was killed right after it wrote the manifest.
        shutil.rmtree(place / BUILDING_NAME, ignore_errors=True)
        try:
            refuse_changed(place, found)
        except DamagedIndexError as damaged:
            anyio.from_thread.run_sync(emit, Notice(f"{damaged.fault}: rebuilding the index", is_warning=True))
            (place / BUILDING_NAME).mkdir()  # marks an unfinished build
            for name in (MANIFEST_NAME, *found.files):
                (place / name).unlink(missing_ok=True)
            return None
        return found
    if place.is_dir() and any(place.iterdir()) and not (place / BUILDING_NAME).is_dir():
        raise StoreError(f"{place} holds files that are not a compact index: use an empty or new folder")
    place.mkdir(parents=True, exist_ok=True)
    return None


def needed_bytes(count: int, dimension: int, settings: CompactSettings, passage_bytes: int = PASSAGE_BYTES) -> int:
    """Peak disk usage of a build; the finished index takes one copy of the codes less."""
    codes = count * (dimension // 8 + 20)
    return count * (row_bytes(dimension, settings.vectors) + passage_bytes + 8) + 2 * codes


def _check_room(place: Path, facts: SourceFacts, settings: CompactSettings) -> str:
    """Describes the needed and free disk space. Raises StoreError if there is too little."""
    there = folder_bytes(place)
    needed = max(0, needed_bytes(facts.count, facts.dimension, settings) - there)
    free = free_bytes(place)
    words = (
        f"the index of {facts.name} needs about {needed / 1e9:,.1f} GB more in {place}; {free / 1e9:,.1f} GB are free"
    )
    if needed + min(_SPARE, needed) > free:
        raise StoreError(f"{words}: free some space, choose vectors='int8', or use a folder on another disk")
    return words


def _texts_or_vectors(queries: Queries | None) -> Sequence[str] | NDArray[np.floating] | None:
    """Reduces questions to their texts. Reads files. Raises QuestionsError."""
    if queries is None or (isinstance(queries, np.ndarray) and np.issubdtype(queries.dtype, np.number)):
        return queries
    given: Any = queries.tolist() if isinstance(queries, np.ndarray) else queries
    if not isinstance(given, str) and isinstance(given, Sequence):
        texts = [each.question if isinstance(each, Question) else each for each in given]
        if all(isinstance(text, str) for text in texts):
            return texts
    return [question.question for question in load_questions(given)]


def _are_texts(queries: Sequence[str] | NDArray[np.floating] | None) -> bool:
    return queries is not None and not isinstance(queries, np.ndarray) and len(queries) > 0


async def _query_vectors(
    queries: Sequence[str] | NDArray[np.floating] | None,
    embedder: Embedder | None,
    facts: SourceFacts,
    options: BuildOptions,
    kept: Path,
) -> Vectors | None:
    if queries is None or not len(queries):
        return None
    if isinstance(queries, np.ndarray):
        if queries.ndim != 2 or queries.shape[1] != facts.dimension or not np.isfinite(queries).all():
            raise ConfigurationError(f"queries are {queries.shape}: pass finite vectors [queries, {facts.dimension}]")
        return np.ascontiguousarray(queries[_subsampled(len(queries))], np.float32)
    if embedder is None:
        raise ConfigurationError(f"queries are texts: pass the embedder that made the vectors of {facts.name}")
    texts = [text for text in (clean_query(query) for query in queries) if text is not None]
    if not texts:
        raise ConfigurationError("none of the queries is searchable: pass texts with letters or digits")
    texts = [texts[place] for place in _subsampled(len(texts))]
    identity = hashlib.blake2b("\0".join([embedder.fingerprint, *texts]).encode(), digest_size=16).hexdigest()
    if (found := await in_thread(lambda: _kept_vectors(kept, identity))) is not None:
        return found
    await open_embedder(embedder, options.pacing)
    if embedder.dimension != facts.dimension:
        raise StoreError(
            f"{facts.name} holds vectors of dimension {facts.dimension}, but {embedder.name} produces dimension "
            f"{embedder.dimension}: pass the embedder that made them"
        )
    vectors = await _embedded(embedder, texts, options)

    def keep() -> None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_arrays(kept, identity=np.array(identity), vectors=vectors)

    await in_thread(keep)
    return vectors


def _subsampled(count: int) -> NDArray[np.int64]:
    """Sorted indices of the queries to use; deterministic."""
    if count <= MOST_QUERIES:
        return np.arange(count)
    return np.sort(np.random.default_rng(1).choice(count, MOST_QUERIES, replace=False))


def _kept_vectors(path: Path, identity: str) -> Vectors | None:
    """Vectors kept by an earlier call for the same texts and embedder."""
    if not path.exists():
        return None
    with np.load(path) as kept:
        return kept["vectors"] if str(kept["identity"]) == identity else None


async def _embedded(embedder: Embedder, texts: Sequence[str], options: BuildOptions) -> Vectors:
    async def embed(part: Sequence[str]) -> Sequence[Vectors]:
        return [row.copy() for row in checked_vectors(await embedder.embed_queries(part), len(part), embedder)]

    capacity = Capacity(min(QUERIES_PER_REQUEST, embedder.max_texts), embedder.max_requests, embedder.max_tokens)
    embedding: Dispatcher[int, str, Vectors] = Dispatcher(
        embed, name=embedder.name, capacity=lambda: capacity, pacing=options.pacing, failure=EmbeddingError
    )
    embedding.waits.tell = options.tell
    found = await embedding.fetch(dict(enumerate(texts)))
    return np.stack([found[number] for number in range(len(texts))])
