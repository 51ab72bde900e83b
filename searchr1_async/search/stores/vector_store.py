"""The store protocols of the search, and how an index is identified, opened and checked.

Zeroed, truncated or lost vectors return wrong passages without an error, so a row count proves nothing: files have checksums
per block, and a compact index must find some of its own vectors when it is opened.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeGuard

import anyio
import msgspec
import numpy as np
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from searchr1_async.boundary.paths import absolute_path, cache_folder, write_atomically
from searchr1_async.data.corpus import Corpus
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import EmbeddingError, SearchError, StoreError
from searchr1_async.search.embedders import Embedder, Vectors
from searchr1_async.search.faults import PassingFault
from searchr1_async.search.pacing import PacingSettings

Metric = Literal["cosine", "l2", "ip"]
"""Distance metric, with Chroma's names: ``"cosine"``, squared L2 ``"l2"`` or inner product ``"ip"``."""

Found = tuple[tuple[Passage, ...], ...]
"""Passages per query, nearest first."""

SAMPLE = 16
"""Own vectors searched for when an index is opened."""
WITHIN = 10
"""A vector counts as found if a passage with its similarity is among this many results."""
LEAST_FOUND = 0.5
"""Share of the sample below which the index is rejected. Damaged indexes found 13 to 49 %, intact ones 99 %."""
_TOLERANCE = 0.02
"""Similarity tolerance: vectors are stored as float16."""
BLOCK_BYTES = 4 << 20
DIGEST_BYTES = 8
WHOLE_BLOCKS = 32
"""Files of up to this many blocks (128 MB) are fully checked when an index is opened."""
SPOT_BLOCKS = 8
"""Blocks checked of a larger file."""
ADVICE = "Copy the whole folder again from where it was built, or rebuild it"
INDEX_FORMAT = 1
OPENING_TRIES = 5
"""About 4 seconds in total with the default pauses."""


class Store(Protocol):
    """A vector store. Each call sends one request and does not retry.

    The caller batches, paces, retries and sets deadlines; the store states its limits and classifies faults. Between ``open`` and
    ``aclose`` it is used from one event loop. A cancelled call must leave it usable.

    All calls raise :class:`~searchr1_async.search.faults.PassingFault` if a retry may help, and StoreError for good.
    """

    @property
    def name(self) -> str:
        """Location for messages and logs; contains no secrets."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal as long as answers are; available once open."""
        ...

    @property
    def dimension(self) -> int | None:
        """Dimension of the vectors; None if not open, or empty."""
        ...

    @property
    def max_queries(self) -> int:
        """Maximum vectors per query."""
        ...

    @property
    def max_requests(self) -> int:
        """Maximum concurrent requests, an upper bound for pacing; 1 if the store serialises calls anyway."""
        ...

    async def open(self) -> None:
        """Connects. Does nothing if already open."""
        ...

    async def query(self, vectors: Vectors, n_results: int) -> Found:
        """The ``n_results`` nearest passages of each vector, with similarities; fewer if the store holds fewer.

        Raises:
            RefusedInput: caused by one of these vectors.
            StoreError: permanent; fatal if any other query would fail too.
        """
        ...

    async def count(self) -> int:
        """Number of passages."""
        ...

    async def aclose(self) -> None:
        """Closes connections, files and threads. The store may be opened again."""
        ...


class WritableStore(Store, Protocol):
    """A store that accepts passages."""

    async def add(self, passages: Sequence[Passage], vectors: Vectors) -> None:
        """Adds passages, replacing those with the same id. After a fault some may have been added."""
        ...

    async def missing(self, ids: Sequence[str]) -> frozenset[str]:
        """The ids that the store does not hold."""
        ...


def is_writable(store: object) -> TypeGuard[WritableStore]:
    """Whether passages can be added to it."""
    return callable(getattr(store, "add", None))


class DamagedIndexError(StoreError):
    """Files of an index are not as they were built: the ``fault`` of a file, and the ``advice`` how to restore the index."""

    def __init__(self, fault: str, advice: str) -> None:
        super().__init__(f"{fault}. {advice}", is_fatal=True)
        self.fault = fault
        self.advice = advice


async def refuse_unproven(store: Store, vectors: Vectors, metric: Metric, advice: str) -> None:
    """Searches an open store for a few of its own vectors ``[n, dimension]``; those of zeros are skipped.

    A vector counts as found by similarity, not by passage id, since a corpus may hold duplicates. Raises DamagedIndexError, with the
    ``advice`` how to restore the index, if fewer than :data:`LEAST_FOUND` are found.
    """
    vectors = vectors[vectors.any(axis=1)]  # a zero vector is near nothing, not even itself
    own = np.einsum("vd,vd->v", vectors, vectors) if metric == "ip" else np.ones(len(vectors), np.float32)
    try:
        answers = await store.query(vectors, WITHIN)
    except StoreError as error:
        raise DamagedIndexError(f"{store.name} is damaged: it fails on its own vectors ({error})", advice) from error
    best = np.array([max((passage.score for passage in passages), default=-np.inf) for passages in answers])
    found = int((best >= own - _TOLERANCE * np.maximum(1, np.abs(own))).sum())
    if found < LEAST_FOUND * len(vectors):
        raise DamagedIndexError(
            f"{store.name} is damaged: it finds {found} of {len(vectors)} of its own vectors, and should find at least "
            f"{LEAST_FOUND:.0%}",
            advice,
        )


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size and checksums of an index file."""

    bytes: int
    blocks: str
    """Concatenated 8-byte BLAKE2b digests of each :data:`BLOCK_BYTES`, in hexadecimal."""


def record_of(path: Path, check: Callable[[], object] = lambda: None) -> FileRecord:
    """Size and checksums of a file; ``check`` is called regularly and may raise to abort. Raises OSError."""
    size = path.stat().st_size
    return FileRecord(size, "".join(_digest(path, block, check) for block in range(-(-size // BLOCK_BYTES))))


def refuse_other(path: Path, record: FileRecord, advice: str = ADVICE) -> None:
    """Raises DamagedIndexError unless a file has the recorded size and blocks; of over :data:`WHOLE_BLOCKS`, some are compared."""
    try:
        size = path.stat().st_size
        if size != record.bytes:
            state = "truncated" if size < record.bytes else "too long"
            raise DamagedIndexError(f"{path} is {state}: {size:,} bytes instead of {record.bytes:,}", advice)
        blocks = -(-size // BLOCK_BYTES)
        chosen = (
            range(blocks) if blocks <= WHOLE_BLOCKS else np.linspace(0, blocks - 1, SPOT_BLOCKS).round().astype(int)
        )
        width = 2 * DIGEST_BYTES
        if len(record.blocks) != width * blocks or any(
            _digest(path, block) != record.blocks[width * block : width * (block + 1)] for block in chosen
        ):
            raise DamagedIndexError(f"{path} is not the file built with this index, or is corrupt", advice)
    except FileNotFoundError as error:
        raise DamagedIndexError(f"{path} is missing", advice) from error
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}", is_fatal=True) from error


def _digest(path: Path, block: int, check: Callable[[], object] = lambda: None) -> str:
    check()
    with path.open("rb") as file:
        file.seek(int(block) * BLOCK_BYTES)
        return hashlib.blake2b(file.read(BLOCK_BYTES), digest_size=DIGEST_BYTES).hexdigest()


@dataclass(frozen=True, slots=True)
class IndexIdentity:
    """What an index was built from. Only an index with the same content is used or continued."""

    corpus: str
    embedder: str
    source: str
    embedder_name: str
    passages: int
    format: int = INDEX_FORMAT

    @property
    def content(self) -> tuple[int, str, str]:
        """What makes two indexes the same; names may differ."""
        return self.format, self.corpus, self.embedder


@dataclass(frozen=True, slots=True)
class IndexFolder:
    """State files of an index: ``building.json`` during a build, ``index.json`` once complete."""

    path: Path

    @property
    def whole(self) -> IndexIdentity | None:
        return _read(self.path / "index.json")

    @property
    def begun(self) -> IndexIdentity | None:
        return _read(self.path / "building.json")

    def begin(self, identity: IndexIdentity) -> None:
        """Marks the index as incomplete."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / "building.json", msgspec.json.encode(identity))
        (self.path / "index.json").unlink(missing_ok=True)

    def finish(self, identity: IndexIdentity) -> None:
        write_atomically(self.path / "index.json", msgspec.json.encode(identity))
        (self.path / "building.json").unlink(missing_ok=True)

    def clear(self) -> None:
        """Deletes the store's files before a rebuild, once it is marked as incomplete. Raises OSError."""
        for path in self.path.iterdir():
            if path != self.path / "building.json":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def refuse_others(self, identity: IndexIdentity) -> None:
        """Raises StoreError if the folder holds anything but this index."""
        found = self.whole or self.begun
        if found is not None and found.content != identity.content:
            raise StoreError(
                f"{self.path} holds the index of {found.source} by {found.embedder_name}, not of {identity.source} by "
                f"{identity.embedder_name} (or the corpus has changed since): use another path, or delete this folder"
            )
        if found is None and self.path.is_dir() and any(self.path.iterdir()):
            raise StoreError(
                f"{self.path} holds files that are not an index of this package: use an empty or new folder"
            )


def building_call(path: Path) -> str | None:
    """The Python call that rebuilds the index in a folder; None if it is not this package's."""
    folder = IndexFolder(path)
    if (found := folder.whole or folder.begun) is None:
        return None
    is_named = found.source == "atlas" or Path(found.source).is_file()
    corpus = repr(found.source) if is_named else "corpus"
    return f"await sr.search.build_index({corpus}, {str(path)!r}, embedder={found.embedder_name!r})"


def default_index_folder(corpus: Corpus, embedder: Embedder) -> Path:
    """Folder in the user's cache, named by the content of corpus and embedder."""
    key = hashlib.sha256(f"{INDEX_FORMAT}\0{corpus.fingerprint}\0{embedder.fingerprint}".encode()).hexdigest()
    return cache_folder() / "indexes" / key[:24]


def _read(file: Path) -> IndexIdentity | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=IndexIdentity)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def lasting_name(embedder: str | Path | Embedder | None) -> str | None:
    """The embedder's name, absolute if it is a folder; None for an embedder object, which has no such name."""
    if not isinstance(embedder, str | Path):
        return None
    place = absolute_path(embedder, "embedder")
    return str(place) if place.is_dir() else str(embedder)


class Openable(Protocol):
    async def open(self) -> None: ...


async def open_embedder(embedder: Embedder, pacing: PacingSettings) -> None:
    """Opens the embedder. Few retries: the fault may be transient, but also a wrong address. Raises EmbeddingError."""
    await _opened(embedder.open, pacing, EmbeddingError)


async def open_store(store: Openable, pacing: PacingSettings) -> None:
    """Opens the store, like :func:`open_embedder`. Raises StoreError."""
    await _opened(store.open, pacing, StoreError)


async def _opened(request: Callable[[], Awaitable[None]], pacing: PacingSettings, failure: type[SearchError]) -> None:
    retried = AsyncRetrying(
        retry=retry_if_exception_type(PassingFault),
        wait=wait_random_exponential(multiplier=2 * pacing.first_pause, max=pacing.longest_pause),
        stop=stop_after_attempt(OPENING_TRIES),
        sleep=anyio.sleep,
        reraise=True,
    )
    try:
        await retried(request)
    except PassingFault as fault:
        raise failure(str(fault)) from fault
