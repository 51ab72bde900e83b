"""Chroma as the vector store: a local folder, a server (``chroma run``), or Chroma Cloud."""

from searchr1_async.search.stores.chroma.embedded import EmbeddedChroma
from searchr1_async.search.stores.chroma.remote import RemoteChroma

__all__ = ["EmbeddedChroma", "RemoteChroma"]
