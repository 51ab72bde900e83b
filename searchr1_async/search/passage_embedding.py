"""What builds of indexes share: embedding a corpus in concurrent, paced and retried requests, its cost and its progress."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import anyio
import anyio.from_thread
import anyio.to_thread

from searchr1_async.boundary.waits import in_thread
from searchr1_async.data.corpus import Corpus
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import EmbeddingError
from searchr1_async.events import Emit, Notice, PhaseAdvanced, PhaseEnded, PhaseStarted, emit_nothing
from searchr1_async.search.dispatch import Dispatcher
from searchr1_async.search.embedders import Embedder, SentenceTransformerEmbedder, Vectors, checked_vectors
from searchr1_async.search.faults import RefusedInput
from searchr1_async.search.pacing import PacingSettings
from searchr1_async.search.retries import Capacity

Result = TypeVar("Result")

BYTES_PER_TOKEN = 4
"""UTF-8 bytes per token of English text; an estimate, since tokenizers differ."""
_DOLLARS = {"gemini-embedding-001": 0.15}
"""US dollars per million tokens, by model: list prices of July 2025, without discounts for batch jobs or free quotas."""
OnProgress = Callable[[int, int], None]
"""Passages done, passages in total."""
WINDOW = 512
"""Passages that are embedded and stored together."""
MOST_WINDOWS = 8
"""In progress at once: 25 MB of vectors at 1,536 dimensions. A kill repeats these."""
PASSAGES_A_REQUEST = 128
"""Per request to a service; more gains nothing."""
PASSAGES_AT_ONCE = 512
"""Per request to a local embedder. Larger batches, sorted by length, need less padding."""
PACING = PacingSettings(request_timeout=300.0, retry_budget=600.0, longest_wait=600.0)
"""More patient than for searches, since nobody waits for a single answer."""


def estimated_cost(embedder: Embedder, tokens: int) -> float | None:
    """US dollars for embedding so many tokens: 0 for a local embedder, None if the price is unknown."""
    if isinstance(embedder, SentenceTransformerEmbedder):
        return 0.0
    price = _DOLLARS.get(embedder.name.partition(" (")[0])
    return None if price is None else price * tokens / 1e6


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
    """Receives the phases, the cost estimate and waits over 5 seconds."""

    def tell(self, text: str) -> None:
        self.emit(Notice(text, is_warning=True))

    def progress(self, done: int, total: int) -> None:
        if self.on_progress is not None:
            self.on_progress(done, total)


@contextmanager
def build_phase(emit: Emit, name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Emits the events of one step of a build; yields the function that receives how much is done."""
    began = time.monotonic()
    emit(PhaseStarted(name, total, unit))
    try:
        yield lambda done: emit(PhaseAdvanced(name, done))
    finally:
        emit(PhaseEnded(name, time.monotonic() - began))


async def say_cost(corpus: Corpus, total: int, embedder: Embedder, done: int, emit: Emit) -> None:
    """Emits the cost estimate, unless embedding is free. Raises CorpusError."""
    if isinstance(embedder, SentenceTransformerEmbedder):
        return
    tokens = await in_thread(lambda: _count_tokens(corpus))
    cost = estimated_cost(embedder, tokens)
    price = "at an unknown price" if cost is None else f"about ${cost:,.2f} at its list price"
    there = f", minus the {done:,} already in the index" if done else ""
    emit(Notice(f"embedding {total:,} passages with {embedder.name}: about {tokens:,} tokens, {price}{there}"))


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _count_tokens(corpus: Corpus) -> int:
    size = 0
    for number, passage in enumerate(corpus.passages()):
        size += _size(passage_text(passage))
        if number % 10_000 == 0:
            anyio.from_thread.check_cancelled()
    return size // BYTES_PER_TOKEN


class PassageEmbedder:
    """Embeds passages, several requests at once. ``source`` (of the corpus) is for messages."""

    def __init__(self, source: str, embedder: Embedder, options: BuildOptions) -> None:
        self.embedded = 0
        """Passages embedded here."""
        self.bytes = 0
        """UTF-8 bytes of their texts."""
        self._source, self._embedder = source, embedder
        self._requests: Dispatcher[int, tuple[str, str], Vectors] = Dispatcher(
            self._send,
            name=embedder.name,
            capacity=self._capacity,
            pacing=options.pacing,
            failure=EmbeddingError,
        )
        self._requests.waits.tell = options.tell

    async def embed(self, place: int, passages: Sequence[Passage]) -> list[Vectors]:
        """The vector of each passage, in order. ``place``: index of the first in the corpus. Raises EmbeddingError."""
        jobs = {number: (each.id, passage_text(each)) for number, each in enumerate(passages, start=place)}
        vectors = await self._requests.fetch(jobs)
        return [vectors[key] for key in jobs]

    @property
    def windows_at_once(self) -> int:
        """Windows that fill the embedder's requests, plus one being stored and one to replace it."""
        capacity = self._capacity()
        return min(MOST_WINDOWS, 2 + math.ceil(capacity.items * capacity.requests / WINDOW))

    def _capacity(self) -> Capacity:
        embedder = self._embedder
        most = PASSAGES_A_REQUEST if embedder.max_requests > 1 else PASSAGES_AT_ONCE
        return Capacity(min(most, embedder.max_texts), embedder.max_requests)

    async def _send(self, jobs: Sequence[tuple[str, str]]) -> Sequence[Vectors]:
        """One request, called by the dispatcher."""
        texts = [text for _, text in jobs]
        try:
            vectors = checked_vectors(await self._embedder.embed_passages(texts), len(jobs), self._embedder)
        except RefusedInput as refused:
            if len(jobs) > 1:
                raise  # the dispatcher resends it in parts
            raise EmbeddingError(
                f"{refused}: the passage {jobs[0][0]!r} of {self._source} is refused; fix or remove it"
            ) from refused
        self.embedded += len(jobs)
        self.bytes += sum(map(_size, texts))
        return [row.copy() for row in vectors]  # a view would keep the whole request in memory


async def in_windows(
    corpus: Corpus,
    first: int,
    at_once: int,
    work: Callable[[int, list[Passage]], Awaitable[Result]],
    *,
    in_order: bool,
) -> AsyncGenerator[Result]:
    """The results of ``work(number, passages)`` for each window of a corpus from the window ``first`` on, ``at_once`` at a time.

    They are plain asyncio tasks, since a generator may not yield inside a task group; close it to end them. ``in_order``: results come
    in the order of the windows, so a slow one delays the next; else as they are ready.
    """
    windows = enumerate(corpus.batches(WINDOW, first * WINDOW), start=first)
    ahead: list[asyncio.Future[Result]] = []
    try:
        while True:
            while len(ahead) < at_once and (window := await anyio.to_thread.run_sync(next, windows, None)):
                ahead.append(asyncio.ensure_future(work(*window)))
            if not ahead:
                return
            ready = ahead if in_order else (await asyncio.wait(ahead, return_when=asyncio.FIRST_COMPLETED))[0]
            task = next(iter(ready))
            yield await task
            ahead.remove(task)
    finally:
        for task in ahead:
            task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(*ahead, return_exceptions=True)
