"""Sources of passages and vectors for a compact index."""

from searchr1_async.search.sources.base import Block, SourceFacts, VectorSource
from searchr1_async.search.sources.chroma_folder import ChromaFolder
from searchr1_async.search.sources.chroma_server import ChromaServer
from searchr1_async.search.sources.embedded import EmbeddedCorpus
from searchr1_async.search.sources.files import VectorFiles

__all__ = [
    "Block",
    "ChromaFolder",
    "ChromaServer",
    "EmbeddedCorpus",
    "SourceFacts",
    "VectorFiles",
    "VectorSource",
]
