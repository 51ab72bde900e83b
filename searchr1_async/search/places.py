"""Detects the searchable index at a path or URL, and its embedder.

Options of a search.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypedDict

import anyio
import anyio.to_thread

from searchr1_async.boundary.paths import absolute_path
from searchr1_async.boundary.settings import Count, Natural, Range, Seconds, check_settings
from searchr1_async.boundary.tables import TABLE_SUFFIXES
from searchr1_async.data.wikipedia_index import collections_in
from searchr1_async.errors import ConfigurationError, EmbeddingError, StoreError
from searchr1_async.search.compact.files import BUILDING_NAME, MANIFEST_NAME
from searchr1_async.search.compact.store import CompactStore
from searchr1_async.search.embedders import Embedder
from searchr1_async.search.gemini import make_embedder
from searchr1_async.search.index import COLLECTION
from searchr1_async.search.pacing import PacingSettings
from searchr1_async.search.stores.chroma_folder import EmbeddedChroma
from searchr1_async.search.stores.chroma_server import RemoteChroma
from searchr1_async.search.stores.vector_store import IndexFolder, Store, building_call

CHROMA_DATABASE = "chroma.sqlite3"


@dataclass(frozen=True, slots=True)
class Place:
    """A store and the embedder of its vectors."""

    embedder: Embedder
    store: Store


EmbedderChoice = str | Path | Embedder | None
"""The user's choice; None for the one the index names."""


async def look_up(
    place: str | Path, embedder: EmbedderChoice, collection: str | None, token: str | None
) -> Place | None:
    """Finds the store at a place; None for a corpus, which is not an index yet.

    Args:
        place: a folder, a file, a corpus name, or an ``http://`` or ``https://`` URL.
        embedder: see :data:`EmbedderChoice`.
        collection: of a Chroma folder or server; None for the only one of a folder.
        token: of a server.

    Raises:
        ConfigurationError: the embedder is unknown or does not match the index, or there are several collections.
        EmbeddingError: the embedder's library or folder is missing.
        StoreError: nothing searchable, or no answer from the server.
    """
    if is_address(place):
        return await _served(str(place), embedder, collection, token)
    return await anyio.to_thread.run_sync(_on_disk, place, embedder, collection)


def is_address(place: str | Path) -> bool:
    return isinstance(place, str) and place.startswith(("http://", "https://"))


def compact_place(folder: Path, embedder: EmbedderChoice) -> Place:
    """A compact index and its embedder. Reads a file: call it in a worker thread. Raises as :func:`look_up`."""
    store = CompactStore(folder)
    manifest = store.manifest
    return Place(_embedder(str(folder), embedder, manifest.embedder, manifest.embedder_fingerprint), store)


def _on_disk(place: str | Path, embedder: EmbedderChoice, collection: str | None) -> Place | None:
    path = absolute_path(place, "place")
    if not path.exists() or path.is_file():
        return None
    if (path / MANIFEST_NAME).is_file() or (path / BUILDING_NAME).is_dir():
        return compact_place(path, embedder)
    if (path / CHROMA_DATABASE).is_file():
        folder = IndexFolder(path)
        if (index := folder.whole) is None and folder.begun is not None:
            raise StoreError(
                f"{path} holds an index that is not finished: {building_call(path)} continues it", is_fatal=True
            )
        if index is not None:
            own = _embedder(str(path), embedder, index.embedder_name, index.embedder)
            return Place(own, EmbeddedChroma(path, collection or COLLECTION))
        return Place(_embedder(str(path), embedder, None, None), EmbeddedChroma(path, collection or _only_one(path)))
    files = sorted(each.name for each in path.iterdir() if each.name.endswith(TABLE_SUFFIXES))
    advice = f"; pass a file in it, such as {files[0]}" if files else ""
    raise StoreError(f"{path} holds no index: it has neither {MANIFEST_NAME} nor {CHROMA_DATABASE}{advice}")


def _only_one(path: Path) -> str:
    names = [each.name for each in collections_in(path)]
    if len(names) != 1:
        raise ConfigurationError(f"{path} holds the collections {', '.join(names) or '(none)'}: pass collection=…")
    return names[0]


def _embedder(place: str, given: EmbedderChoice, name: str | None, fingerprint: str | None) -> Embedder:
    """The given embedder, or the one the index names; refuses one that does not match the index."""
    if given is None and name is None:
        raise ConfigurationError(f"{place} does not name the embedder of its vectors: pass embedder=…")
    try:
        made = make_embedder(name if given is None and name is not None else given)  # type: ignore[arg-type]
    except EmbeddingError as error:
        if given is not None:
            raise
        raise EmbeddingError(f"{place} was made with {name!r}, which is not available here: {error}") from error
    if fingerprint is not None and made.fingerprint != fingerprint:
        if given is None:
            raise ConfigurationError(
                f"{place} was made with an embedder named {name!r} that differs from {made.name}: pass the original one, "
                "embedder=…"
            )
        raise ConfigurationError(
            f"{place} was made with the embedder {name or 'of another fingerprint'}, not with {made.name}: their vectors "
            "cannot be compared"
        )
    return made


async def _served(url: str, embedder: EmbedderChoice, collection: str | None, token: str | None) -> Place:
    from searchr1_async.search.http_client import ServedEmbedder, ServedStore, look_at

    if collection is not None:
        if embedder is None:
            raise ConfigurationError(f"{url} does not name the embedder of its vectors: pass embedder=…")
        own = await anyio.to_thread.run_sync(make_embedder, embedder)
        return Place(own, RemoteChroma(url, collection=collection, token=token))
    facts = await look_at(url, token=token)
    own = ServedEmbedder(facts, token=token)
    if embedder is not None:
        own = await anyio.to_thread.run_sync(_embedder, url, embedder, facts.embedder, facts.embedder_fingerprint)
    return Place(own, ServedStore(facts, token=token))


class SearchOptions(TypedDict, total=False):
    """Options of :class:`Search` besides embedder and store."""

    n_results: int
    """Passages per query, 1 to 100; default 3, as in the recipe."""
    max_passage_words: int | None
    """Truncates passages to so many words; None (default) keeps them whole."""
    deadline: float
    """Seconds per call, default 120, then it fails. Extended while a service is down."""
    cache_entries: int
    """Answers in memory, default 10,000 (about 3 KB each); 0 disables the cache."""
    cache_path: str | Path | None
    """File of a persistent answer cache, which processes may share; None (default) for none."""
    cache_bytes: int
    """Size of that file, default 1 GiB; evicts the least recently used answers."""
    pacing: PacingSettings
    """Pacing and retries of requests to the embedder and the store."""


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """:class:`SearchOptions` with defaults. Raises ConfigurationError if one is out of range."""

    n_results: Annotated[int, Range(at_least=1, at_most=100)] = 3
    max_passage_words: Count | None = None
    deadline: Seconds = 120.0
    cache_entries: Natural = 10_000
    cache_path: str | Path | None = None
    cache_bytes: Count = 1 << 30
    pacing: PacingSettings = field(default_factory=PacingSettings)

    def __post_init__(self) -> None:
        check_settings(self)


def check_n_results(n_results: int) -> None:
    """Raises ConfigurationError unless 1 to 100."""
    if not 1 <= n_results <= 100:
        raise ConfigurationError(f"n_results is {n_results}: it must be 1 to 100")
