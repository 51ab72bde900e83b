"""An embedder that needs no transformer: WordLlama's word vectors, 1,600 passages a second on one core.

all-MiniLM-L6-v2 embeds 22 passages of 100 words a second on two cores without AMX, 41 minutes for 54,909; this takes half a
minute. It finds the answer of a PopQA question in its top 3 a little less often (82 % against 89 %).

    pip install wordllama
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import numpy as np

from searchr1_async.errors import EmbeddingError
from searchr1_async.search import Vectors


class WordLlamaEmbedder:
    """WordLlama's packaged model, 256 dimensions, in a worker thread.

    Raises:
        EmbeddingError: the package is not installed.
    """

    name = "wordllama"
    dimension = 256
    max_texts = 4096
    max_requests = 1

    def __init__(self) -> None:
        try:
            import wordllama
        except ImportError as error:
            raise EmbeddingError("this benchmark embeds with WordLlama: run `pip install wordllama`") from error
        self._folder = Path(wordllama.__file__).parent
        self._model: Any = None
        weights = sorted(self._folder.rglob("*.safetensors"))
        digest = hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in weights))
        self.fingerprint = f"wordllama/{self.dimension}/{digest.hexdigest()[:16]}"

    async def open(self) -> None:
        """Loads it, without a look at the network (its own look-up of the tokenizer fails without one)."""
        from wordllama import WordLlama

        if self._model is None:
            self._model = await anyio.to_thread.run_sync(
                lambda: WordLlama.load(cache_dir=self._folder, disable_download=True)
            )

    async def aclose(self) -> None:
        """Nothing is held but memory."""

    async def embed_queries(self, texts: Sequence[str]) -> Vectors:
        return await self.embed_passages(texts)

    async def embed_passages(self, texts: Sequence[str]) -> Vectors:
        vectors = await anyio.to_thread.run_sync(lambda: self._model.embed(list(texts), norm=True))
        return np.ascontiguousarray(vectors, dtype=np.float32)
