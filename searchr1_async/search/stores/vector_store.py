"""The vector store protocols used by the search.

Checks an index when it is opened, by searching for some of its own vectors.

Zeroed, truncated or lost vectors return wrong passages without an error, so a row count proves nothing.

Per-block checksums of large files: a few blocks identify a file quickly, all of them detect corruption.

The folder of an index: its identity, and whether it is complete.

Opens an embedder or a store, with a few retries.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeGuard

import anyio
import numpy as np
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from searchr1_async.boundary.paths import cache_folder, write_atomically
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


class Store(Protocol):
    """A vector store. Each call sends one request and does not retry.

    The caller batches, paces, retries and sets deadlines; the store states its limits and classifies faults. Between ``open`` and
    ``aclose`` it is used from one event loop. A cancelled call must leave it usable.
    """

    @property
    def name(self) -> str:
        """Location for messages and logs; contains no secrets."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal as long as answers are: available once open, and changes when the collection is recreated."""
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
        """Connects. Does nothing if already open.

        Raises:
            PassingFault: the store does not respond now.
            StoreError: a permanent failure.
        """
        ...

    async def query(self, vectors: Vectors, n_results: int) -> Found:
        """The ``n_results`` nearest passages of each vector, with similarities; fewer if the store holds fewer.

        Raises:
            PassingFault: worth a retry (see :mod:`searchr1_async.search.faults`).
            RefusedInput: caused by one of these vectors.
            StoreError: permanent; fatal if any other query would fail too.
        """
        ...

    async def count(self) -> int:
        """Number of passages.

        Raises:
            PassingFault: worth a retry.
            StoreError: permanent.
        """
        ...

    async def aclose(self) -> None:
        """Closes connections, files and threads. The store may be opened again."""
        ...


class WritableStore(Store, Protocol):
    """A store that accepts passages."""

    async def add(self, passages: Sequence[Passage], vectors: Vectors) -> None:
        """Adds passages, replacing those with the same id.

        Raises:
            PassingFault: worth a retry; some passages may have been added.
            StoreError: permanent.
        """
        ...

    async def missing(self, ids: Sequence[str]) -> frozenset[str]:
        """The ids that the store does not hold.

        Raises:
            PassingFault: worth a retry.
            StoreError: permanent.
        """
        ...


def is_writable(store: Store) -> TypeGuard[WritableStore]:
    """Whether passages can be added to it."""
    return callable(getattr(store, "add", None))


logger = logging.getLogger(__name__)

SAMPLE = 16
"""Own vectors searched for when an index is opened."""
WITHIN = 10
"""A vector counts as found if a passage with its similarity is among this many results."""
LEAST_FOUND = 0.5
"""Share of the sample below which the index is rejected. Damaged indexes found 13 to 49 %, intact ones 99 %."""
EXPECTED_FOUND = 0.9
"""Share of the sample below which a warning is logged: a graph that is too sparse also finds less."""
_TOLERANCE = 0.02
"""Similarity tolerance: vectors may be stored as int8."""


class DamagedIndexError(StoreError):
    """Files of an index are not as they were built.

    Args:
        fault: the file and what is wrong with it.
        advice: how to restore the index.
    """

    def __init__(self, fault: str, advice: str) -> None:
        super().__init__(f"{fault}. {advice}", is_fatal=True)
        self.fault = fault
        self.advice = advice


async def refuse_unproven(store: Store, vectors: Vectors, metric: Metric, advice: str) -> None:
    """Searches an open store for some of its own vectors.

    A vector counts as found by similarity, not by passage id, since a corpus may hold duplicates.

    Args:
        vectors: ``[n, dimension]``, as stored; an empty array passes.
        metric: the store's metric.
        advice: how to restore the index.

    Raises:
        DamagedIndexError: fewer than :data:`LEAST_FOUND` are found.
        PassingFault: the store does not respond now.
    """
    if not len(vectors):
        return
    products = np.einsum("vd,vd->v", vectors, vectors)
    own = products if metric == "ip" else np.ones(len(vectors), np.float32)
    found = 0
    for start in range(0, len(vectors), store.max_queries):
        part = slice(start, start + store.max_queries)
        try:
            answers = await store.query(vectors[part], WITHIN)
        except StoreError as error:
            raise DamagedIndexError(
                f"{store.name} is damaged: it fails on its own vectors ({error})", advice
            ) from error
        best = [max((passage.score for passage in passages), default=-np.inf) for passages in answers]
        found += int((np.array(best) >= own[part] - _TOLERANCE * np.maximum(1, np.abs(own[part]))).sum())
    share = found / len(vectors)
    if share < LEAST_FOUND:
        raise DamagedIndexError(
            f"{store.name} is damaged: it finds {found} of {len(vectors)} of its own vectors, and should find at least "
            f"{LEAST_FOUND:.0%}",
            advice,
        )
    if share < EXPECTED_FOUND:
        logger.warning(
            "%s finds %d of %d of its own vectors: its graph is too sparse (raise ef_search), or it is damaged",
            store.name,
            found,
            len(vectors),
        )


BLOCK_BYTES = 4 << 20
DIGEST_BYTES = 8
_TOGETHER = 16
"""Blocks between two cancellation checks."""
WHOLE_BLOCKS = 32
"""Files of up to this many blocks (128 MB) are fully checked when an index is opened."""
SPOT_BLOCKS = 8
"""Blocks checked of a larger file."""

Check = Callable[[], None]
"""Called regularly; raises if the caller was cancelled."""

ADVICE = "Copy the whole folder again from where it was built, or rebuild it"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size and checksums of an index file."""

    bytes: int
    blocks: str
    """Concatenated 8-byte BLAKE2b digests of each :data:`BLOCK_BYTES`, in hexadecimal."""


def _nothing() -> None:
    pass


def record_of(path: Path, check: Check = _nothing) -> FileRecord:
    """Size and checksums of a file.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    return FileRecord(size, "".join(_digests(path, range(-(-size // BLOCK_BYTES)), check)))


def refuse_other(
    path: Path, record: FileRecord, *, whole: bool = False, check: Check = _nothing, advice: str = ADVICE
) -> None:
    """Raises unless the file matches its record in size and in some or all blocks.

    Args:
        whole: check all blocks, whatever the size.
        check: called regularly; see :data:`Check`.
        advice: how to restore the index.

    Raises:
        DamagedIndexError: the file is missing, truncated, replaced or corrupt.
        StoreError: it cannot be read.
    """
    try:
        size = path.stat().st_size
        if size != record.bytes:
            state = "truncated" if size < record.bytes else "too long"
            raise DamagedIndexError(f"{path} is {state}: {size:,} bytes instead of {record.bytes:,}", advice)
        blocks = -(-size // BLOCK_BYTES)
        if len(record.blocks) != 2 * DIGEST_BYTES * blocks:
            raise DamagedIndexError(f"the manifest does not describe {path}", advice)
        chosen = range(blocks) if whole or blocks <= WHOLE_BLOCKS else _spread(blocks)
        for block, digest in zip(chosen, _digests(path, chosen, check), strict=True):
            if digest != record.blocks[2 * DIGEST_BYTES * block : 2 * DIGEST_BYTES * (block + 1)]:
                raise DamagedIndexError(
                    f"{path} is not the file built with this index, or is corrupt (block {block:,} of "
                    f"{blocks:,} differs)",
                    advice,
                )
    except FileNotFoundError as error:
        raise DamagedIndexError(f"{path} is missing", advice) from error
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}", is_fatal=True) from error


def _spread(blocks: int) -> list[int]:
    """The first, the last, and some between."""
    return sorted({round(place * (blocks - 1) / (SPOT_BLOCKS - 1)) for place in range(SPOT_BLOCKS)})


def _digests(path: Path, blocks: Sequence[int], check: Check) -> Iterator[str]:
    """Digests of some blocks, two at a time (hashlib releases the GIL)."""
    with ThreadPoolExecutor(2) as pool:
        for first in range(0, len(blocks), _TOGETHER):
            check()
            yield from pool.map(lambda block: _digest(path, block * BLOCK_BYTES), blocks[first : first + _TOGETHER])


def _digest(path: Path, start: int) -> str:
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.blake2b(file.read(BLOCK_BYTES), digest_size=DIGEST_BYTES).hexdigest()


INDEX_FORMAT = 1


@dataclass(frozen=True, slots=True)
class IndexIdentity:
    """What an index was built from. Only an index with the same content is used or continued."""

    corpus: str
    embedder: str
    source: str
    embedder_name: str
    passages: int
    format: int = INDEX_FORMAT

    def same_content(self, other: IndexIdentity) -> bool:
        """Compares fingerprints; names may differ."""
        return (self.format, self.corpus, self.embedder) == (other.format, other.corpus, other.embedder)


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

    @property
    def journal(self) -> Path:
        """Vectors that are not in the store yet."""
        return self.path / "journal"

    def begin(self, identity: IndexIdentity) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        _write(self.path / "building.json", identity)

    def finish(self, identity: IndexIdentity) -> None:
        _write(self.path / "index.json", identity)
        (self.path / "building.json").unlink(missing_ok=True)

    def forget(self) -> None:
        """Marks the index as neither complete nor begun, so that missing passages are built."""
        (self.path / "index.json").unlink(missing_ok=True)
        (self.path / "building.json").unlink(missing_ok=True)

    def clear(self) -> None:
        """Deletes the store's files before a rebuild; journaled vectors stay. Raises OSError."""
        (self.path / "index.json").unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path not in (self.journal, self.path / "building.json"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def refuse_others(self, identity: IndexIdentity) -> None:
        """Raises StoreError if the folder holds anything but this index."""
        found = self.whole or self.begun
        if found is not None and not found.same_content(identity):
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
        return IndexIdentity(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _write(file: Path, identity: IndexIdentity) -> None:
    write_atomically(file, json.dumps(asdict(identity), indent=2).encode())


OPENING_TRIES = 5
"""About 4 seconds in total with the default pauses."""


async def open_embedder(embedder: Embedder, pacing: PacingSettings) -> None:
    """Opens the embedder. Few retries: the fault may be transient, but also a wrong address. Raises EmbeddingError."""
    await _opened(embedder.open, pacing, EmbeddingError)


async def open_store(store: Store, pacing: PacingSettings) -> None:
    """Opens the store, like :func:`open_embedder`. Raises StoreError."""
    await _opened(store.open, pacing, StoreError)


async def _opened(request: Callable[[], Awaitable[None]], pacing: PacingSettings, failure: type[SearchError]) -> None:
    retrying = AsyncRetrying(
        retry=retry_if_exception_type(PassingFault),
        wait=wait_random_exponential(multiplier=2 * pacing.first_pause, max=pacing.longest_pause),
        stop=stop_after_attempt(OPENING_TRIES),
        sleep=anyio.sleep,
        reraise=True,
    )
    try:
        async for attempt in retrying:
            with attempt:
                await request()
    except PassingFault as fault:
        raise failure(str(fault)) from fault
