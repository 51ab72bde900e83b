"""A corpus that is embedded while a compact index is built from it."""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncGenerator, Collection
from pathlib import Path

import anyio
import anyio.to_thread
import numpy as np

from searchr1_async.boundary.waits import in_thread
from searchr1_async.data.corpus import Corpus
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import StoreError
from searchr1_async.search.embedders.base import Embedder
from searchr1_async.search.journal import Journal
from searchr1_async.search.opening import open_embedder
from searchr1_async.search.passage_embedding import WINDOW, BuildOptions, PassageEmbedder, next_window, say_cost
from searchr1_async.search.sources.base import Block, SourceFacts


class EmbeddedCorpus:
    """The passages of a corpus in order, with vectors from an embedder.

    Embeds several windows of 512 passages ahead of the reader. Each vector is journalled until :meth:`kept`, so a kill repeats
    only requests in flight.

    Args:
        corpus: passages to embed.
        embedder: opened and closed here.
        journal_folder: used for this corpus and embedder only; created when needed.
        options: request pacing; the estimated cost is reported before the first request.
    """

    def __init__(self, corpus: Corpus, embedder: Embedder, journal_folder: Path, options: BuildOptions) -> None:
        self._corpus = corpus
        self._embedder = embedder
        self._folder = journal_folder
        self._options = options
        self._facts: SourceFacts | None = None
        self._journal: Journal | None = None
        self._forgotten = 0
        """Windows before this one are no longer in the journal."""
        # Plain asyncio tasks, since a generator may not yield inside a task group.
        self._ahead: deque[asyncio.Task[Block]] = deque()

    async def open(self) -> SourceFacts:
        if self._facts is None:
            count, fingerprint = await anyio.to_thread.run_sync(lambda: (len(self._corpus), self._corpus.fingerprint))
            await open_embedder(self._embedder, self._options.pacing)
            key = f"{fingerprint}\0{self._embedder.fingerprint}".encode()
            dimension = self._embedder.dimension
            self._journal = Journal(self._folder, self._embedder.fingerprint, dimension)
            self._facts = SourceFacts(
                f"{self._corpus.source}, embedded by {self._embedder.name}",
                f"embedded-{hashlib.blake2b(key, digest_size=16).hexdigest()}",
                count,
                dimension,
                "cosine",
                embedder_fingerprint=self._embedder.fingerprint,
            )
        return self._facts

    async def blocks(self, start: int) -> AsyncGenerator[Block, None]:
        """See :meth:`~searchr1_async.search.sources.base.VectorSource.blocks`."""
        facts, journal = self._opened()
        if start >= facts.count:
            return
        await say_cost(self._corpus, facts.count, self._embedder, start, self._options.emit)
        own = PassageEmbedder(facts.name, self._corpus.source, self._embedder, journal, self._options)
        first = start // WINDOW
        windows = enumerate(self._corpus.batches(WINDOW, first * WINDOW), start=first)
        await self._stop()
        ahead = self._ahead
        try:
            await self._forget(first)
            await own.recall()
            at_once = own.windows_at_once(WINDOW)
            skipped = start % WINDOW
            while True:
                while len(ahead) < at_once and (window := await anyio.to_thread.run_sync(next_window, windows)):
                    ahead.append(asyncio.create_task(_embedded(own, *window, skipped)))
                    skipped = 0
                if not ahead:
                    return
                yield await ahead[0]
                ahead.popleft()
        except OSError as error:
            raise StoreError(f"the journal of {facts.name} cannot be read: {error.strerror or error}") from error
        finally:
            await _stopped(ahead)

    async def kept(self, rows: int) -> None:
        facts, journal = self._opened()
        if rows >= facts.count:
            await in_thread(journal.clear)
        else:
            await self._forget(rows // WINDOW)

    async def aclose(self) -> None:
        await self._stop()  # a reader that broke out of the loop has not closed the generator
        self._facts = self._journal = None
        self._forgotten = 0
        await self._embedder.aclose()

    async def _stop(self) -> None:
        ahead, self._ahead = self._ahead, deque()
        await _stopped(ahead)

    async def _forget(self, before: int) -> None:
        _, journal = self._opened()

        def forget() -> None:
            for window in range(self._forgotten, before):
                journal.forget(window)

        await in_thread(forget)
        self._forgotten = max(self._forgotten, before)

    def _opened(self) -> tuple[SourceFacts, Journal]:
        if self._facts is None or self._journal is None:
            raise StoreError(f"{self._corpus.source} is not open")
        return self._facts, self._journal


async def _stopped(tasks: Collection[asyncio.Task[Block]]) -> None:
    for task in tasks:
        task.cancel()
    with anyio.CancelScope(shield=True):
        await asyncio.gather(*tasks, return_exceptions=True)


async def _embedded(embedder: PassageEmbedder, number: int, passages: list[Passage], skipped: int) -> Block:
    """Embeds a window without its first ``skipped`` passages, which are already indexed."""
    wanted = passages[skipped:]
    vectors = await embedder.embed(number, number * WINDOW + skipped, wanted)
    return wanted, np.stack(vectors)
