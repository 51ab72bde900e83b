"""Puts a corpus into a store: read, embedded and put in at the same time, in windows, and gone on with after a kill."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import anyio
import anyio.from_thread
import anyio.to_thread
import numpy as np

from searchr1_async.data.corpus import Corpus
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import EmbeddingError, StoreError
from searchr1_async.events import Emit, Notice, PhaseAdvanced, PhaseEnded, PhaseStarted, emit_nothing
from searchr1_async.search.dispatch import Capacity, Dispatcher
from searchr1_async.search.embedders.base import Embedder, Vectors
from searchr1_async.search.faults import PassingFault, RefusedInput
from searchr1_async.search.index_report import RECALL_WITHIN, IndexReport
from searchr1_async.search.journal import Journal, key_of
from searchr1_async.search.pacing import PacingSettings
from searchr1_async.search.prices import BYTES_A_TOKEN, Price, estimated_cost, price_of
from searchr1_async.search.stores.base import WritableStore
from searchr1_async.threads import in_thread

OnProgress = Callable[[int, int], None]
"""Passages done, passages in all."""

Result = TypeVar("Result")

WINDOW = 512
"""Passages that are looked for, put in and reported together."""
MOST_WINDOWS = 8
"""At work at once: 25 MB of vectors at 1,536 dimensions."""
PASSAGES_A_REQUEST = 128
"""To a service, at most: larger ones gain nothing."""
PASSAGES_AT_ONCE = 512
"""To an embedder that takes one request at a time. Such a one computes here, and sorts by length what it gets together:
2,048 passages took 47 s of CPU in requests of 512, 68 s in requests of 128."""
QUERIES_A_REQUEST = 50
SAMPLE = 200
PACING = PacingSettings(request_timeout=300.0, retry_budget=600.0)
"""Nobody waits for a single answer: more patience than for searches."""


def passage_text(passage: Passage) -> str:
    """What is embedded of a passage: its title in front, unless the text names it at its beginning anyway."""
    if not passage.title or passage.title.casefold() in passage.text[: 2 * len(passage.title) + 80].casefold():
        return passage.text
    return f"{passage.title}\n{passage.text}"


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How a build is paced and watched."""

    pacing: PacingSettings = PACING
    on_progress: OnProgress | None = None
    """Called from the event loop, first with what is there already."""
    emit: Emit = emit_nothing
    """Told of the phase ``index``, of the estimated cost before it, and of an index that loses passages."""


@dataclass(frozen=True, slots=True)
class _Job:
    """A passage to be embedded."""

    passage: Passage
    text: str
    window: int

    @property
    def size(self) -> int:
        return len(self.text.encode("utf-8", "surrogatepass"))


_JobKey = tuple[int, int]
"""A passage's number in the corpus, and its weight in tokens."""


class IndexBuilder:
    """Builds one index.

    Several windows are at work at once: while some are embedded, in several requests, another is put in. The vectors of a
    request are in the journal before anything else is done with them, so that a kill repeats only requests in the air.

    Args:
        corpus: what is put in.
        embedder: open.
        store: open. What it holds of the corpus, by id, is left as it is.
        journal: keeps vectors until the store has them.
        options: see :class:`BuildOptions`.
    """

    def __init__(
        self, corpus: Corpus, embedder: Embedder, store: WritableStore, journal: Journal, options: BuildOptions
    ) -> None:
        self._corpus = corpus
        self._embedder = embedder
        self._store = store
        self._journal = journal
        self._options = options
        self._embedding: Dispatcher[_JobKey, _Job, Vectors] = Dispatcher(
            self._embed,
            name=embedder.name,
            capacity=self._embedder_capacity,
            pacing=options.pacing,
            failure=EmbeddingError,
            weigh=lambda key: key[1],
        )
        self._adding: Dispatcher[int, tuple[Passage, Vectors], None] = Dispatcher(
            self._add, name=store.name, capacity=self._store_capacity, pacing=options.pacing, failure=StoreError
        )
        self._recalled: dict[bytes, Vectors] = {}
        self._sample = _Sample(SAMPLE)
        self._total = self._done = self._embedded = self._bytes = 0
        self._was_empty = True

    async def build(self) -> IndexReport:
        """Puts in what is missing, and looks a sample of it up.

        Raises:
            CorpusError: the corpus cannot be read.
            EmbeddingError: the embedder failed for good; what is done is kept.
            StoreError: the store failed for good, does not fit the embedder, or the journal cannot be written.
        """
        self._total = await anyio.to_thread.run_sync(len, self._corpus)
        self._refuse_other_dimension()
        count = await self._patiently(self._store.count)
        self._was_empty = count == 0
        self._done = min(count, self._total)
        price = price_of(self._embedder)
        await self._say_cost(price)
        self._options.emit(PhaseStarted("index", self._total, "passages"))
        began = time.monotonic()
        try:
            self._advance(0)
            self._recalled = await in_thread(self._journal.recall)
            await self._carry_all()
            await in_thread(self._journal.clear)
        except OSError as error:
            raise StoreError(
                f"the journal of {self._store.name} cannot be written: {error.strerror or error}"
            ) from error
        finally:
            self._options.emit(PhaseEnded("index", time.monotonic() - began))
        return await self._verified(price, time.monotonic() - began)

    async def _say_cost(self, price: Price | None) -> None:
        """Before it starts; where embedding is free it is not worth the reading."""
        if price is not None and not price.dollars:
            return
        tokens = await in_thread(self._count_tokens)
        there = f", less what is there already ({self._done:,} of them)" if self._done else ""
        cost = estimated_cost(tokens, price)
        self._options.emit(Notice(f"embedding {self._total:,} passages with {self._embedder.name}: {cost}{there}"))

    def _count_tokens(self) -> int:
        size = 0
        for number, passage in enumerate(self._corpus.passages()):
            size += len(passage_text(passage).encode("utf-8", "surrogatepass"))
            if number % 10_000 == 0:
                anyio.from_thread.check_cancelled()
        return size // BYTES_A_TOKEN

    def _refuse_other_dimension(self) -> None:
        if self._store.dimension not in (None, self._embedder.dimension):
            raise StoreError(
                f"{self._store.name} holds vectors of {self._store.dimension} numbers, {self._embedder.name} makes them "
                f"of {self._embedder.dimension}: build into another collection"
            )

    # Windows: read in order, a few at work at once.

    async def _carry_all(self) -> None:
        windows = enumerate(self._corpus.batches(WINDOW))
        capacity = self._embedder_capacity()
        # Those that fill the embedder's requests, one that is put in, and one that takes its place.
        at_once = min(MOST_WINDOWS, 2 + math.ceil(capacity.items * capacity.requests / WINDOW))
        room = anyio.Semaphore(at_once)
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
                while window := await anyio.to_thread.run_sync(_next_window, windows):
                    tasks.start_soon(carry, *window)
                    await room.acquire()
            except Exception as error:  # the corpus changed since it was checked
                failures.append(error)
                tasks.cancel_scope.cancel()
        if failures:
            raise failures[0]

    async def _carry(self, number: int, passages: list[Passage]) -> None:
        missing = passages if self._was_empty else await self._missing(passages)
        jobs = [_Job(passage, passage_text(passage), number) for passage in missing]
        vectors: dict[int, Vectors] = {}
        to_embed: dict[_JobKey, _Job] = {}
        for place, job in enumerate(jobs, start=number * WINDOW):
            if (known := self._recalled.pop(key_of(job.passage.id, job.text), None)) is not None:
                vectors[place] = known
            else:
                to_embed[place, job.size // 3 + 1] = job
        fetched = await self._embedding.fetch(to_embed)
        vectors |= {place: vector for (place, _), vector in fetched.items()}
        items = {place: (job.passage, vectors[place]) for place, job in enumerate(jobs, start=number * WINDOW)}
        await self._adding.fetch(items)
        await anyio.to_thread.run_sync(self._journal.forget, number)
        for passage, vector in items.values():
            self._sample.offer(passage.id, vector)
        self._advance(len(items))

    async def _missing(self, passages: list[Passage]) -> list[Passage]:
        missing = await self._patiently(lambda: self._store.missing([passage.id for passage in passages]))
        return [passage for passage in passages if passage.id in missing]

    def _advance(self, count: int) -> None:
        self._done = min(self._done + count, self._total)
        self._options.emit(PhaseAdvanced("index", self._done))
        if self._options.on_progress is not None:
            self._options.on_progress(self._done, self._total)

    # One request to each service; the dispatchers call these.

    async def _embed(self, jobs: Sequence[_Job]) -> Sequence[Vectors]:
        try:
            vectors = await self._embedder.embed_passages([job.text for job in jobs])
        except RefusedInput as refused:
            if len(jobs) > 1:
                raise  # it comes again in parts
            raise EmbeddingError(
                f"{refused}: the passage {jobs[0].passage.id!r} of {self._corpus.source} is refused; mend it or leave it out"
            ) from refused
        if vectors.shape != (len(jobs), self._embedder.dimension):
            raise PassingFault(f"{self._embedder.name} answered {vectors.shape} for {len(jobs)}", cause="malformed")
        try:
            with anyio.CancelScope(shield=True):  # what is answered is kept, whatever happens to the build meanwhile
                await in_thread(lambda: self._keep(jobs, vectors))
        except OSError as error:
            raise StoreError(
                f"the journal of {self._store.name} cannot be written: {error.strerror or error}"
            ) from error
        self._embedded += len(jobs)
        self._bytes += sum(job.size for job in jobs)
        return [row.copy() for row in vectors]  # a view would keep its whole request in memory

    def _keep(self, jobs: Sequence[_Job], vectors: Vectors) -> None:
        for window in sorted({job.window for job in jobs}):
            rows = [row for row, job in enumerate(jobs) if job.window == window]
            keys = [key_of(jobs[row].passage.id, jobs[row].text) for row in rows]
            self._journal.append(window, keys, vectors[rows])

    async def _add(self, items: Sequence[tuple[Passage, Vectors]]) -> Sequence[None]:
        await self._store.add([passage for passage, _ in items], np.stack([vector for _, vector in items]))
        return [None] * len(items)

    async def _query(self, vectors: Sequence[Vectors]) -> Sequence[frozenset[str]]:
        found = await self._store.query(np.stack(vectors), RECALL_WITHIN)
        return [frozenset(passage.id for passage in passages) for passages in found]

    def _embedder_capacity(self) -> Capacity:
        embedder = self._embedder
        most = PASSAGES_A_REQUEST if embedder.max_requests > 1 else PASSAGES_AT_ONCE
        return Capacity(min(most, embedder.max_texts), embedder.max_requests, embedder.max_tokens)

    def _store_capacity(self) -> Capacity:
        return Capacity(WINDOW, self._store.max_requests)

    async def _patiently(self, request: Callable[[], Awaitable[Result]]) -> Result:
        """One request to the store, tried again as the others are."""

        async def send(_: Sequence[None]) -> Sequence[Result]:
            return [await request()]

        once: Dispatcher[str, None, Result] = Dispatcher(
            send,
            name=self._store.name,
            capacity=lambda: Capacity(1, 1),
            pacing=self._options.pacing,
            failure=StoreError,
        )
        return (await once.fetch({"once": None}))["once"]

    # Afterwards.

    async def _verified(self, price: Price | None, seconds: float) -> IndexReport:
        count = await self._patiently(self._store.count)
        if count < self._total:
            raise StoreError(
                f"{self._store.name} holds {count} passages where {self._total} were put in: delete it and build it again"
            )
        recall = await self._recall()
        tokens = self._bytes // BYTES_A_TOKEN
        report = IndexReport(
            self._store.name, self._total, self._embedded, seconds, tokens, price, recall, len(self._sample.kept)
        )
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
            capacity=lambda: Capacity(min(QUERIES_A_REQUEST, self._store.max_queries), self._store.max_requests),
            pacing=self._options.pacing,
            failure=StoreError,
        )
        found = await querying.fetch({number: vector for number, (_, vector) in enumerate(sample)})
        return sum(own_id in found[number] for number, (own_id, _) in enumerate(sample)) / len(sample)


class _Sample:
    """So many of all that is offered, each with the same chance (Vitter's algorithm R), the same in every run."""

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


def _next_window(windows: Iterator[tuple[int, list[Passage]]]) -> tuple[int, list[Passage]] | None:
    return next(windows, None)
