"""Embeds the passages of a corpus in concurrent, paced and retried requests, each journaled as soon as it is answered."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import anyio
import anyio.from_thread

from searchr1_async.boundary.waits import in_thread
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
from searchr1_async.search.prices import BYTES_PER_TOKEN, estimated_cost, price_of

OnProgress = Callable[[int, int], None]
"""Passages done, passages in total."""

WINDOW = 512
"""Passages per journal file: embedded and stored together."""
MOST_WINDOWS = 8
"""In progress at once: 25 MB of vectors at 1,536 dimensions."""
PASSAGES_A_REQUEST = 128
"""Per request to a service; more gains nothing."""
PASSAGES_AT_ONCE = 512
"""Per request to a local embedder. Larger batches, sorted by length, need less padding."""
PACING = PacingSettings(request_timeout=300.0, retry_budget=600.0, longest_wait=600.0)
"""More patient than for searches, since nobody waits for a single answer."""


def passage_text(passage: Passage) -> str:
    """The text to embed: the title, unless the passage starts with it anyway, and the passage."""
    if not passage.title or passage.title.casefold() in passage.text[: 2 * len(passage.title) + 80].casefold():
        return passage.text
    return f"{passage.title}\n{passage.text}"


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Pacing and progress reporting of a build."""

    pacing: PacingSettings = PACING
    on_progress: OnProgress | None = None
    """Called from the event loop, first with what already exists."""
    emit: Emit = emit_nothing
    """Receives the phase ``index``, the cost estimate, waits over 5 seconds, and a warning if the index loses passages."""

    def tell(self, text: str) -> None:
        self.emit(Notice(text, is_warning=True))


async def say_cost(corpus: Corpus, total: int, embedder: Embedder, done: int, emit: Emit) -> None:
    """Emits the cost estimate, unless embedding is free. Raises CorpusError."""
    price = price_of(embedder)
    if price is not None and not price.dollars:
        return
    tokens = await in_thread(lambda: _count_tokens(corpus))
    there = f", minus the {done:,} already in the index" if done else ""
    emit(Notice(f"embedding {total:,} passages with {embedder.name}: {estimated_cost(tokens, price)}{there}"))


def _count_tokens(corpus: Corpus) -> int:
    size = 0
    for number, passage in enumerate(corpus.passages()):
        size += len(passage_text(passage).encode("utf-8", "surrogatepass"))
        if number % 10_000 == 0:
            anyio.from_thread.check_cancelled()
    return size // BYTES_PER_TOKEN


@dataclass(frozen=True, slots=True)
class _Job:
    """A passage to embed."""

    passage: Passage
    text: str
    window: int

    @property
    def size(self) -> int:
        return len(self.text.encode("utf-8", "surrogatepass"))


_JobKey = tuple[int, int]
"""Index of the passage in the corpus, and its weight in tokens."""


class PassageEmbedder:
    """Embeds passages in windows, several at once. ``name`` (of the target) and ``source`` (of the corpus) are for messages.

    Vectors go to the journal before anything else, so a kill repeats only requests in flight; the caller calls
    :meth:`Journal.forget`.
    """

    def __init__(self, name: str, source: str, embedder: Embedder, journal: Journal, options: BuildOptions) -> None:
        self.embedded = 0
        """Passages embedded here, excluding those found in the journal."""
        self.bytes = 0
        """UTF-8 bytes of their texts."""
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
        """Reads the journal, whose vectors are not embedded again. Raises OSError."""
        self._recalled = await in_thread(self._journal.recall)

    async def embed(self, window: int, place: int, passages: Sequence[Passage]) -> list[Vectors]:
        """The vector of each passage, in order. Raises EmbeddingError, or StoreError if the journal cannot be written.

        Args:
            window: number of the journal file.
            place: index of the first passage in the corpus; identifies requests.
            passages: of the window.
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
        """Windows that fill the embedder's requests, plus one being stored and one to replace it."""
        capacity = self._capacity()
        return min(MOST_WINDOWS, 2 + math.ceil(capacity.items * capacity.requests / window))

    def _capacity(self) -> Capacity:
        embedder = self._embedder
        most = PASSAGES_A_REQUEST if embedder.max_requests > 1 else PASSAGES_AT_ONCE
        return Capacity(min(most, embedder.max_texts), embedder.max_requests, embedder.max_tokens)

    async def _send(self, jobs: Sequence[_Job]) -> Sequence[Vectors]:
        """One request, called by the dispatcher."""
        try:
            answer = await self._embedder.embed_passages([job.text for job in jobs])
            vectors = checked_vectors(answer, len(jobs), self._embedder)
        except RefusedInput as refused:
            if len(jobs) > 1:
                raise  # the dispatcher resends it in parts
            raise EmbeddingError(
                f"{refused}: the passage {jobs[0].passage.id!r} of {self._source} is refused; fix or remove it"
            ) from refused
        try:
            with anyio.CancelScope(shield=True):  # keep paid-for vectors even if the build is cancelled
                await in_thread(lambda: self._keep(jobs, vectors))
        except OSError as error:
            raise StoreError(f"the journal of {self._name} cannot be written: {error.strerror or error}") from error
        self.embedded += len(jobs)
        self.bytes += sum(job.size for job in jobs)
        return [row.copy() for row in vectors]  # a view would keep the whole request in memory

    def _keep(self, jobs: Sequence[_Job], vectors: Vectors) -> None:
        for window in sorted({job.window for job in jobs}):
            rows = [row for row, job in enumerate(jobs) if job.window == window]
            keys = [key_of(jobs[row].passage.id, jobs[row].text) for row in rows]
            self._journal.append(window, keys, vectors[rows])


def next_window(windows: Iterator[tuple[int, list[Passage]]]) -> tuple[int, list[Passage]] | None:
    """The next window and its number, or None. Reads a file: call it in a worker thread."""
    return next(windows, None)
