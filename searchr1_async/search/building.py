"""Explicit index builds, into a folder or a Chroma server, with a report."""

from __future__ import annotations

import hashlib
from pathlib import Path

import anyio
import anyio.to_thread

from searchr1_async.boundary.paths import absolute_path, cache_folder, only_one
from searchr1_async.data.corpus import Corpus, CorpusSource, load_corpus
from searchr1_async.errors import ConfigurationError, StoreError
from searchr1_async.events import Emit, emit_nothing
from searchr1_async.search.embedders.base import Embedder
from searchr1_async.search.embedders.choice import make_embedder
from searchr1_async.search.embedders.sentence_transformer import DEFAULT_MODEL
from searchr1_async.search.index_builder import IndexBuilder
from searchr1_async.search.index_report import IndexReport
from searchr1_async.search.indexing import LocalIndex
from searchr1_async.search.journal import Journal
from searchr1_async.search.opening import open_embedder, open_store
from searchr1_async.search.pacing import PacingSettings
from searchr1_async.search.passage_embedding import PACING, BuildOptions, OnProgress
from searchr1_async.search.search import Search
from searchr1_async.search.stores.base import WritableStore, is_writable


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
