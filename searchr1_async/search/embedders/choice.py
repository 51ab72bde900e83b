"""Embedders by name."""

from __future__ import annotations

from pathlib import Path

from searchr1_async.search.embedders.base import Embedder
from searchr1_async.search.embedders.gemini import GeminiEmbedder
from searchr1_async.search.embedders.sentence_transformer import SentenceTransformerEmbedder


def make_embedder(embedder: str | Path | Embedder) -> Embedder:
    """An embedder from its model's name or folder; an :class:`Embedder` is returned as is.

    ``"gemini"`` and names that start with ``"gemini-"`` give a :class:`GeminiEmbedder`, any other name or
    :class:`~pathlib.Path` a :class:`SentenceTransformerEmbedder`, both with defaults.

    Raises:
        ConfigurationError: an unsupported Gemini model.
        EmbeddingError: no such folder, or sentence-transformers is not installed.
    """
    if isinstance(embedder, str):
        if embedder == "gemini":
            return GeminiEmbedder()
        if embedder.startswith("gemini-"):
            return GeminiEmbedder(embedder)
    return SentenceTransformerEmbedder(embedder) if isinstance(embedder, str | Path) else embedder
