"""Where passages are kept with their vectors."""

from searchr1_async.search.stores.base import Found, Store, WritableStore
from searchr1_async.search.stores.chroma import EmbeddedChroma, RemoteChroma

__all__ = ["EmbeddedChroma", "Found", "RemoteChroma", "Store", "WritableStore"]
