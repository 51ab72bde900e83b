"""Sources of a compact index: passages with vectors in a fixed order, from files, a Chroma server, or embedded meanwhile."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast, get_args, runtime_checkable

import anyio.to_thread
import numpy as np

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.boundary.waits import in_thread
from searchr1_async.data.corpus import Corpus, CorpusSource, load_corpus
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import StoreError
from searchr1_async.search.dispatch import with_retries
from searchr1_async.search.embedders import Embedder, Vectors
from searchr1_async.search.faults import malformed
from searchr1_async.search.passage_embedding import PACING, WINDOW, BuildOptions, PassageEmbedder, in_windows, say_cost
from searchr1_async.search.stores.chroma import read_answer
from searchr1_async.search.stores.chroma_server import PAGE, RemoteChroma
from searchr1_async.search.stores.vector_store import Metric, open_embedder, open_store

Block = tuple[list[Passage], Vectors]
"""Passages and their vectors ``[passages, dimension]``, float32."""

ROWS = 8_192
LISTED = 50_000
"""Ids per request to a Chroma server."""
_HASHED = 1 << 20
"""A file's fingerprint covers its size and this many bytes at both ends."""


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """Facts of an open source, with at least one passage."""

    name: str
    """For messages: the file or collection, and where it is."""
    fingerprint: str
    """Equal for equal passages and vectors; a build resumes only with the same fingerprint."""
    count: int
    dimension: int
    metric: Metric


@runtime_checkable
class VectorSource(Protocol):
    """Passages with vectors, readable from any row in bounded memory. Used from one event loop.

    Its calls raise CorpusError, EmbeddingError or StoreError; blocks read before an error remain valid.
    """

    async def open(self) -> SourceFacts: ...

    def blocks(self, start: int) -> AsyncGenerator[Block]:
        """All rows from ``start`` (0-based) in order, in blocks of 1 to 8,192 rows. The builder checks counts and values."""
        ...

    async def aclose(self) -> None:
        """Closes files, connections and threads, if any are open. May be opened again."""
        ...


def metric_of(space: str, name: str) -> Metric:
    """The metric of a Chroma collection. Raises StoreError for another distance."""
    if space not in get_args(Metric):
        raise StoreError(f"{name} uses the distance {space!r}, which is not supported")
    return cast(Metric, space)


async def read_ahead(rows: Iterator[Block]) -> AsyncGenerator[Block]:
    """The same blocks, each read in a worker thread."""
    while (block := await in_thread(lambda: next(rows, None))) is not None:
        yield block


class VectorFiles:
    """Vectors from ``.npy`` files, in the row order of a corpus.

    Args:
        vectors: a file, or several in row order, each with an array ``[rows, dimension]`` of float16, float32 or float64, which
            is memory-mapped. Vectors in a column of a table become one with ``numpy.save``.
        corpus: the passages, as :func:`~searchr1_async.data.corpus.load_corpus` accepts them.
        metric: ``"cosine"``, ``"l2"`` or ``"ip"``.

    Raises:
        CorpusError: the corpus does not exist.
        StoreError: no files, or a file of another type.
    """

    def __init__(
        self, vectors: str | Path | Sequence[str | Path], corpus: CorpusSource, *, metric: Metric = "cosine"
    ) -> None:
        paths = [vectors] if isinstance(vectors, str | Path) else list(vectors)
        self._paths = [absolute_path(path, "vectors") for path in paths]
        if not paths or any(path.suffix.lower() != ".npy" for path in self._paths):
            given = ", ".join(map(str, paths)) or "none"
            raise StoreError(f"vectors must be .npy files, got {given}: write them with numpy.save")
        self._corpus = load_corpus(corpus)
        self._metric: Metric = metric

    async def open(self) -> SourceFacts:
        return await in_thread(self._open)

    def blocks(self, start: int) -> AsyncGenerator[Block]:
        """See :meth:`VectorSource.blocks`."""
        return read_ahead(self._rows(start))

    async def aclose(self) -> None:
        self._arrays = []

    def _open(self) -> SourceFacts:
        self._arrays = [_array(path) for path in self._paths]
        dimensions, count = {array.shape[1] for array in self._arrays}, sum(map(len, self._arrays))
        (dimension, *others) = dimensions
        if others or not dimension:
            raise StoreError(
                f"{self._paths[0]}: the files hold vectors of dimensions {dimensions}, instead of one above 0"
            )
        if count != len(self._corpus):
            raise StoreError(
                f"{count:,} vectors for the {len(self._corpus):,} passages of {self._corpus.source}: the counts must match"
            )
        name = f"{self._corpus.source} with the vectors of {', '.join(path.name for path in self._paths)}"
        parts = "\0".join([self._corpus.fingerprint, self._metric, *map(_file_fingerprint, self._paths)])
        fingerprint = f"files-{hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()}"
        return SourceFacts(name, fingerprint, count, dimension, self._metric)

    def _rows(self, start: int) -> Iterator[Block]:
        passages = self._corpus.passages(start)
        for array in self._arrays:
            for first in range(min(start, len(array)), len(array), ROWS):
                with np.errstate(over="ignore"):  # float64 values beyond float32 become infinite, and are rejected
                    part = np.array(array[first : first + ROWS], np.float32)
                # Pages read would otherwise count as this process's memory.
                if isinstance(mapped := getattr(array, "_mmap", None), mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
                    mapped.madvise(mmap.MADV_DONTNEED)
                yield list(islice(passages, len(part))), part
            start = max(0, start - len(array))


def _array(path: Path) -> np.memmap:
    try:
        found = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    if found.ndim != 2 or found.dtype.kind != "f":
        raise StoreError(f"{path} holds {found.dtype} of shape {found.shape}: use floats [rows, dimension]")
    return found


def _file_fingerprint(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        ends = file.read(_HASHED)
        file.seek(max(0, size - _HASHED))
        return f"{size}-{hashlib.blake2b(ends + file.read(), digest_size=16).hexdigest()}"


class EmbeddedCorpus:
    """The passages of a corpus in order, with vectors from an embedder, which is opened and closed here. A kill repeats a few windows."""

    def __init__(self, corpus: Corpus, embedder: Embedder, options: BuildOptions) -> None:
        self._corpus, self._embedder, self._options = corpus, embedder, options

    async def open(self) -> SourceFacts:
        corpus, embedder = self._corpus, self._embedder
        count, fingerprint = await anyio.to_thread.run_sync(lambda: (len(corpus), corpus.fingerprint))
        await open_embedder(embedder, self._options.pacing)
        key = hashlib.blake2b(f"{fingerprint}\0{embedder.fingerprint}".encode(), digest_size=16).hexdigest()
        name = f"{corpus.source}, embedded by {embedder.name}"
        return SourceFacts(name, f"embedded-{key}", count, embedder.dimension, "cosine")

    async def blocks(self, start: int) -> AsyncGenerator[Block]:
        """See :meth:`VectorSource.blocks`."""
        if start >= (count := len(self._corpus)):  # counted when it was opened
            return
        await say_cost(self._corpus, count, self._embedder, start, self._options.emit)
        own = PassageEmbedder(self._corpus.source, self._embedder, self._options)

        async def embedded(number: int, passages: list[Passage]) -> Block:
            place = max(start, number * WINDOW)
            wanted = passages[place - number * WINDOW :]  # those before are in the index
            return wanted, np.stack(await own.embed(place, wanted))

        windows = in_windows(self._corpus, start // WINDOW, own.windows_at_once, embedded, in_order=True)
        async with aclosing(windows):
            async for block in windows:
                yield block

    async def aclose(self) -> None:
        await self._embedder.aclose()


class ChromaServer:
    """The rows of a collection of a Chroma server, in the server's order. Nothing may write to the collection meanwhile.

    ::

        source = ChromaServer("localhost", 8000, "wiki_embeddings")

    Arguments and errors are those of :class:`~searchr1_async.search.stores.chroma_server.RemoteChroma`; ``options`` are its ``ssl``,
    ``headers``, ``token``, ``tenant``, ``database`` and ``timeout``.
    """

    def __init__(
        self, host: str = "localhost", port: int = 8000, collection: str = "wiki_embeddings", **options: Any
    ) -> None:
        self._store = RemoteChroma(host, port, collection, **options)

    async def open(self) -> SourceFacts:
        store = self._store
        await open_store(store, PACING)
        model, count = store.model, await with_retries(store.count, name=store.name, pacing=PACING, failure=StoreError)
        if not count or model.dimension is None:
            raise StoreError(f"{store.name} holds no passages")
        metric = metric_of(model.space, store.name)
        return SourceFacts(store.name, f"chroma-{model.id}-{count}-{metric}", count, model.dimension, metric)

    async def blocks(self, start: int) -> AsyncGenerator[Block]:
        """See :meth:`VectorSource.blocks`."""
        # Lists many ids at once: offsets cost the server time per row skipped, lookups by id do not.
        while ids := (await self._get(limit=LISTED, offset=start, include=()))["ids"]:
            for first in range(0, len(ids), PAGE):
                page = ids[first : first + PAGE]
                answer = await self._get(ids=page, limit=len(page), include=("documents", "metadatas", "embeddings"))
                yield await in_thread(partial(_block, self._store, page, answer))
            start += len(ids)

    async def aclose(self) -> None:
        await self._store.aclose()

    async def _get(self, **asked: Any) -> Mapping[str, Any]:
        """Sends one request, with the usual retries."""
        request = partial(self._store.get, asked)
        return await with_retries(request, name=self._store.name, pacing=PACING, failure=StoreError)


def _block(store: RemoteChroma, ids: Sequence[str], answer: Mapping[str, Any]) -> Block:
    """The rows in the order of ``ids``."""
    place = {own_id: row for row, own_id in enumerate(answer["ids"])}
    if missing := next((own_id for own_id in ids if own_id not in place), None):
        raise StoreError(f"{store.name} no longer holds the passage {missing!r}: it has changed since")
    order = [place[own_id] for own_id in ids]
    try:
        vectors = np.array(answer["embeddings"], np.float32).reshape(len(ids), -1)[order]
        ordered = {name: [[answer[name][row] for row in order]] for name in ("documents", "metadatas")}
        (passages,) = read_answer({"ids": [ids], **ordered}, store.model.space)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise StoreError(str(malformed(store.name))) from error
    return list(passages), vectors
