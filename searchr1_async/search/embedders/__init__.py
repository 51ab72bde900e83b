"""Embedders: texts to vectors."""

from searchr1_async.search.embedders.base import Embedder, Vectors
from searchr1_async.search.embedders.choice import make_embedder
from searchr1_async.search.embedders.gemini import GeminiEmbedder
from searchr1_async.search.embedders.sentence_transformer import SentenceTransformerEmbedder

__all__ = ["Embedder", "GeminiEmbedder", "SentenceTransformerEmbedder", "Vectors", "make_embedder"]
