"""Embeds the passages of a corpus in concurrent, paced and retried requests, and says what that costs.

Each answer is journaled at once, until its vectors are in the store, so that nothing is embedded twice.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio
import anyio.from_thread
import numpy as np

from searchr1_async.boundary.paths import write_all
from searchr1_async.boundary.waits import in_thread
from searchr1_async.data.corpus import Corpus
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import EmbeddingError, StoreError
from searchr1_async.events import Emit, Notice, emit_nothing
from searchr1_async.search.dispatch import Dispatcher
from searchr1_async.search.embedders import Embedder, SentenceTransformerEmbedder, Vectors, checked_vectors
from searchr1_async.search.faults import RefusedInput
from searchr1_async.search.pacing import PacingSettings
from searchr1_async.search.retries import Capacity

KEY_BYTES = 16
_MAGIC = b"SR1VEC01"
_HEADER = struct.Struct("<8s16sI")
"""Magic, the embedder's hash, and the dimension; followed by a CRC-32."""
_CRC = struct.Struct("<I")
_SUFFIX = ".vectors"

BYTES_PER_TOKEN = 4
"""UTF-8 bytes per token of English text; an estimate, since tokenizers differ."""
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
_JobKey = tuple[int, int]
"""Index of the passage in the corpus, and its weight in tokens."""


def key_of(passage_id: str, text: str) -> bytes:
    """Hash of a passage's id and its embedded text."""
    content = f"{passage_id}\0{text}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()


class Journal:
    """One append-only file per window of passages, deleted once the window is in the store.

    A record is a key, a vector and their CRC-32. Survives kills: a torn record at the end of a file is truncated. Does not
    fsync, so a power failure may lose recent vectors. Files of another embedder (by fingerprint) or dimension are deleted.

    Blocks on the disk: call it in a worker thread. Thread-safe.
    """

    def __init__(self, folder: Path, embedder: str, dimension: int) -> None:
        self._folder = folder
        identity = hashlib.blake2b(embedder.encode(), digest_size=16).digest()
        header = _HEADER.pack(_MAGIC, identity, dimension)
        self._header = header + _CRC.pack(zlib.crc32(header))
        self._dimension = dimension
        self._record = KEY_BYTES + 4 * dimension + _CRC.size
        self._lock = threading.Lock()

    def recall(self) -> dict[bytes, Vectors]:
        """All intact vectors on disk, by key; truncates torn ends. Raises OSError."""
        found: dict[bytes, Vectors] = {}
        with self._lock:
            for file in sorted(self._folder.glob(f"*{_SUFFIX}")):
                if (size := self._read(file, found)) is None:
                    file.unlink()
                elif size < file.stat().st_size:
                    with file.open("r+b") as torn:
                        torn.truncate(size)
        return found

    def _read(self, file: Path, found: dict[bytes, Vectors]) -> int | None:
        """Adds a file's vectors to ``found`` and returns its intact bytes; None for a foreign file."""
        content = file.read_bytes()
        if not content.startswith(self._header):
            return None
        position = len(self._header)
        while len(record := content[position : position + self._record]) == self._record:
            body, checksum = record[: -_CRC.size], record[-_CRC.size :]
            if _CRC.unpack(checksum)[0] != zlib.crc32(body):
                break
            found[body[:KEY_BYTES]] = np.frombuffer(body, "<f4", offset=KEY_BYTES).astype(np.float32)
            position += self._record
        return position

    def append(self, window: int, keys: Sequence[bytes], vectors: Vectors) -> None:
        """Appends vectors of a window. Raises OSError."""
        records = bytearray()
        for key, vector in zip(keys, np.ascontiguousarray(vectors, "<f4"), strict=True):
            body = key + vector.tobytes()
            records += body + _CRC.pack(zlib.crc32(body))
        with self._lock:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._file(window).open("ab", buffering=0) as file:
                before = file.tell()
                try:
                    write_all(file, records if before else self._header + records)
                except OSError:  # full disk: a torn record would hide later ones
                    file.truncate(before)
                    raise

    def forget(self, window: int) -> None:
        """Deletes a window that is in the store."""
        with self._lock:
            self._file(window).unlink(missing_ok=True)

    def clear(self) -> None:
        with self._lock:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, window: int) -> Path:
        return self._folder / f"{window:09d}{_SUFFIX}"


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million input tokens."""

    dollars: float
    as_of: str
    """Month of the lookup."""

    def cost(self, tokens: int) -> float:
        """US dollars."""
        return self.dollars * tokens / 1e6


_PRICES = {"gemini-embedding-001": Price(0.15, "2025-07")}
"""List prices by model, without discounts for batch jobs or free quotas."""


def price_of(embedder: Embedder) -> Price | None:
    """The price of an embedder's tokens: 0 if it runs locally, None if unknown."""
    if isinstance(embedder, SentenceTransformerEmbedder):
        return Price(0.0, "")
    return _PRICES.get(embedder.name.partition(" (")[0])


def estimated_cost(tokens: int, price: Price | None) -> str:
    """Describes the estimate, its basis, and the date of the price."""
    words = f"about {tokens:,} tokens (bytes of UTF-8 / {BYTES_PER_TOKEN})"
    if price is None:
        return f"{words}, at an unknown price"
    if not price.dollars:
        return f"{words}, free on this machine"
    return f"{words}, about ${price.cost(tokens):,.2f} at ${price.dollars:g} per million (list price of {price.as_of})"


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
