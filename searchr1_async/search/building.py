"""Building an index on purpose: into a folder, or into a Chroma server, with a report of what it came to."""

from __future__ import annotations

import hashlib
from pathlib import Path

import anyio
import anyio.to_thread

from searchr1_async.boundary.paths import absolute_path, cache_folder
from searchr1_async.data.corpus import Corpus, CorpusSource, load_corpus
from searchr1_async.errors import ConfigurationError, StoreError
from searchr1_async.events import Emit, emit_nothing
from searchr1_async.files import only_one
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
    """Embeds a corpus and puts it into an index; goes on with what was begun, and does nothing where all is there.

    ::

        report = await build_index("wiki18.parquet", RemoteChroma(create=True), embedder="gemini-embedding-001")

    The corpus is read in bounded memory, embedded in several requests at once, and put in meanwhile. Every vector is on
    disk as soon as it is answered: a call after a kill embeds nothing twice but the requests that were in the air. What
    the index holds of the corpus already, by the passages' ids, is left as it is.

    Args:
        corpus: ``"atlas"`` (built in), a file of any size, passages, a frame or a list of dicts; see
            :func:`load_corpus`.
        target: a search that is not open (its folder or store, and its embedder); a store, which is opened and closed;
            a folder; or None for the folder in the user's cache that ``Search.local`` looks in.
        embedder: a sentence-transformers model by name or folder, ``"gemini-embedding-001"``, or an :class:`Embedder`.
            None means the search's own, or else ``"all-MiniLM-L6-v2"``.
        pacing: of the requests to the embedder and to the store.
        on_progress: called with passages done and in all.
        emit: told of the phase ``index``, of the estimated cost before it, and of an index that loses passages.

    Raises:
        ConfigurationError: a search that is open, or has another embedder or another corpus than given.
        CorpusError: the corpus cannot be used.
        EmbeddingError: the embedder failed for good; what is done is kept.
        StoreError: the store failed for good, holds something else, or the disk is full; what is done is kept.
    """
    corpus = load_corpus(corpus)
    options = BuildOptions(pacing, on_progress, emit)
    if isinstance(target, Search):
        if embedder is not None:
            raise ConfigurationError("a search has an embedder of its own: give only one of the two")
        if target.is_open:
            raise ConfigurationError("the search is open: build its index before it is used, or after it is closed")
        place, chosen = target.source, target.embedder
        if isinstance(place, LocalIndex) and not await anyio.to_thread.run_sync(_are_equal, place.corpus, corpus):
            raise ConfigurationError(
                f"the search is over {place.corpus.source}, not over {corpus.source}: give that one"
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
    """Into a store that others may use, and that may hold more than this corpus."""
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
    """Where vectors lie that ``target`` does not hold yet. Reads the whole corpus the first time: call it in a worker thread."""
    key = hashlib.sha256("\0".join((target, corpus.fingerprint, embedder.fingerprint)).encode()).hexdigest()
    return cache_folder() / "journals" / key[:24]
