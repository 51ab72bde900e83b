"""A corpus index: built in windows of passages, which are read, embedded and stored concurrently; resumed after a kill.

An index in a folder is never mistaken for complete while it is not.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.to_thread
import numpy as np

from searchr1_async.boundary.paths import only_one
from searchr1_async.boundary.waits import in_thread
from searchr1_async.data.corpus import Corpus
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import StoreError
from searchr1_async.events import Event, Notice, PhaseAdvanced, PhaseEnded, PhaseStarted
from searchr1_async.search.dispatch import Dispatcher, with_retries
from searchr1_async.search.embedders import Embedder, Vectors
from searchr1_async.search.passage_embedding import (
    BYTES_PER_TOKEN,
    WINDOW,
    BuildOptions,
    Journal,
    OnProgress,
    PassageEmbedder,
    Price,
    estimated_cost,
    next_window,
    price_of,
    say_cost,
)
from searchr1_async.search.retries import Capacity
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

RECALL_WITHIN = 10
"""A passage is found if it is among so many nearest neighbours of its own vector."""
RECALL_BOUND = 0.95
"""Below this sample recall the store's graph loses passages, and a warning is emitted."""

Result = TypeVar("Result")
QUERIES_PER_REQUEST = 50
SAMPLE = 200
logger = logging.getLogger(__name__)
COLLECTION = "passages"


@dataclass(frozen=True, slots=True)
class IndexReport:
    """Outcome of :func:`~searchr1_async.search.builders.build_index`."""

    store: str
    """Name and place of the index."""
    passages: int
    """In the corpus and the index."""
    embedded: int
    """By this call; the others existed before, or were in the journal of an interrupted build."""
    seconds: float
    tokens: int
    """Embedded by this call, estimated as UTF-8 bytes / 4."""
    price: Price | None
    """None if unknown."""
    recall: float | None
    """Share of the sample that is among the first 10 results for its own vector; None if nothing was added."""
    sample: int
    """Passages added by this call and looked up, at most 200."""

    @property
    def cost(self) -> float | None:
        """Estimated US dollars; None if the price is unknown."""
        return None if self.price is None else self.price.cost(self.tokens)

    @property
    def warning(self) -> str | None:
        """What is wrong with the index, or None."""
        if self.recall is None or self.recall >= RECALL_BOUND:
            return None
        return (
            f"only {self.recall:.1%} of {self.sample} passages of {self.store} are among the first {RECALL_WITHIN} results for "
            f"their own vector (expected at least {RECALL_BOUND:.0%}): the corpus has many duplicates, or the collection's "
            "graph is too sparse (raise ef_search, or rebuild it with more max_neighbors)"
        )

    def __str__(self) -> str:
        parts = [f"{self.passages:,} passages in {self.store}", f"{self.embedded:,} embedded in {self.seconds:,.1f} s"]
        if self.embedded:
            parts.append(estimated_cost(self.tokens, self.price))
        if self.recall is not None:
            parts.append(
                f"{self.recall:.1%} of {self.sample} passages are among the first {RECALL_WITHIN} results for their own vector"
            )
        return "; ".join(parts)


class IndexBuilder:
    """Builds one index, from a corpus, an open embedder and an open store; skips passages whose ids the store already holds.

    Several windows are in progress at once: while some are embedded, another is stored. Vectors go to the journal first, so
    a kill repeats only requests in flight.
    """

    def __init__(
        self, corpus: Corpus, embedder: Embedder, store: WritableStore, journal: Journal, options: BuildOptions
    ) -> None:
        self._corpus = corpus
        self._embedder = embedder
        self._store = store
        self._journal = journal
        self._options = options
        self._embedding = PassageEmbedder(store.name, corpus.source, embedder, journal, options)
        self._adding: Dispatcher[int, tuple[Passage, Vectors], None] = Dispatcher(
            self._add, name=store.name, capacity=self._store_capacity, pacing=options.pacing, failure=StoreError
        )
        self._adding.waits.tell = options.tell
        self._sample = _Sample(SAMPLE)
        self._total = self._done = 0
        self._was_empty = True

    async def build(self) -> IndexReport:
        """Adds the missing passages, then checks recall on a sample.

        Raises:
            CorpusError: the corpus cannot be read.
            EmbeddingError: the embedder failed permanently; finished work is kept.
            StoreError: the store failed permanently or does not match the embedder, or the journal cannot be written.
        """
        self._total = await anyio.to_thread.run_sync(len, self._corpus)
        self._refuse_other_dimension()
        count = await self._with_retries(self._store.count)
        self._was_empty = count == 0
        self._done = min(count, self._total)
        await say_cost(self._corpus, self._total, self._embedder, self._done, self._options.emit)
        self._options.emit(PhaseStarted("index", self._total, "passages"))
        began = time.monotonic()
        try:
            self._advance(0)
            await self._embedding.recall()
            await self._carry_all()
            await in_thread(self._journal.clear)
        except OSError as error:
            raise StoreError(
                f"the journal of {self._store.name} cannot be written: {error.strerror or error}"
            ) from error
        finally:
            self._options.emit(PhaseEnded("index", time.monotonic() - began))
        return await self._verified(price_of(self._embedder), time.monotonic() - began)

    def _refuse_other_dimension(self) -> None:
        if self._store.dimension not in (None, self._embedder.dimension):
            raise StoreError(
                f"{self._store.name} holds vectors of dimension {self._store.dimension}, but {self._embedder.name} "
                f"produces dimension {self._embedder.dimension}: build into another collection"
            )

    # Windows are read in order; a few are in progress at once.

    async def _carry_all(self) -> None:
        windows = enumerate(self._corpus.batches(WINDOW))
        room = anyio.Semaphore(self._embedding.windows_at_once(WINDOW))
        failures: list[Exception] = []

        async def carry(number: int, passages: list[Passage]) -> None:
            try:
                await self._carry(number, passages)
            except Exception as error:
                failures.append(error)
                tasks.cancel_scope.cancel()
            finally:
                room.release()

        async with anyio.create_task_group() as tasks:
            try:
                await room.acquire()
                while window := await anyio.to_thread.run_sync(next_window, windows):
                    tasks.start_soon(carry, *window)
                    await room.acquire()
            except Exception as error:  # e.g. the corpus changed since it was checked
                failures.append(error)
                tasks.cancel_scope.cancel()
        if failures:
            raise failures[0]

    async def _carry(self, number: int, passages: list[Passage]) -> None:
        missing = passages if self._was_empty else await self._missing(passages)
        place = number * WINDOW
        vectors = await self._embedding.embed(number, place, missing)
        items = dict(enumerate(zip(missing, vectors, strict=True), start=place))
        await self._adding.fetch(items)
        await anyio.to_thread.run_sync(self._journal.forget, number)
        for passage, vector in items.values():
            self._sample.offer(passage.id, vector)
        self._advance(len(items))

    async def _missing(self, passages: list[Passage]) -> list[Passage]:
        missing = await self._with_retries(lambda: self._store.missing([passage.id for passage in passages]))
        return [passage for passage in passages if passage.id in missing]

    def _advance(self, count: int) -> None:
        self._done = min(self._done + count, self._total)
        self._options.emit(PhaseAdvanced("index", self._done))
        if self._options.on_progress is not None:
            self._options.on_progress(self._done, self._total)

    # One request to the store, called by the dispatchers.

    async def _add(self, items: Sequence[tuple[Passage, Vectors]]) -> Sequence[None]:
        await self._store.add([passage for passage, _ in items], np.stack([vector for _, vector in items]))
        return [None] * len(items)

    async def _query(self, vectors: Sequence[Vectors]) -> Sequence[frozenset[str]]:
        found = await self._store.query(np.stack(vectors), RECALL_WITHIN)
        return [frozenset(passage.id for passage in passages) for passages in found]

    def _store_capacity(self) -> Capacity:
        return Capacity(WINDOW, self._store.max_requests)

    async def _with_retries(self, request: Callable[[], Awaitable[Result]]) -> Result:
        """One request to the store, with retries."""
        options, name = self._options, self._store.name
        return await with_retries(request, name=name, pacing=options.pacing, failure=StoreError, tell=options.tell)

    # Verification

    async def _verified(self, price: Price | None, seconds: float) -> IndexReport:
        count = await self._with_retries(self._store.count)
        if count < self._total:
            raise StoreError(
                f"{self._store.name} holds {count} passages, expected {self._total}: delete it and build it again"
            )
        recall = await self._recall()
        tokens = self._embedding.bytes // BYTES_PER_TOKEN
        embedded, sampled = self._embedding.embedded, len(self._sample.kept)
        report = IndexReport(self._store.name, self._total, embedded, seconds, tokens, price, recall, sampled)
        if report.warning is not None:
            self._options.emit(Notice(report.warning, is_warning=True))
        return report

    async def _recall(self) -> float | None:
        sample = self._sample.kept
        if not sample:
            return None
        querying: Dispatcher[int, Vectors, frozenset[str]] = Dispatcher(
            self._query,
            name=self._store.name,
            capacity=lambda: Capacity(min(QUERIES_PER_REQUEST, self._store.max_queries), self._store.max_requests),
            pacing=self._options.pacing,
            failure=StoreError,
        )
        querying.waits.tell = self._options.tell
        found = await querying.fetch({number: vector for number, (_, vector) in enumerate(sample)})
        return sum(own_id in found[number] for number, (own_id, _) in enumerate(sample)) / len(sample)


class _Sample:
    """Uniform sample of fixed size (Vitter's algorithm R), deterministic."""

    def __init__(self, size: int) -> None:
        self.kept: list[tuple[str, Vectors]] = []
        self._size = size
        self._offered = 0
        self._random = random.Random(2)

    def offer(self, own_id: str, vector: Vectors) -> None:
        self._offered += 1
        if len(self.kept) < self._size:
            self.kept.append((own_id, vector))
        elif (place := self._random.randrange(self._offered)) < self._size:
            self.kept[place] = (own_id, vector)


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
