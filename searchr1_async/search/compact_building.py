"""Making a compact index on purpose: from a corpus, a Chroma collection or vectors, into a folder, with a report."""

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

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.data.corpus import CorpusSource, load_corpus
from searchr1_async.data.download import free_bytes
from searchr1_async.data.questions import Questions, load_questions
from searchr1_async.episodes.types import Question
from searchr1_async.errors import ConfigurationError, EmbeddingError, StoreError
from searchr1_async.events import Emit, Notice, emit_nothing
from searchr1_async.files import folder_bytes, only_one, write_arrays
from searchr1_async.search.building import journal_folder
from searchr1_async.search.dispatch import Capacity, Dispatcher
from searchr1_async.search.embedders.base import Embedder, Vectors
from searchr1_async.search.embedders.checked import checked_vectors
from searchr1_async.search.embedders.choice import make_embedder
from searchr1_async.search.embedders.sentence_transformer import DEFAULT_MODEL
from searchr1_async.search.opening import open_embedder
from searchr1_async.search.pacing import PacingSettings
from searchr1_async.search.passage_embedding import PACING, BuildOptions, OnProgress
from searchr1_async.search.queries import clean_query
from searchr1_async.search.sources.base import SourceFacts, VectorSource
from searchr1_async.search.sources.embedded import EmbeddedCorpus
from searchr1_async.search.sources.named import lasting_name
from searchr1_async.search.stores.compact.build import CompactBuilder
from searchr1_async.search.stores.compact.layout import BUILDING_NAME, MANIFEST_NAME, CompactManifest, CompactSettings
from searchr1_async.search.stores.compact.store import refuse_changed
from searchr1_async.search.stores.compact.vector_file import row_bytes
from searchr1_async.search.stores.proof import DamagedIndexError
from searchr1_async.threads import in_thread

Queries: TypeAlias = Sequence[str] | NDArray[np.floating] | Questions
"""Texts, vectors ``[queries, dimension]``, or whatever :func:`~searchr1_async.load_questions` reads, whose texts are taken."""

PASSAGE_BYTES = 750
"""Of a line of JSON for a passage of 100 words, with the title and the id."""
_SPARE = 1 << 30
QUERIES_A_REQUEST = 100
MOST_QUERIES = 2_000
"""Of those that are given: the standard error of a recall of 0.95 is half a hundredth then. The distances of 10,000 from the centres of
21 million passages would take 3 GB."""
_QUERIES_NAME = "queries.npz"
"""In the folder of what is begun: vectors of queries that were texts."""


@dataclass(frozen=True, slots=True)
class CompactReport:
    """What making a compact index came to."""

    folder: Path
    manifest: CompactManifest
    seconds: float
    """Of this call; 0 where the index was there."""

    @property
    def bytes(self) -> int:
        """On disk."""
        return sum(record.bytes for record in self.manifest.files.values())

    @property
    def warning(self) -> str | None:
        """What is wrong with the index, in words; None where nothing is."""
        chosen = self.manifest.calibration
        if chosen.recall >= chosen.asked:
            return None
        return (
            f"the index finds {chosen.recall:.1%} of the {chosen.recall_at} nearest passages where {chosen.asked:.1%} were asked "
            "for, however many lists are looked through: ask for less"
        )

    def __str__(self) -> str:
        manifest, chosen = self.manifest, self.manifest.calibration
        return (
            f"{manifest.passages:,} passages in {self.folder}, {self.bytes / 1e9:,.2f} GB, made in {self.seconds:,.0f} s; "
            f"{chosen.probes} of {manifest.lists:,} lists on average and {chosen.candidates} candidates find {chosen.recall:.1%} of the "
            f"{chosen.recall_at} nearest for {chosen.queries} {chosen.origin}"
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
    """Makes a compact index; goes on with what was begun, and does nothing where it is whole.

    ::

        report = await sr.build_compact_index("wiki18.jsonl", "wiki18.index", embedder="intfloat/e5-base-v2", queries=questions)
        search = await sr.Search.open("wiki18.index")

    Memory is bounded: some 220 bytes a passage at 768 dimensions, and 1.5 GB while lists are learnt. A call after a kill repeats
    a few minutes at most, embeds nothing twice but what was in the air, and ends with the same files.

    Args:
        source: a corpus as :func:`~searchr1_async.search.building.build_index` takes it, which is embedded; or passages with their
            vectors: :class:`ChromaFolder`, :class:`ChromaServer`, :class:`VectorFiles`.
        folder: of the index: new, empty, or with what was begun.
        embedder: of a corpus; of other sources whatever made their vectors (for ``queries`` that are texts, and for whoever opens
            the index). None means ``"all-MiniLM-L6-v2"`` for a corpus, for other sources the one that they name, if any.
        queries: real ones, some hundreds, as texts, vectors or questions (also a suite's name or a file): how many lists are
            probed is chosen by them. Of more than :data:`MOST_QUERIES` so many are drawn. None takes passages of the index, which
            are easier to find than real queries' answers.
        settings: how it is made, and the recall asked for.
        pacing: of the requests to the embedder.
        on_progress: called with passages done and in all.
        emit: told of the phases, of the room that is needed, and of a recall that is not reached.

    Raises:
        ConfigurationError: queries that are texts without an embedder, or that cannot be cleaned; another embedder than the source's.
        QuestionsError: queries that are questions and cannot be read.
        CorpusError: the corpus cannot be used.
        EmbeddingError: the embedder failed for good; what is done is kept.
        StoreError: the source cannot be read, the folder holds something else, or the disk is full; what is done is kept.
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
                if (found := await in_thread(lambda: _whole(place, facts, settings, emit))) is not None:
                    if differs := differing(found, settings, has_queries=asked is not None):
                        emit(
                            Notice(
                                f"{place} is whole, and was made with {differs}: delete it to make it otherwise",
                                is_warning=True,
                            )
                        )
                    return CompactReport(place, found, 0.0)
                emit(Notice(await anyio.to_thread.run_sync(_check_room, place, facts, settings)))
                if chosen is None and facts.embedder is not None and _are_texts(asked):
                    chosen = make_embedder(facts.embedder)
                facts = _named(facts, embedder, chosen)
                vectors = await _query_vectors(asked, chosen, facts, options, place / BUILDING_NAME / _QUERIES_NAME)
                builder = CompactBuilder(place, own, facts, settings, emit, on_progress)
                manifest = await builder.build(vectors)
        except OSError as error:
            raise StoreError(
                f"the index {place} cannot be written: {error.strerror or error} ({free_bytes(place.parent):,} bytes are free); "
                "what is done is kept: mend it, and run the same command again"
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


def _named(facts: SourceFacts, embedder: str | Path | Embedder | None, chosen: Embedder | None) -> SourceFacts:
    """With what the user says of the embedder where the source does not know it.

    Raises:
        ConfigurationError: the source's vectors are of another one.
    """
    if chosen is None:
        return facts
    if facts.embedder_fingerprint not in (None, chosen.fingerprint):
        raise ConfigurationError(
            f"the vectors of {facts.name} were made with {facts.embedder or 'another embedder'}, not with {chosen.name}: name that one"
        )
    if facts.embedder is not None:
        return facts
    return replace(facts, embedder=lasting_name(embedder) or chosen.name, embedder_fingerprint=chosen.fingerprint)


def differing(found: CompactManifest, settings: CompactSettings, *, has_queries: bool) -> str:
    """What an index was made with where something else is asked for now, in words; empty where nothing differs."""
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


def _whole(place: Path, facts: SourceFacts, settings: CompactSettings, emit: Emit) -> CompactManifest | None:
    """The index that is there already; one whose files are damaged is deleted, and so made again.

    Raises:
        StoreError: it is of something else, or the folder holds other files.
    """
    if (place / MANIFEST_NAME).exists():
        found = CompactManifest.load(place)
        if (found.source_fingerprint, found.vectors) != (facts.fingerprint, settings.vectors):
            raise StoreError(
                f"{place} holds the compact index of {found.source} ({found.vectors}), not of {facts.name} ({settings.vectors}): "
                "give another folder, or delete that one"
            )
        shutil.rmtree(
            place / BUILDING_NAME, ignore_errors=True
        )  # of a session that was killed right after the manifest
        try:
            refuse_changed(place, found)
        except DamagedIndexError as damaged:
            anyio.from_thread.run_sync(emit, Notice(f"{damaged.fault}: the index is made again", is_warning=True))
            (place / BUILDING_NAME).mkdir()  # what marks the folder as one that is begun
            for name in (MANIFEST_NAME, *found.files):
                (place / name).unlink(missing_ok=True)
            return None
        return found
    if place.is_dir() and any(place.iterdir()) and not (place / BUILDING_NAME).is_dir():
        raise StoreError(f"{place} holds files that are no compact index: give an empty or a new folder")
    place.mkdir(parents=True, exist_ok=True)
    return None


def needed_bytes(count: int, dimension: int, settings: CompactSettings, passage_bytes: int = PASSAGE_BYTES) -> int:
    """Of disk while an index is made; afterwards a copy of the codes less."""
    codes = count * (dimension // 8 + 20)
    return count * (row_bytes(dimension, settings.vectors) + passage_bytes + 8) + 2 * codes


def _check_room(place: Path, facts: SourceFacts, settings: CompactSettings) -> str:
    """The room that is needed and there is, in words.

    Raises:
        StoreError: there is too little.
    """
    there = folder_bytes(place)
    needed = max(0, needed_bytes(facts.count, facts.dimension, settings) - there)
    free = free_bytes(place)
    words = f"the index of {facts.name} takes about {needed / 1e9:,.1f} GB more in {place}, where {free / 1e9:,.1f} GB are free"
    if needed + min(_SPARE, needed) > free:
        raise StoreError(f"{words}: make room, choose vectors='int8', or give a folder on another disk")
    return words


def _texts_or_vectors(queries: Queries | None) -> Sequence[str] | NDArray[np.floating] | None:
    """Questions as their texts. Reads files.

    Raises:
        QuestionsError: they cannot be read.
    """
    if queries is None or (isinstance(queries, np.ndarray) and np.issubdtype(queries.dtype, np.number)):
        return queries
    given: Any = queries.tolist() if isinstance(queries, np.ndarray) else queries
    if not isinstance(given, str) and isinstance(given, Sequence):
        texts = [
            each.question if isinstance(each, Question) else each for each in given
        ]  # with or without golden answers
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
            raise ConfigurationError(f"queries are {queries.shape}: give finite vectors [queries, {facts.dimension}]")
        return np.ascontiguousarray(queries[_drawn(len(queries))], np.float32)
    if embedder is None:
        raise ConfigurationError(f"queries are texts: name the embedder that made the vectors of {facts.name}")
    texts = [text for text in (clean_query(query) for query in queries) if text is not None]
    if not texts:
        raise ConfigurationError("none of the queries can be searched for: give texts with letters or digits")
    texts = [texts[place] for place in _drawn(len(texts))]
    identity = hashlib.blake2b("\0".join([embedder.fingerprint, *texts]).encode(), digest_size=16).hexdigest()
    if (found := await in_thread(lambda: _kept_vectors(kept, identity))) is not None:
        return found
    await open_embedder(embedder, options.pacing)
    if embedder.dimension != facts.dimension:
        raise StoreError(
            f"{facts.name} holds vectors of {facts.dimension} numbers, {embedder.name} makes them of {embedder.dimension}: name "
            "the embedder that made them"
        )
    vectors = await _embedded(embedder, texts, options)

    def keep() -> None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_arrays(kept, identity=np.array(identity), vectors=vectors)

    await in_thread(keep)
    return vectors


def _drawn(count: int) -> NDArray[np.int64]:
    """Places of the queries that are taken, in their order: all, or as many as are enough, the same at each call."""
    if count <= MOST_QUERIES:
        return np.arange(count)
    return np.sort(np.random.default_rng(1).choice(count, MOST_QUERIES, replace=False))


def _kept_vectors(path: Path, identity: str) -> Vectors | None:
    """Of the same texts and embedder, as an earlier call kept them."""
    if not path.exists():
        return None
    with np.load(path) as kept:
        return kept["vectors"] if str(kept["identity"]) == identity else None


async def _embedded(embedder: Embedder, texts: Sequence[str], options: BuildOptions) -> Vectors:
    async def embed(part: Sequence[str]) -> Sequence[Vectors]:
        return [row.copy() for row in checked_vectors(await embedder.embed_queries(part), len(part), embedder)]

    capacity = Capacity(min(QUERIES_A_REQUEST, embedder.max_texts), embedder.max_requests, embedder.max_tokens)
    embedding: Dispatcher[int, str, Vectors] = Dispatcher(
        embed, name=embedder.name, capacity=lambda: capacity, pacing=options.pacing, failure=EmbeddingError
    )
    embedding.waits.tell = options.tell
    found = await embedding.fetch(dict(enumerate(texts)))
    return np.stack([found[number] for number in range(len(texts))])
