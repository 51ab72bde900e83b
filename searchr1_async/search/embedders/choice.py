"""Which embedder a name means."""

from __future__ import annotations

from pathlib import Path

from searchr1_async.search.embedders.base import Embedder
from searchr1_async.search.embedders.gemini import GeminiEmbedder
from searchr1_async.search.embedders.sentence_transformer import SentenceTransformerEmbedder


def make_embedder(embedder: str | Path | Embedder) -> Embedder:
    """An embedder by its model's name or folder; an embedder as it is.

    ``"gemini"`` and names that begin with ``"gemini-"`` mean :class:`GeminiEmbedder`, any other name and every
    :class:`~pathlib.Path` :class:`SentenceTransformerEmbedder`; both with their defaults.

    Raises:
        ConfigurationError: a Gemini model that is not supported.
        EmbeddingError: no such folder, or sentence-transformers is not installed.
    """
    if isinstance(embedder, str):
        if embedder == "gemini":
            return GeminiEmbedder()
        if embedder.startswith("gemini-"):
            return GeminiEmbedder(embedder)
    return SentenceTransformerEmbedder(embedder) if isinstance(embedder, str | Path) else embedder
