"""A corpus index in a folder: embedded once, and never mistaken for complete while it is not."""

from __future__ import annotations

import logging
from pathlib import Path

import anyio
import anyio.to_thread

from searchr1_async.boundary.paths import only_one
from searchr1_async.data.corpus import Corpus
from searchr1_async.errors import StoreError
from searchr1_async.events import Event, Notice
from searchr1_async.search.embedders.base import Embedder
from searchr1_async.search.index_builder import IndexBuilder
from searchr1_async.search.index_folder import IndexFolder, IndexIdentity, default_index_folder
from searchr1_async.search.index_report import IndexReport
from searchr1_async.search.journal import Journal
from searchr1_async.search.opening import open_embedder, open_store
from searchr1_async.search.passage_embedding import BuildOptions, OnProgress
from searchr1_async.search.prices import price_of
from searchr1_async.search.stores.base import Store
from searchr1_async.search.stores.chroma import EmbeddedChroma
from searchr1_async.search.stores.proof import DamagedIndexError

logger = logging.getLogger(__name__)

COLLECTION = "passages"


class LocalIndex:
    """A corpus and the folder of its index; None for one in the user's cache, named by content of corpus and embedder."""

    def __init__(self, corpus: Corpus, path: Path | None = None) -> None:
        self.corpus = corpus
        self._path = path

    def folder(self, embedder: Embedder) -> IndexFolder:
        """Reads the whole corpus the first time: call it in a worker thread."""
        return IndexFolder(self._path or default_index_folder(self.corpus, embedder))

    def identity(self, embedder: Embedder) -> IndexIdentity:
        """Reads the whole corpus the first time: call it in a worker thread."""
        corpus = self.corpus
        return IndexIdentity(corpus.fingerprint, embedder.fingerprint, corpus.source, embedder.name, len(corpus))

    async def open_store(self, embedder: Embedder, on_progress: OnProgress | None = None) -> Store:
        """Opens the store with the complete index, building it or continuing a build first.

        If another process is building it, waits until that is done. ``on_progress`` is called from the event loop, only during
        a build, first with what already exists.

        Raises:
            CorpusError: the corpus is unusable.
            DamagedIndexError: index files changed; the message names the call that rebuilds it.
            StoreError: the folder holds something else or is not writable.
            EmbeddingError: the embedder failed; finished work is kept.
        """
        store, _ = await self._open(
            embedder, BuildOptions(on_progress=on_progress, emit=log_notices), rebuild_damaged=False
        )
        return store

    async def build(self, embedder: Embedder, options: BuildOptions) -> IndexReport:
        """Builds what is missing, and rebuilds a damaged index.

        Raises:
            CorpusError: the corpus is unusable.
            StoreError: the folder holds something else or is not writable.
            EmbeddingError: the embedder failed; finished work is kept.
        """
        store, report = await self._open(embedder, options, rebuild_damaged=True)
        with anyio.CancelScope(shield=True):
            await store.aclose()
        if report is not None:
            return report
        passages = await anyio.to_thread.run_sync(len, self.corpus)
        return IndexReport(store.name, passages, 0, 0.0, 0, price_of(embedder), None, 0)

    async def _open(
        self, embedder: Embedder, options: BuildOptions, *, rebuild_damaged: bool
    ) -> tuple[Store, IndexReport | None]:
        """The open store, and a report if something was built. ``rebuild_damaged`` rebuilds a damaged index."""
        identity = await anyio.to_thread.run_sync(self.identity, embedder)
        folder = await anyio.to_thread.run_sync(self.folder, embedder)
        folder.refuse_others(identity)
        store = EmbeddedChroma(folder.path, COLLECTION)
        try:
            if folder.whole is not None:
                try:
                    await open_store(store, options.pacing)
                    count = await store.count()
                except DamagedIndexError:
                    if not rebuild_damaged:
                        raise
                else:
                    if count == identity.passages:
                        return store, None
                    lost = f"{store.name} holds {count} of {identity.passages} passages: rebuilding it"
                    options.emit(Notice(lost, is_warning=True))
                    folder.forget()
            return store, await self._ensure(
                folder, identity, embedder, store, options, rebuild_damaged=rebuild_damaged
            )
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await store.aclose()
            if isinstance(error, OSError):
                raise StoreError(f"the index folder {folder.path} cannot be written: {error}") from error
            raise

    async def _ensure(
        self,
        folder: IndexFolder,
        identity: IndexIdentity,
        embedder: Embedder,
        store: EmbeddedChroma,
        options: BuildOptions,
        *,
        rebuild_damaged: bool,
    ) -> IndexReport | None:
        folder.path.parent.mkdir(parents=True, exist_ok=True)
        async with only_one(folder.path, f"builds the index in {folder.path}"):
            if folder.whole is None:
                folder.begin(identity)
                await open_embedder(embedder, options.pacing)
            try:
                await open_store(store, options.pacing)
            except DamagedIndexError as damaged:
                if not rebuild_damaged:
                    raise
                options.emit(Notice(f"{damaged.fault}: rebuilding it", is_warning=True))
                folder.begin(identity)
                await open_embedder(embedder, options.pacing)
                await anyio.to_thread.run_sync(folder.clear)
                await open_store(store, options.pacing)
            if folder.whole is not None:
                return None
            journal = Journal(folder.journal, embedder.fingerprint, embedder.dimension)
            report = await IndexBuilder(self.corpus, embedder, store, journal, options).build()
            if (count := await store.count()) != identity.passages:
                raise StoreError(
                    f"{store.name} holds {count} passages, expected {identity.passages}: delete it and build it again"
                )
            await store.record()
            folder.finish(identity)
            return report


def log_notices(event: Event) -> None:
    """Default ``emit``: logs notices."""
    if isinstance(event, Notice):
        logger.log(logging.WARNING if event.is_warning else logging.INFO, "%s", event.text)
