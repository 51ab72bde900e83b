"""The search tool: passages for the queries of all running rollouts, in few requests.

As ``sr.search``: embedders, vector stores, indexes and their sources, a server and its clients, pacing.
"""

from typing import TYPE_CHECKING

from searchr1_async.boundary import lazy_names

if TYPE_CHECKING:
    from searchr1_async.data.corpus import Corpus as Corpus
    from searchr1_async.episodes.types import SearchCall as SearchCall
    from searchr1_async.search.builders import CompactReport as CompactReport
    from searchr1_async.search.builders import build_compact_index as build_compact_index
    from searchr1_async.search.builders import build_index as build_index
    from searchr1_async.search.compact.files import CompactSettings as CompactSettings
    from searchr1_async.search.compact.store import CompactStore as CompactStore
    from searchr1_async.search.embedders import Embedder as Embedder
    from searchr1_async.search.embedders import SentenceTransformerEmbedder as SentenceTransformerEmbedder
    from searchr1_async.search.embedders import Vectors as Vectors
    from searchr1_async.search.gemini import GeminiEmbedder as GeminiEmbedder
    from searchr1_async.search.http_client import ServedSearch as ServedSearch
    from searchr1_async.search.http_server import serve_search as serve_search
    from searchr1_async.search.index import IndexReport as IndexReport
    from searchr1_async.search.pacing import PacingSettings as PacingSettings
    from searchr1_async.search.search import Search as Search
    from searchr1_async.search.stats import SearchStatistics as SearchStatistics
    from searchr1_async.search.stores.chroma_folder import EmbeddedChroma as EmbeddedChroma
    from searchr1_async.search.stores.chroma_server import RemoteChroma as RemoteChroma
    from searchr1_async.search.stores.sources import ChromaServer as ChromaServer
    from searchr1_async.search.stores.sources import VectorFiles as VectorFiles
    from searchr1_async.search.stores.vector_store import Found as Found
    from searchr1_async.search.stores.vector_store import Store as Store
    from searchr1_async.search.stores.vector_store import WritableStore as WritableStore
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
