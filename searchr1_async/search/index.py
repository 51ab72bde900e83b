"""A corpus index: built in windows of passages, which are read, embedded and stored concurrently; resumed after a kill.

An index in a folder is never mistaken for complete while it is not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
import numpy as np

from searchr1_async.boundary.paths import free_bytes, only_one
from searchr1_async.data.corpus import Corpus
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import StoreError
from searchr1_async.events import Event, Notice
from searchr1_async.search.dispatch import with_retries
from searchr1_async.search.embedders import Embedder
from searchr1_async.search.passage_embedding import (
    BYTES_PER_TOKEN,
    WINDOW,
    BuildOptions,
    OnProgress,
    PassageEmbedder,
    build_phase,
    estimated_cost,
    in_windows,
    say_cost,
)
from searchr1_async.search.stores.chroma_folder import EmbeddedChroma
from searchr1_async.search.stores.vector_store import (
    DamagedIndexError,
    IndexFolder,
    IndexIdentity,
    Store,
    WritableStore,
    default_index_folder,
    open_embedder,
    open_store,
)

logger = logging.getLogger(__name__)
COLLECTION = "passages"


@dataclass(frozen=True, slots=True)
class IndexReport:
    """Outcome of :func:`~searchr1_async.search.builders.build_index`."""

    store: str
    """Name and place of the index."""
    passages: int
    """In the corpus and the index."""
    embedded: int = 0
    """By this call; the others existed before."""
    seconds: float = 0.0
    tokens: int = 0
    """Embedded by this call, estimated as UTF-8 bytes / 4."""
    cost: float | None = 0.0
    """Estimated US dollars of this call; None if the price is unknown."""

    def __str__(self) -> str:
        price = "at an unknown price" if self.cost is None else f"about ${self.cost:,.2f}"
        return (
            f"{self.passages:,} passages in {self.store}; {self.embedded:,} embedded in {self.seconds:,.1f} s, "
            f"about {self.tokens:,} tokens, {price}"
        )


async def add_missing(corpus: Corpus, embedder: Embedder, store: WritableStore, options: BuildOptions) -> IndexReport:
    """Embeds the passages of a corpus whose ids an open store does not hold yet, and adds them.

    Several windows are in progress at once: while some are embedded, another is stored. A kill repeats these.

    Raises:
        CorpusError: the corpus cannot be read.
        EmbeddingError: the embedder failed permanently; finished work is kept.
        StoreError: the store failed permanently or does not match the embedder.
    """
    began, total = time.monotonic(), await anyio.to_thread.run_sync(len, corpus)
    if store.dimension not in (None, embedder.dimension):
        raise StoreError(
            f"{store.name} holds vectors of dimension {store.dimension}, but {embedder.name} produces dimension "
            f"{embedder.dimension}: build into another collection"
        )
    ask = partial(with_retries, name=store.name, pacing=options.pacing, failure=StoreError, tell=options.tell)
    embedding = PassageEmbedder(corpus.source, embedder, options)
    before = await ask(store.count)

    async def carry(number: int, passages: list[Passage]) -> int:
        """Embeds and stores what is missing of a window; returns how much that was."""
        if before:
            absent = await ask(partial(store.missing, [passage.id for passage in passages]))
            passages = [passage for passage in passages if passage.id in absent]
        if passages:
            await ask(partial(store.add, passages, np.stack(await embedding.embed(number * WINDOW, passages))))
        return len(passages)

    done = min(before, total)
    await say_cost(corpus, total, embedder, done, options.emit)
    with build_phase(options.emit, "index", total, "passages") as advance:
        advance(done)
        options.progress(done, total)
        async with aclosing(in_windows(corpus, 0, embedding.windows_at_once, carry, in_order=False)) as windows:
            async for added in windows:
                done = min(done + added, total)
                advance(done)
                options.progress(done, total)
    if (count := await ask(store.count)) < total:
        raise StoreError(f"{store.name} holds {count} passages, expected {total}: delete it and build it again")
    tokens = embedding.bytes // BYTES_PER_TOKEN
    cost = estimated_cost(embedder, tokens)
    return IndexReport(store.name, total, embedding.embedded, time.monotonic() - began, tokens, cost)


class LocalIndex:
    """A corpus and the folder of its index; None for one in the user's cache, named by content of corpus and embedder."""

    def __init__(self, corpus: Corpus, path: Path | None = None) -> None:
        self.corpus = corpus
        self._path = path

    def place(self, embedder: Embedder) -> tuple[IndexFolder, IndexIdentity]:
        """The folder and its identity. Reads the whole corpus the first time."""
        corpus = self.corpus
        identity = IndexIdentity(corpus.fingerprint, embedder.fingerprint, corpus.source, embedder.name, len(corpus))
        return IndexFolder(self._path or default_index_folder(corpus, embedder)), identity

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
        return (await self._open(embedder, BuildOptions(on_progress=on_progress, emit=log_notices)))[0]

    async def build(self, embedder: Embedder, options: BuildOptions) -> IndexReport:
        """Builds what is missing, and rebuilds a damaged index. Raises as :meth:`open_store`, but no DamagedIndexError."""
        try:
            store, report = await self._open(embedder, options)
        except DamagedIndexError as damaged:
            options.tell(f"{damaged.fault}: rebuilding it")
            folder, identity = await anyio.to_thread.run_sync(self.place, embedder)
            with disk_errors(folder.path):
                async with only_one(folder.path, f"builds the index in {folder.path}"):
                    folder.begin(identity)
                    await anyio.to_thread.run_sync(folder.clear)
            store, report = await self._open(embedder, options)
        with anyio.CancelScope(shield=True):
            await store.aclose()
        return report

    async def _open(self, embedder: Embedder, options: BuildOptions) -> tuple[Store, IndexReport]:
        """The open store, and what was built."""
        folder, identity = await anyio.to_thread.run_sync(self.place, embedder)
        folder.refuse_others(identity)
        store = EmbeddedChroma(folder.path, COLLECTION)

        async def is_whole() -> bool:
            if folder.whole is None:
                return False
            await open_store(store, options.pacing)
            return await store.count() == identity.passages

        try:
            with disk_errors(folder.path):
                # First without the lock: the folder may be read-only.
                if await is_whole():
                    return store, IndexReport(store.name, identity.passages)
                folder.path.parent.mkdir(parents=True, exist_ok=True)
                async with only_one(folder.path, f"builds the index in {folder.path}"):
                    if await is_whole():
                        return store, IndexReport(store.name, identity.passages)
                    if folder.whole is not None:
                        options.tell(f"{store.name} is not complete: rebuilding what is missing")
                    folder.begin(identity)
                    await open_embedder(embedder, options.pacing)
                    await open_store(store, options.pacing)
                    report = await add_missing(self.corpus, embedder, store, options)
                    await store.record()
                    folder.finish(identity)
                    return store, report
        except BaseException:
            with anyio.CancelScope(shield=True):
                await store.aclose()
            raise


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns an OSError into a StoreError that says what to do."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"the index {folder} cannot be written: {error.strerror or error} ({free_bytes(folder.parent):,} bytes are free); "
            "finished work is kept: fix the cause and run the same command again"
        ) from error


def log_notices(event: Event) -> None:
    """Default ``emit``: logs notices."""
    if isinstance(event, Notice):
        logger.log(logging.WARNING if event.is_warning else logging.INFO, "%s", event.text)
