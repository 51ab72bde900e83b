"""Embeds the passages of a corpus: several requests at once, paced and retried, each kept on disk once it is answered."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import anyio
import anyio.from_thread

from searchr1_async.data.corpus import Corpus
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import EmbeddingError, StoreError
from searchr1_async.events import Emit, Notice, emit_nothing
from searchr1_async.search.dispatch import Capacity, Dispatcher
from searchr1_async.search.embedders.base import Embedder, Vectors
from searchr1_async.search.embedders.checked import checked_vectors
from searchr1_async.search.faults import RefusedInput
from searchr1_async.search.journal import Journal, key_of
from searchr1_async.search.pacing import PacingSettings
from searchr1_async.search.prices import BYTES_A_TOKEN, estimated_cost, price_of
from searchr1_async.threads import in_thread

OnProgress = Callable[[int, int], None]
"""Passages done, passages in all."""

WINDOW = 512
"""Passages that are embedded, put away and forgotten by the journal together."""
MOST_WINDOWS = 8
"""At work at once: 25 MB of vectors at 1,536 dimensions."""
PASSAGES_A_REQUEST = 128
"""To a service, at most: larger ones gain nothing."""
PASSAGES_AT_ONCE = 512
"""To an embedder that takes one request at a time. Such a one computes here, and sorts by length what it gets together:
2,048 passages took 47 s of CPU in requests of 512, 68 s in requests of 128."""
PACING = PacingSettings(request_timeout=300.0, retry_budget=600.0, longest_wait=600.0)
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
    """Told of the phase ``index``, of the estimated cost before it, of every wait over 5 seconds, and of an index that loses
    passages."""

    def tell(self, text: str) -> None:
        """Emits a warning."""
        self.emit(Notice(text, is_warning=True))


async def say_cost(corpus: Corpus, total: int, embedder: Embedder, done: int, emit: Emit) -> None:
    """The estimated cost, before it starts; where embedding is free it is not worth the reading.

    Raises:
        CorpusError: the corpus cannot be read.
    """
    price = price_of(embedder)
    if price is not None and not price.dollars:
        return
    tokens = await in_thread(lambda: _count_tokens(corpus))
    there = f", less what is there already ({done:,} of them)" if done else ""
    emit(Notice(f"embedding {total:,} passages with {embedder.name}: {estimated_cost(tokens, price)}{there}"))


def _count_tokens(corpus: Corpus) -> int:
    size = 0
    for number, passage in enumerate(corpus.passages()):
        size += len(passage_text(passage).encode("utf-8", "surrogatepass"))
        if number % 10_000 == 0:
            anyio.from_thread.check_cancelled()
    return size // BYTES_A_TOKEN


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


class PassageEmbedder:
    """Embeds passages, window by window, several at work at once.

    The vectors of a request are in the journal before anything else is done with them, so that a kill repeats only
    requests in the air.

    Args:
        name: of what the passages are embedded for.
        source: of the corpus; both for messages.
        embedder: open.
        journal: keeps vectors until :meth:`Journal.forget`, which is the caller's.
        options: how requests are paced, and who is told of waits.
    """

    def __init__(self, name: str, source: str, embedder: Embedder, journal: Journal, options: BuildOptions) -> None:
        self.embedded = 0
        """Passages whose vectors were answered here, and so not found in the journal."""
        self.bytes = 0
        """Of UTF-8, of their texts."""
        self._name = name
        self._source = source
        self._embedder = embedder
        self._journal = journal
        self._recalled: dict[bytes, Vectors] = {}
        self._requests: Dispatcher[_JobKey, _Job, Vectors] = Dispatcher(
            self._send,
            name=embedder.name,
            capacity=self._capacity,
            pacing=options.pacing,
            failure=EmbeddingError,
            weigh=lambda key: key[1],
        )
        self._requests.waits.tell = options.tell

    async def recall(self) -> None:
        """Reads what is in the journal; none of that is embedded again.

        Raises:
            OSError: the journal cannot be read.
        """
        self._recalled = await in_thread(self._journal.recall)

    async def embed(self, window: int, place: int, passages: Sequence[Passage]) -> list[Vectors]:
        """The vector of every passage, in order.

        Args:
            window: number of the journal's file.
            place: number of the first passage, no other window's: what tells requests apart.
            passages: of the window.

        Raises:
            EmbeddingError: the embedder failed for good.
            StoreError: the journal cannot be written.
        """
        jobs = [_Job(passage, passage_text(passage), window) for passage in passages]
        vectors: dict[int, Vectors] = {}
        to_embed: dict[_JobKey, _Job] = {}
        for number, job in enumerate(jobs, start=place):
            if (known := self._recalled.pop(key_of(job.passage.id, job.text), None)) is not None:
                vectors[number] = known
            else:
                to_embed[number, job.size // 3 + 1] = job
        fetched = await self._requests.fetch(to_embed)
        vectors |= {number: vector for (number, _), vector in fetched.items()}
        return [vectors[number] for number in range(place, place + len(jobs))]

    def windows_at_once(self, window: int) -> int:
        """Windows of so many passages that fill the embedder's requests, one that is put away, and one that takes its place."""
        capacity = self._capacity()
        return min(MOST_WINDOWS, 2 + math.ceil(capacity.items * capacity.requests / window))

    def _capacity(self) -> Capacity:
        embedder = self._embedder
        most = PASSAGES_A_REQUEST if embedder.max_requests > 1 else PASSAGES_AT_ONCE
        return Capacity(min(most, embedder.max_texts), embedder.max_requests, embedder.max_tokens)

    async def _send(self, jobs: Sequence[_Job]) -> Sequence[Vectors]:
        """One request; the dispatcher calls it."""
        try:
            answer = await self._embedder.embed_passages([job.text for job in jobs])
            vectors = checked_vectors(answer, len(jobs), self._embedder)
        except RefusedInput as refused:
            if len(jobs) > 1:
                raise  # it comes again in parts
            raise EmbeddingError(
                f"{refused}: the passage {jobs[0].passage.id!r} of {self._source} is refused; mend it or leave it out"
            ) from refused
        try:
            with anyio.CancelScope(shield=True):  # what is answered is kept, whatever happens to the build meanwhile
                await in_thread(lambda: self._keep(jobs, vectors))
        except OSError as error:
            raise StoreError(f"the journal of {self._name} cannot be written: {error.strerror or error}") from error
        self.embedded += len(jobs)
        self.bytes += sum(job.size for job in jobs)
        return [row.copy() for row in vectors]  # a view would keep its whole request in memory

    def _keep(self, jobs: Sequence[_Job], vectors: Vectors) -> None:
        for window in sorted({job.window for job in jobs}):
            rows = [row for row, job in enumerate(jobs) if job.window == window]
            keys = [key_of(jobs[row].passage.id, jobs[row].text) for row in rows]
            self._journal.append(window, keys, vectors[rows])


def next_window(windows: Iterator[tuple[int, list[Passage]]]) -> tuple[int, list[Passage]] | None:
    """The next window of a corpus, with its number; None behind the last. Reads a file: call it in a worker thread."""
    return next(windows, None)
