"""An index in a folder: a corpus embedded once, kept, and never mistaken for whole while it is not."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import anyio
import anyio.to_thread
from filelock import FileLock, Timeout

from searchr1_async.data.cache import cache_folder
from searchr1_async.data.corpus import Corpus
from searchr1_async.episodes.types import Passage
from searchr1_async.errors import StoreError
from searchr1_async.search.embedders.base import Embedder
from searchr1_async.search.stores.base import Store
from searchr1_async.search.stores.chroma import EmbeddedChroma

logger = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]
"""Passages done, passages in all."""

INDEX_FORMAT = 1
COLLECTION = "passages"
WINDOW = 512
"""Passages embedded and put in at a time: what is repeated at most after a break, and the step of the progress."""


@dataclass(frozen=True, slots=True)
class IndexIdentity:
    """What an index was made of. Only an index with the same identity is used or continued."""

    corpus: str
    embedder: str
    source: str
    embedder_name: str
    passages: int
    format: int = INDEX_FORMAT

    def same_content(self, other: IndexIdentity) -> bool:
        """Names may differ: equal fingerprints are equal content."""
        return (self.format, self.corpus, self.embedder) == (other.format, other.corpus, other.embedder)


@dataclass(frozen=True, slots=True)
class IndexFolder:
    """The two files that tell the state of an index: ``building.json`` while it grows, ``index.json`` when it is whole."""

    path: Path

    @property
    def whole(self) -> IndexIdentity | None:
        return _read(self.path / "index.json")

    @property
    def begun(self) -> IndexIdentity | None:
        return _read(self.path / "building.json")

    def begin(self, identity: IndexIdentity) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        _write(self.path / "building.json", identity)

    def finish(self, identity: IndexIdentity) -> None:
        _write(self.path / "index.json", identity)
        (self.path / "building.json").unlink(missing_ok=True)

    def forget(self) -> None:
        """Neither whole nor begun: it is built from its beginning."""
        (self.path / "index.json").unlink(missing_ok=True)
        (self.path / "building.json").unlink(missing_ok=True)

    def refuse_others(self, identity: IndexIdentity) -> None:
        """Raises StoreError where the folder holds something else than this index, whole or begun."""
        found = self.whole or self.begun
        if found is not None and not found.same_content(identity):
            raise StoreError(
                f"{self.path} holds the index of {found.source} by {found.embedder_name}, not of {identity.source} by "
                f"{identity.embedder_name} (or the corpus has changed since): give another path, or delete that folder"
            )
        if found is None and self.path.is_dir() and any(self.path.iterdir()):
            raise StoreError(
                f"{self.path} holds files that are no index of this package: give an empty or a new folder"
            )


def default_index_folder(corpus: Corpus, embedder: Embedder) -> Path:
    """In the user's cache, named by the content of both: another corpus or embedder gets a folder of its own."""
    key = hashlib.sha256(f"{INDEX_FORMAT}\0{corpus.fingerprint}\0{embedder.fingerprint}".encode()).hexdigest()
    return cache_folder() / "indexes" / key[:24]


def passage_text(passage: Passage) -> str:
    """What is embedded of a passage: its title in front, unless the text names it at its beginning anyway."""
    if not passage.title or passage.title.casefold() in passage.text[: 2 * len(passage.title) + 80].casefold():
        return passage.text
    return f"{passage.title}\n{passage.text}"


class LocalIndex:
    """A corpus and the folder in which its index is, or will be.

    Args:
        corpus: what is indexed.
        path: the index's folder; None means one in the user's cache, named by the content of corpus and embedder.
    """

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
        """The store with the whole index in it, open. It is built first if need be; what was begun is continued.

        Two processes may ask for one index: the second waits until the first is done. ``on_progress`` is called only
        where something is built, from the event loop, first with what is there already.

        Raises:
            CorpusError: the corpus cannot be used.
            StoreError: the folder holds something else, or cannot be written.
            EmbeddingError: the embedder failed; what is done is kept.
        """
        identity = await anyio.to_thread.run_sync(self.identity, embedder)
        folder = await anyio.to_thread.run_sync(self.folder, embedder)
        folder.refuse_others(identity)
        store = EmbeddedChroma(folder.path, COLLECTION)
        try:
            if folder.whole is not None:
                await store.open()
                if (count := await store.count()) == identity.passages:
                    return store
                logger.warning("%s holds %d of %d passages: it is built again", store.name, count, identity.passages)
                folder.forget()
            await self._ensure(folder, identity, embedder, store, on_progress)
            return store
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
        store: Store,
        on_progress: OnProgress | None,
    ) -> None:
        folder.path.parent.mkdir(parents=True, exist_ok=True)
        async with _only_builder(folder):
            if folder.whole is None:
                resume = folder.begun is not None
                folder.begin(identity)
                await embedder.open()
                await store.open()
                await _build(identity.passages, self.corpus, embedder, store, on_progress, resume=resume)
                folder.finish(identity)
            else:
                await store.open()


async def _build(
    total: int, corpus: Corpus, embedder: Embedder, store: Store, on_progress: OnProgress | None, *, resume: bool
) -> None:
    # Passages go in in the corpus's order, so what is there is a beginning of it; the last window may be incomplete.
    done = max(0, await store.count() // WINDOW - 1) * WINDOW if resume else 0
    batches = corpus.batches(WINDOW, start=done)
    if on_progress:
        on_progress(done, total)
    while batch := await anyio.to_thread.run_sync(_next_batch, batches):
        vectors = await embedder.embed_passages([passage_text(passage) for passage in batch])
        await store.add(batch, vectors)
        done += len(batch)
        if on_progress:
            on_progress(done, total)
    count = await store.count()
    if count != total:
        raise StoreError(f"{store.name} holds {count} passages where {total} were put in: delete it and build it again")


def _next_batch(batches: Iterator[list[Passage]]) -> list[Passage] | None:
    return next(batches, None)


@asynccontextmanager
async def _only_builder(folder: IndexFolder) -> AsyncIterator[None]:
    lock = FileLock(folder.path.with_name(folder.path.name + ".lock"), thread_local=False)
    told = False
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except Timeout:
            if not told:
                logger.info("another process builds the index in %s: waiting for it", folder.path)
                told = True
            await anyio.sleep(0.25)
    try:
        yield
    finally:
        lock.release()


def _read(file: Path) -> IndexIdentity | None:
    try:
        return IndexIdentity(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _write(file: Path, identity: IndexIdentity) -> None:
    """Whole or not at all: written beside, then put in place."""
    beside = file.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(json.dumps(asdict(identity), indent=2), encoding="utf-8")
    beside.replace(file)
