"""Vector stores for passages."""

from searchr1_async.search.stores.base import Found, Store, WritableStore
from searchr1_async.search.stores.chroma import EmbeddedChroma, RemoteChroma
from searchr1_async.search.stores.compact import CompactSettings, CompactStore

__all__ = ["CompactSettings", "CompactStore", "EmbeddedChroma", "Found", "RemoteChroma", "Store", "WritableStore"]
