"""Full-Wikipedia search in a few gigabytes of memory: codes in memory, vectors and passages on disk."""

from searchr1_async.search.stores.compact.layout import CompactManifest, CompactSettings
from searchr1_async.search.stores.compact.store import CompactStore

__all__ = ["CompactManifest", "CompactSettings", "CompactStore"]
