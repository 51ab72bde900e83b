"""What a search asks: an embedder and its store, found at a path or URL, opened, and described so that it is found again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.data.corpus import CorpusSource, load_corpus
from searchr1_async.errors import ConfigurationError, EmbeddingError, StoreError
from searchr1_async.search.compact.files import BUILDING_NAME, MANIFEST_NAME
from searchr1_async.search.compact.store import CompactStore
from searchr1_async.search.embedders import DEFAULT_MODEL, Embedder
from searchr1_async.search.gemini import make_embedder
from searchr1_async.search.http_client import ServedSearch
from searchr1_async.search.index import COLLECTION, LocalIndex, OnProgress
from searchr1_async.search.pacing import PacingSettings
from searchr1_async.search.stores.chroma_folder import EmbeddedChroma
from searchr1_async.search.stores.chroma_server import RemoteChroma
from searchr1_async.search.stores.compat import collections_in
from searchr1_async.search.stores.vector_store import (
    IndexFolder,
    Store,
    building_call,
    lasting_name,
    open_embedder,
    open_store,
)

CHROMA_DATABASE = "chroma.sqlite3"

EmbedderChoice = str | Path | Embedder | None
"""The user's choice; None for the one the index names."""
OpenStore = Store | ServedSearch


@dataclass(frozen=True, slots=True)
class Retriever:
    """A store, or a corpus with its index folder, and the embedder of its vectors."""

    embedder: Embedder | None
    """None for a served search, which embeds queries itself."""
    store: OpenStore | LocalIndex
    description: Mapping[str, Any] | None = None
    """Arguments of :func:`described_retriever`, as JSON values; None if they would need in-memory objects or secrets."""

    @property
    def name(self) -> str:
        """Of the corpus or the store."""
        return self.store.corpus.source if isinstance(self.store, LocalIndex) else self.store.name

    @property
    def embedder_name(self) -> str:
        return self.store.embedder_name if isinstance(self.store, ServedSearch) else self._own_embedder.name

    @property
    def embedder_fingerprint(self) -> str:
        served = self.store
        return served.embedder_fingerprint if isinstance(served, ServedSearch) else self._own_embedder.fingerprint

    @property
    def _own_embedder(self) -> Embedder:
        if self.embedder is None:
            raise _needs_embedder(self.name)
        return self.embedder

    @property
    def content(self) -> str:
        """Equal for retrievers of the same passages. Reads the whole corpus the first time. Raises CorpusError."""
        match self.store:
            case LocalIndex():
                return self.store.corpus.fingerprint
            case CompactStore():
                return self.store.fingerprint
            case _:
                return self.store.name

    async def open(self, pacing: PacingSettings, on_progress: OnProgress | None = None) -> OpenStore:
        """Opens the embedder and the store, building a missing index first. Returns the store; raises as ``Search.connect``."""
        if isinstance(self.store, ServedSearch):
            await open_store(self.store, pacing)
            return self.store
        embedder = self._own_embedder
        if isinstance(self.store, LocalIndex):
            store = await self.store.open_store(embedder, on_progress)
        else:
            store = self.store
            await open_store(store, pacing)
        try:
            await open_embedder(embedder, pacing)
            if store.dimension not in (None, embedder.dimension):
                raise StoreError(
                    f"{store.name} holds vectors of dimension {store.dimension}, but {embedder.name} produces dimension "
                    f"{embedder.dimension}: it was built with another embedder, use that one",
                    is_fatal=True,
                )
        except BaseException:
            with anyio.CancelScope(shield=True):
                await store.aclose()
            raise
        return store


def local_retriever(corpus: CorpusSource, path: str | Path | None, embedder: str | Path | Embedder) -> Retriever:
    """A corpus with its index folder. Reads files. Raises as :meth:`Search.local`."""
    folder = None if path is None else absolute_path(path, "path")
    index = LocalIndex(load_corpus(corpus), folder)
    description = None
    if isinstance(corpus, str | Path) and isinstance(embedder, str | Path):
        file = absolute_path(corpus, "corpus")
        description = {
            "kind": "local",
            "corpus": str(file) if file.is_file() else str(corpus),
            "path": None if folder is None else str(folder),
            "embedder": lasting_name(embedder),
        }
    return Retriever(make_embedder(embedder), index, description)


def chroma_retriever(embedder: str | Path | Embedder, **address: Any) -> Retriever:
    """A collection of a Chroma server; ``address`` has arguments of :class:`RemoteChroma` that are not secret."""
    description = None
    if isinstance(embedder, str | Path) and "@" not in str(address.get("host")):  # a URL may hold a password
        description = {"kind": "chroma", **address, "embedder": lasting_name(embedder)}
    return Retriever(make_embedder(embedder), RemoteChroma(**address), description)


def compact_retriever(folder: str | Path, embedder: EmbedderChoice = None) -> Retriever:
    """A compact index and its embedder. Reads a file: call it in a worker thread. Raises as :func:`find_retriever`."""
    store = CompactStore(folder)
    own = _embedder(str(store.folder), embedder, store.manifest.embedder, store.manifest.embedder_fingerprint)
    description = None
    if embedder is None or isinstance(embedder, str | Path):
        description = {"kind": "compact", "folder": str(store.folder), "embedder": lasting_name(embedder)}
    return Retriever(own, store, description)


def described_retriever(kind: str = "", **arguments: Any) -> Retriever:
    """A retriever from its description. Raises ConfigurationError if it is none, or else as the functions above."""
    makers = {"local": local_retriever, "chroma": chroma_retriever, "compact": compact_retriever}
    if kind not in makers:
        raise ConfigurationError(
            f"a search of kind {kind!r} cannot be made from its description: pass the search itself"
        )
    try:
        return makers[kind](**arguments)
    except TypeError as error:
        raise ConfigurationError(f"invalid search description: {error}") from error


async def find_retriever(
    place: str | Path, embedder: EmbedderChoice, collection: str | None, token: str | None
) -> Retriever:
    """The index, corpus or server at a place: a folder, a file, a corpus name, or a URL.

    Raises:
        ConfigurationError: the embedder is unknown or does not match the index, or there are several collections.
        CorpusError: no such corpus.
        EmbeddingError: the embedder's library or folder is missing.
        StoreError: nothing searchable, or no answer from the server.
    """
    url = str(place)
    if not url.startswith(("http://", "https://")):
        return await anyio.to_thread.run_sync(_on_disk, place, embedder, collection)
    if collection is not None:
        own = await anyio.to_thread.run_sync(_embedder, url, embedder, None, None)
        return Retriever(own, RemoteChroma(url, collection=collection, token=token))
    if embedder is not None:
        raise ConfigurationError(
            f"{url}: a served search embeds queries itself: leave out embedder=, or pass collection= for a Chroma server"
        )
    served = ServedSearch(url, token)
    await open_store(served, PacingSettings())  # so that its fingerprints are known before the search is open
    await served.aclose()
    return Retriever(None, served)


def _on_disk(place: str | Path, embedder: EmbedderChoice, collection: str | None) -> Retriever:
    path = absolute_path(place, "place")
    if not path.exists() or path.is_file():
        # The name of a built-in corpus is not a path.
        return local_retriever(path if path.exists() else place, None, DEFAULT_MODEL if embedder is None else embedder)
    if (path / MANIFEST_NAME).is_file() or (path / BUILDING_NAME).is_dir():
        return compact_retriever(path, embedder)
    if not (path / CHROMA_DATABASE).is_file():
        raise StoreError(f"{path} holds no index: it has neither {MANIFEST_NAME} nor {CHROMA_DATABASE}")
    folder = IndexFolder(path)
    if (index := folder.whole) is not None:
        own = _embedder(str(path), embedder, index.embedder_name, index.embedder)
        return Retriever(own, EmbeddedChroma(path, collection or COLLECTION))
    if folder.begun is not None:
        raise StoreError(
            f"{path} holds an index that is not finished: {building_call(path)} continues it", is_fatal=True
        )
    own = _embedder(str(path), embedder, None, None)
    names = collections_in(path) if collection is None else [collection]
    if len(names) != 1:
        raise ConfigurationError(f"{path} holds the collections {', '.join(names) or '(none)'}: pass collection=…")
    return Retriever(own, EmbeddedChroma(path, names[0]))


def _needs_embedder(name: str) -> ConfigurationError:
    return ConfigurationError(f"{name} does not name the embedder of its vectors: pass embedder=…")


def _embedder(place: str, given: EmbedderChoice, name: str | None, fingerprint: str | None) -> Embedder:
    """The given embedder, or the one the index names; refuses one that does not match the index."""
    chosen = name if given is None else given
    if chosen is None:
        raise _needs_embedder(place)
    try:
        made = make_embedder(chosen)
    except EmbeddingError as error:
        raise EmbeddingError(
            f"{place} needs the embedder {str(chosen)!r}, which is not available here: {error}"
        ) from error
    if fingerprint is not None and made.fingerprint != fingerprint:
        raise ConfigurationError(
            f"{place} was made with the embedder {name or 'of another fingerprint'}, not with {made.name}: their vectors "
            "cannot be compared; pass the original one, embedder=…"
        )
    return made
